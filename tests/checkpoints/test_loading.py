"""A run starts from weights only where they mean the same to its model, whatever checkpoint they are in."""

from pathlib import Path
from typing import Any

import pytest
from published import RECORDED, RECORDED_ON_TIMM, publish_recorded
from tiny import tiny_config, tiny_model

from dfine.checkpoints import original, ours
from dfine.checkpoints.loading import initialise, load_model
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError, override
from dfine.model.detector import DFine

CATEGORIES = [{"id": i, "name": str(i)} for i in range(3)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, of three classes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ours.save(folder / "best.pt", ours.weights(Config(model=tiny_config()), CATEGORIES, tiny_model()))
    published = publish_recorded(folder / "published", RECORDED)
    model, config, _ = load_model(published)
    ours.save(folder / "original.pth", {"model": original.state_of(model, config.model)})
    return {
        "ours": folder / "best.pt",
        "original": folder / "original.pth",
        "transformers": published,
        "timm": publish_recorded(folder / "on_timm", RECORDED_ON_TIMM),
    }


def start(path: Path, *overrides: str) -> tuple[str, DFine]:
    """What is said, and the model, where a run's config is that of the checkpoint but for some keys."""
    _, config, categories = load_model(path)
    model = DFine(override(config, list(overrides)).model, len(categories))
    return initialise(model, str(path), categories), model


CONTRADICTIONS = [
    ("ours", "model.decoder.a=1", "model.decoder.a is 1.0, there 0.5"),
    ("ours", "model.decoder.a=0.501", "model.decoder.a is 0.501, there 0.5"),
    ("ours", "model.decoder.c=0.3", "model.decoder.c is 0.3, there 0.25"),
    ("ours", "model.decoder.points=[2, 1, 1]", "model.decoder.points is [2, 1, 1], there [1, 2, 1]"),
    (
        "ours",
        "model.decoder={heads: 2, points: [2, 4, 2], layers: 3, queries: 8, bins: 8, feedforward_dim: 32}",
        "heads",
    ),
    ("ours", "model.encoder.heads=2", "model.encoder.heads is 2, there 4"),
    ("ours", "model.decoder.layers=2", "model.decoder.layers is 2, there 3"),
    ("ours", "model.encoder.depth_mult=0.67", "model.encoder.depth_mult is 0.67, there 0.34"),
    ("ours", "model.encoder.expansion=1", "model.encoder.expansion is 1.0, there 0.5"),
    ("ours", "model.backbone.name=test_convnext3", "model.backbone.name is test_convnext3, there test_convnext"),
    ("original", "model.decoder.a=1", "model.decoder.a is 1.0, there 0."),
    ("original", "model.decoder.points=[2, 3]", "model.decoder.points is [2, 3], there [3, 2]"),
    ("transformers", "model.encoder.heads=4", "model.encoder.heads is 4, there 8"),
    ("transformers", "model.decoder.layers=3", "model.decoder.layers is 3, there 2"),
    ("timm", "model.decoder.points=[3, 2, 1]", "model.decoder.points is [3, 2, 1], there [2, 3, 1]"),
    ("timm", "model.backbone.name=test_convnext2", "model.backbone.name is test_convnext2, there test_convnext"),
]


@pytest.mark.parametrize(("kind", "change", "said"), CONTRADICTIONS)
def test_weights_of_another_model_are_refused_with_key_and_both_values(
    kind: str, change: str, said: str, checkpoints: dict[str, Path]
) -> None:
    path = checkpoints[kind]
    with pytest.raises(CheckpointError) as error:
        start(path, change)
    assert str(error.value).startswith(f"{path}: its weights are of another model than this config's: model.")
    assert said in str(error.value)


def test_what_follows_from_a_key_is_not_named_with_it(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"config's: model\.hidden_dim is 64, there 32$"):
        start(checkpoints["ours"], "model.hidden_dim=64")  # the encoder's width follows


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("ours", "model.decoder.queries=3"),
        ("ours", "model.denoising={queries: 0, label_noise: 0.5}"),
        ("ours", "model.backbone.checkpointing=true"),
        ("ours", "model.encoder.hidden_dim=32"),  # it was, as model.hidden_dim
        ("ours", "model.encoder.depth_mult=0.4"),  # as many blocks
        ("timm", "model.encoder={heads: 8, feedforward_dim: 48, depth_mult: 0.6, expansion: 0.52}"),  # as wide, too
        ("timm", "model.backbone.name=test_convnext.r160_in1k"),  # names weights of the same backbone
        ("original", "model.decoder.queries=3"),
    ],
)
def test_what_does_not_change_the_meaning_of_weights_may_differ(
    kind: str, change: str, checkpoints: dict[str, Path]
) -> None:
    said, model = start(checkpoints[kind], change)
    assert said.endswith(f"loaded {len(model.state_dict())} of {len(model.state_dict())} tensors")


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_mean_and_std_are_the_checkpoints(kind: str, checkpoints: dict[str, Path]) -> None:
    path = checkpoints[kind]
    theirs = load_model(path)[0]
    for key in ("mean", "std"):
        found = getattr(theirs, key).flatten().tolist()
        start(path, f"model.{key}={found}")
        with pytest.raises(CheckpointError) as error:
            start(path, f"model.{key}=[0.1, 0.25, 0.3]")
        assert (
            str(error.value) == f"{path}: model.{key} is [0.1, 0.25, 0.3], there {found}: leave it out to take theirs"
        )
    assert start(path, "model.mean=[]")[1].mean.equal(theirs.mean)


def test_a_checkpoint_of_another_version_says_as_much_of_its_model_as_this_one_knows(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    content: dict[str, Any] = ours.read(checkpoints["ours"])
    content["config"] |= {"wheels": 4}
    content["config"]["model"]["wheels"] = {"count": 4}
    ours.save(tmp_path / "old.pt", content)
    config = Config(model=tiny_config())
    assert "loaded" in initialise(DFine(config.model, 3), str(tmp_path / "old.pt"), CATEGORIES)
    other = override(config, ["model.decoder.a=1"])
    with pytest.raises(CheckpointError, match=r"model\.decoder\.a is 1\.0, there 0\.5"):
        initialise(DFine(other.model, 3), str(tmp_path / "old.pt"), CATEGORIES)
    content["config"]["model"]["decoder"] = 3
    ours.save(tmp_path / "old.pt", content)
    with pytest.raises(
        CheckpointError, match=r"old\.pt: its own config cannot be meant: model\.decoder: expected keys"
    ):
        initialise(DFine(config.model, 3), str(tmp_path / "old.pt"), CATEGORIES)


def test_weights_that_would_not_be_read_are_refused() -> None:
    config = override(Config(model=tiny_config()), ["model.backbone.weights=/no/such/file"])
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.weights: /no/such/file is read with .*pretrained=true only"
    ):
        DFine(config.model, 3)
