"""Checkpoints of the original implementation become models of ours, whole or not at all."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from dfine.checkpoints import loading, original
from dfine.checkpoints.original import Foreign
from dfine.model.detector import DFine

POINTS = {"n": (6, 6)}  # the others have (3, 6, 3)
REG_SCALE = {"x": 8}  # the others have 4


@pytest.fixture(scope="module")
def sizes(golden_folder: Path) -> dict[str, dict[str, list[int]]]:
    """Names and shapes of each published size."""
    recorded = json.loads((golden_folder / "15_state_dict_keys.json").read_text())
    return {size: {entry[0]: entry[1] for entry in model["state"]} for size, model in recorded.items()}


@pytest.fixture(scope="module")
def nano(nano_checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(nano_checkpoint, weights_only=True)["model"]


@pytest.fixture(scope="module")
def model(nano: dict[str, Tensor]) -> DFine:
    """A nano model with weights of its own."""
    return DFine(original.architecture(Foreign(nano)), classes=80)


def made_up(size: str, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict of a published size in which every tensor has a number of its own."""
    state = {name: torch.full((), float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items(), start=1)}
    scale = torch.tensor([1 / points for points in POINTS.get(size, (3, 6, 3)) for _ in range(points)])
    derived = {
        "up": torch.tensor([0.5]),
        "reg_scale": torch.tensor([REG_SCALE.get(size, 4)]),
        "num_points_scale": scale,
    }
    return {name: derived.get(name.split(".")[-1], tensor) for name, tensor in state.items()}


# Every published size


@pytest.mark.parametrize("size", ["n", "s", "m", "l", "x"])
def test_every_tensor_of_every_size_finds_its_own_place(size: str, sizes: dict[str, dict[str, list[int]]]):
    state = made_up(size, sizes[size])
    model = DFine(original.architecture(Foreign(state)), classes=80)
    model.load_state_dict(original.translated(Foreign(state), model))
    ours = {name: x.flatten()[0].item() for name, x in model.state_dict().items() if name not in ("mean", "std")}
    counted = {name: number for name, number in ours.items() if not name.endswith(original.COUNTER)}
    theirs = {name: x for name, x in state.items() if not original.DERIVED.search(name)}
    theirs = {name: x.flatten()[0].item() for name, x in theirs.items() if not name.endswith(original.COUNTER)}
    assert sorted(counted.values()) == sorted(theirs.values())


@pytest.mark.parametrize(
    ("size", "backbone", "strides", "dims", "blocks", "hidden", "layers", "c"),
    [
        ("n", "hgnetv2_b0", (16, 32), (128, 128), 2, 21, 3, 1 / 4),
        ("s", "hgnetv2_b0", (8, 16, 32), (256, 256), 1, 64, 3, 1 / 4),
        ("m", "hgnetv2_b2", (8, 16, 32), (256, 256), 2, 128, 4, 1 / 4),
        ("l", "hgnetv2_b4", (8, 16, 32), (256, 256), 3, 128, 6, 1 / 4),
        ("x", "hgnetv2_b5", (8, 16, 32), (384, 256), 3, 192, 6, 1 / 8),
    ],
)
def test_the_architecture_is_read_off_the_tensors(size, backbone, strides, dims, blocks, hidden, layers, c, sizes):
    config = original.architecture(Foreign(made_up(size, sizes[size])))
    encoder_dim = config.encoder.hidden_dim or config.hidden_dim
    assert (config.backbone.name, config.strides) == (backbone, strides)
    assert (encoder_dim, config.hidden_dim) == dims
    assert round(3 * config.encoder.depth_mult) == blocks
    assert int(config.encoder.expansion * encoder_dim / 2) == hidden
    assert (config.decoder.layers, config.decoder.heads, config.decoder.bins) == (layers, 8, 32)
    assert config.decoder.points == POINTS.get(size, (3, 6, 3))
    assert (config.decoder.a, config.decoder.c) == (0.5, c)
    assert not config.backbone.pretrained


def test_the_curve_is_that_of_the_numbers_without_their_signs(nano: dict[str, Tensor]):
    """The original trains with their absolute values, so either sign may come out."""
    names = [name for name in nano if name.endswith((".up", ".reg_scale"))]
    assert len(names) == 4
    negative = nano | {name: -nano[name] for name in names}
    assert original.architecture(Foreign(negative)).decoder == original.architecture(Foreign(nano)).decoder


# A checkpoint's way into a model


def test_pixels_are_not_normalised_further(nano: dict[str, Tensor], model: DFine):
    weights = original.translated(Foreign(nano), model)
    assert weights["mean"].flatten().tolist() == [0, 0, 0]
    assert weights["std"].flatten().tolist() == [1, 1, 1]


def test_the_averaged_weights_are_taken_where_there_are_any(nano: dict[str, Tensor], model: DFine):
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in nano.items()}
    average |= {name: tensor for name, tensor in nano.items() if original.DERIVED.search(name)}
    weights = original.translated(original.opened({"model": nano, "ema": {"module": average, "updates": 1}}), model)
    assert weights["selection.norm.bias"].equal(average["decoder.enc_output.norm.bias"])


def test_frozen_batch_norms_count_no_batches(nano: dict[str, Tensor], model: DFine):
    frozen = {name: tensor for name, tensor in nano.items() if not name.endswith(original.COUNTER)}
    weights = original.translated(Foreign(frozen), model)
    assert weights.keys() == model.state_dict().keys()


def test_training_starts_from_a_published_checkpoint(nano_checkpoint: Path, model: DFine):
    """`model.init_from=PATH`"""
    said = loading.initialise(model, str(nano_checkpoint), [{"id": i, "name": str(i)} for i in range(80)])
    assert "the original implementation" in said
    assert "anew" not in said


def test_written_anchors_are_logits_and_those_that_touch_the_border_infinite():
    """As the original computes them at 640x640 pixels: none within 0.01 of an edge is valid."""
    model = tiny_model()
    state = original.state_of(model, model.config)
    anchors, valid = state["decoder.anchors"][0], state["decoder.valid_mask"][0]
    assert (anchors[0] == torch.inf).all()
    torch.testing.assert_close(anchors[81].sigmoid(), torch.tensor([1.5 / 80, 1.5 / 80, 0.05, 0.05]))
    assert valid[:, 0].equal(anchors.isfinite().all(1))


# Whole or not at all


def test_only_the_originals_checkpoints_are_official(nano: dict[str, Tensor]):
    assert original.is_official({"model": nano})
    assert original.is_official({"ema": {"module": nano}})
    ours = tiny_model().state_dict()
    assert not original.is_official({"model": ours, "ema": ours, "config": {}})
    assert not original.is_official({})


def test_everything_that_does_not_map_is_named(nano: dict[str, Tensor], model: DFine):
    broken = dict(nano)
    del broken["backbone.stem.stem1.lab.scale"]
    del broken["encoder.lateral_convs.0.norm.running_var"]
    broken["decoder.extra.weight"] = torch.zeros(1)
    broken["decoder.query_pos_head.layers.0.weight"] = torch.zeros(256, 5)
    with pytest.raises(ValueError, match="does not fit") as error:
        original.translated(Foreign(broken), model)
    lines = str(error.value).splitlines()[1:]
    assert sorted(lines) == [
        "backbone.body.stem.stem1.lab.scale has no counterpart",
        "decoder.extra.weight has no place",
        "decoder.query_pos_head.layers.0.weight (256, 5) does not fit decoder.position.0.weight (256, 4)",
        "encoder.laterals.0.1.running_var has no counterpart",
    ]


def test_a_model_of_another_architecture_is_refused(nano: dict[str, Tensor]):
    with pytest.raises(ValueError, match=r"encoder\.lateral_convs\.0\.conv\.weight \(128, 128, 1, 1\) does not fit"):
        original.translated(Foreign(nano), tiny_model(classes=80))


def test_copies_of_a_number_must_agree(nano: dict[str, Tensor], model: DFine):
    twisted = nano | {"decoder.decoder.reg_scale": torch.tensor([8])}
    with pytest.raises(ValueError, match=r"decoder\.decoder\.reg_scale is not decoder\.reg_scale"):
        original.translated(Foreign(twisted), model)
    name = "decoder.decoder.layers.1.cross_attn.num_points_scale"
    twisted = nano | {name: torch.tensor([1 / 8] * 8 + [1 / 4] * 4)}
    with pytest.raises(ValueError, match=re.escape(f"{name} has the points [8, 4], layer 0 has [6, 6]")):
        original.translated(Foreign(twisted), model)


@pytest.mark.parametrize("name", ["decoder.up", "decoder.enc_output.proj.weight", "backbone.stem.stem1.conv.weight"])
def test_an_architecture_that_cannot_be_read_is_said(name: str, nano: dict[str, Tensor]):
    with pytest.raises(ValueError, match=rf"lacks {re.escape(name)}|no HGNetV2"):
        original.architecture(Foreign({key: tensor for key, tensor in nano.items() if key != name}))
