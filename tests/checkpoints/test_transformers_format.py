"""Published weights: read whole and exactly or refused in one line, started from by name, and given back."""

import copy
import importlib.util
import json
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from published import (
    RECORDED,
    RECORDED_ON_TIMM,
    noise,
    publish_recorded,
    publish_size,
    recorded,
    their_answers,
    their_detections,
)
from safetensors.torch import load, load_file, save_file
from tiny import drawn_page, tiny_config, tiny_model
from torch import Tensor

import dfine
from dfine import config as configs
from dfine.checkpoints import hub, original, ours, transformers_format
from dfine.checkpoints.loading import initialise, load_model, load_teacher, matched
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError, DataConfig, DenoisingConfig, DistillConfig, override
from dfine.model.detector import DFine, class_dependent
from dfine.training import engine

Loaded = tuple[DFine, Config, list[dict[str, Any]]]
NAMES = ["Text", "Section-header", "List-item"]
WEIGHT = "model.enc_output.0.weight"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_recorded(tmp_path_factory.mktemp("published"))


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture
def on_timm(tmp_path: Path) -> Path:
    """The recorded model around a ConvNeXt of timm, as transformers 5 writes it."""
    return publish_recorded(tmp_path / "on_timm", RECORDED_ON_TIMM)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    """The recorded model as it is read; to look at."""
    return load_model(folder)


def answers(model: DFine, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Of the last layer, in float64: there no two queries change places for a rounding error."""
    with torch.inference_mode():
        refined = copy.deepcopy(model).double()(pages).refined
    return refined.logits[-1], refined.boxes[-1]


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert (got[0] - expected[0]).abs().max() <= 2e-5 * expected[0].abs().max()
    assert (got[1] - expected[1]).abs().max() <= 5e-6


def categories(*names: str) -> list[dict[str, Any]]:
    return [{"id": 10 + i, "name": name} for i, name in enumerate(names)]


# Read


def test_the_recorded_model_gives_the_recorded_answers_on_pages_that_are_not_square(loaded: Loaded) -> None:
    """transformers' positions are row-major, as ours are: the original's would differ here."""
    model = loaded[0]
    assert not model.training
    expected = recorded()
    check(answers(model, noise(96, 160)), (torch.tensor(expected["logits"]), torch.tensor(expected["boxes"])))


def test_what_is_known_of_a_published_model(folder: Path, loaded: Loaded) -> None:
    _, config, classes = loaded
    assert classes == [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    assert (config.data.sizing, config.data.eval_short_edge, config.data.squash_aspect) == ("squash", 640, 1)
    assert (config.model.mean, config.model.std) == ((0, 0, 0), (1, 1, 1))
    assert (config.model.backbone.name, config.model.strides) == ("hgnetv2_b0", (16, 32))
    assert (config.model.decoder.queries, config.model.decoder.points) == (20, (3, 2))
    scale = load_file(folder / "model.safetensors")["model.decoder.reg_scale"]
    assert config.model.decoder.c == pytest.approx(1 / scale.item())  # config.json says 4


def test_a_file_alone_knows_its_classes_by_number(folder: Path, loaded: Loaded) -> None:
    model, config, classes = load_model(folder / "model.safetensors")
    assert [category["name"] for category in classes] == ["0", "1", "2"]
    assert config.data == original.SQUASHED
    same = loaded[0].state_dict()
    assert all(tensor.equal(same[name]) for name, tensor in model.state_dict().items())


def test_classes_go_by_their_numbers_whatever_their_order_in_the_json(own: Path) -> None:
    """transformers sorts keys: 10 comes before 2."""
    change(own / "config.json", id2label={str(i): NAMES[i] for i in (2, 0, 1)})
    assert load_model(own)[2] == [{"id": i, "name": name} for i, name in enumerate(NAMES)]


def test_pages_are_sized_and_normalised_as_preprocessor_config_says(own: Path) -> None:
    change(own / "preprocessor_config.json", size={"height": 480, "width": 640}, do_normalize=True)
    model, config, _ = load_model(own)
    assert (config.data.eval_short_edge, config.data.squash_aspect) == (480, 0.75)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    change(own / "preprocessor_config.json", size={"shortest_edge": 480, "longest_edge": 800})
    with pytest.warns(UserWarning, match="truncates sides"):
        data = load_model(own)[1].data
    assert (data.sizing, data.eval_short_edge, data.max_long_edge) == ("keep_aspect", 480, 800)


@pytest.mark.parametrize("version", [4, 5])
def test_a_model_on_a_backbone_of_timm_gives_the_recorded_answers(version: int, on_timm: Path) -> None:
    """transformers 4 and 5 have the backbone at other places of config.json."""
    if version == 4:
        flags = {"use_timm_backbone": True, "backbone": "test_convnext", "backbone_kwargs": {"out_indices": [-3, 2, 3]}}
        change(on_timm / "config.json", backbone_config=None, **flags)
    model, config, _ = load_model(on_timm)
    assert (config.model.backbone.name, config.model.backbone.pretrained) == ("test_convnext", False)
    assert config.model.strides == (8, 16, 32)
    expected = recorded(RECORDED_ON_TIMM)
    check(answers(model, noise(96, 160)), (torch.tensor(expected["logits"]), torch.tensor(expected["boxes"])))


@pytest.mark.parametrize(
    ("size", "more", "said"),
    [
        ({"height": 64, "width": 96}, {"do_pad": True}, ()),  # all pages have one size, and there is nothing to pad
        ({"height": 64, "width": 96}, {"do_pad": True, "pad_size": {"height": 64, "width": 96}}, ()),
        ({"height": 64, "width": 96}, {"do_pad": True, "pad_size": {"height": 96, "width": 96}}, ("to 96x96",)),
        ({"height": 64, "width": 96}, {"do_pad": False, "pad_size": {"height": 96, "width": 96}}, ()),
        ({"shortest_edge": 64, "longest_edge": 96}, {}, ("truncates sides",)),
        ({"shortest_edge": 64, "longest_edge": 96}, {"do_pad": True}, ("truncates sides", "the largest page of a")),
        (
            {"shortest_edge": 64, "longest_edge": 96},
            {"do_pad": True, "pad_size": {"height": 96, "width": 96}},
            ("truncates sides", "padded there to 96x96, and boxes are fractions of that"),
        ),
    ],
)
def test_what_is_not_done_exactly_as_there_is_said_once(
    size: dict[str, int], more: dict[str, Any], said: tuple[str, ...], own: Path
) -> None:
    change(own / "preprocessor_config.json", size=size, **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_model(own)[1].data
    assert data.eval_short_edge == 64
    assert len(caught) == bool(said)
    for text in said:
        assert text in str(caught[0].message)
        assert str(caught[0].message).startswith(f"{own / 'preprocessor_config.json'}: ")


def test_pages_are_normalised_with_imagenets_mean_unless_the_file_has_another(own: Path) -> None:
    (own / "preprocessor_config.json").write_text('{"do_normalize": true}')  # transformers fills in the rest
    torch.testing.assert_close(load_model(own)[0].std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    change(own / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    torch.testing.assert_close(load_model(own)[0].mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


def copied(folder: Path) -> dict[str, Tensor]:
    """The tensors apart from their file, which may be overwritten then."""
    return load((folder / "model.safetensors").read_bytes())


def test_names_in_memory_copies_of_heads_and_half_precision_are_read_too(own: Path, loaded: Loaded) -> None:
    state = copied(own)
    heads = {
        name.removeprefix("model.decoder."): x.clone() for name, x in state.items() if "decoder.class_embed" in name
    }
    for memory, file in transformers_format.IN_MEMORY.items():
        state = {name.replace(file, memory): x for name, x in state.items()}
    assert any(".mlp.layers.1." in name for name in state)
    assert any(".aifi.0." in name for name in state)
    save_file(state | heads, own / "model.safetensors")
    expected = loaded[0].state_dict()
    assert all(x.equal(expected[name]) for name, x in load_model(own)[0].state_dict().items())
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in state.items()}
    save_file(half, own / "model.safetensors")
    assert load_model(own)[0].selection.project.bias.dtype == torch.float32


def test_weights_without_a_denoising_embedding_detect_and_it_is_said(own: Path) -> None:
    rewrite(own, lambda state: state.pop("model.denoising_class_embed.weight"))
    with pytest.warns(UserWarning, match="no denoising embedding"):
        model = load_model(own)[0]
    said = initialise(model, str(own), categories(*NAMES))
    assert said.endswith("start anew: denoising_labels.weight")


# Refused


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    state = copied(folder)
    edit(state)
    save_file(state, folder / "model.safetensors")


def set_header(folder: Path, **values: Any) -> None:
    """Lets the header say something else about one tensor."""
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[WEIGHT] |= values
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def refusal(name: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(name)
    text = str(error.value)
    assert text.startswith(str(name))
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "rt_detr_v2"}, "'rt_detr_v2': another model than D-FINE"),
        ({"decoder_layers": 4}, "contradicts model.safetensors: decoder_layers is 4, the model has 2"),
        ({"d_model": 64}, "d_model is 64, the model has 32"),
        ({"max_num_bins": 16}, "max_num_bins is 16, the model has 32"),
        ({"depth_mult": 1.0}, "depth_mult is 1.0"),
        ({"hidden_expansion": 1.0}, "hidden_expansion is 1.0"),
        ({"decoder_n_points": 4}, "decoder_n_points is [4, 4], the model has [3, 2]"),
        ({"activation_function": "relu"}, "activation_function is 'relu', the model has 'silu'"),
        ({"backbone_config": {"stage_num_blocks": [1, 1, 3, 1]}}, "backbone_config.stage_num_blocks is [1, 1, 3, 1]"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            "id2label must name the classes 0 to 2 of model.safetensors, found 2 names",
        ),
        ({"id2label": None, "num_labels": 7}, "found num_labels=7"),
        ({"num_queries": "300"}, "num_queries must be a whole number"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_named(values: dict[str, Any], message: str, own: Path) -> None:
    change(own / "config.json", **values)
    text = refusal(own)
    assert text.startswith(f"{own / 'config.json'}: ")
    assert message in text


BATCH_NORMS = {"backbone": "test_efficientnet", "out_indices": [2, 3, 4]}


@pytest.mark.parametrize(
    ("backbone", "values", "message"),
    [
        ({"backbone": "convnext_ato"}, {}, "timm {version} cannot make the backbone 'convnext_ato'"),
        ({"out_indices": [2, 3]}, {}, "out_indices must be the numbers of 3 maps, found [2, 3]"),
        ({"out_indices": None}, {}, "out_indices must be the numbers of 3 maps, found None"),
        ({"out_indices": [2, 3, 4]}, {}, "out_indices are [2, 3, 4], test_convnext has 4 maps"),
        ({"backbone": "test_vit", "out_indices": [0, 1, 2]}, {}, "of each stride dfine takes the first map, [0, 0, 0]"),
        ({"num_channels": 1}, {}, "contradicts model.safetensors: backbone_config.num_channels is 1, the model has 3"),
        ({"output_stride": 16}, {}, "backbone_config.output_stride is 16, the model has None"),
        (BATCH_NORMS, {}, "8 of its 12 batch norms are timm's BatchNormAct2d, whose activations are lost"),
        (BATCH_NORMS, {"freeze_backbone_batch_norms": False}, None),
        (BATCH_NORMS | {"freeze_batch_norm_2d": True}, {}, None),
        ({"backbone": "inception_v4", "out_indices": [2, 3, 4]}, {}, "its batch norms have eps 0.001, and 1e-05 where"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, {}, "its maps have their channels last"),
        ({"backbone": "convnext_atto"}, {}, None),
    ],
)
def test_a_backbone_of_timm_that_is_not_the_same_there_is_refused(
    backbone: dict[str, Any], values: dict[str, Any], message: str | None, on_timm: Path
) -> None:
    """None: it would be, but the weights are of another."""
    settings = json.loads((on_timm / "config.json").read_text())
    change(on_timm / "config.json", backbone_config=settings["backbone_config"] | backbone, **values)
    text = refusal(on_timm)
    if message is None:
        assert text.startswith(f"{on_timm / 'model.safetensors'}: ")
        assert "model.backbone.model._backbone." in text
    else:
        assert text.startswith(f"{on_timm / 'config.json'}: ")
        assert message.format(version=timm.__version__) in text


def test_batch_norms_are_frozen_there_unless_the_json_says_otherwise(on_timm: Path) -> None:
    settings = json.loads((on_timm / "config.json").read_text())
    del settings["freeze_backbone_batch_norms"]
    settings["backbone_config"] |= BATCH_NORMS
    (on_timm / "config.json").write_text(json.dumps(settings))
    assert "whose activations are lost where transformers freezes them" in refusal(on_timm)


def test_a_file_alone_does_not_name_its_backbone_of_timm(on_timm: Path) -> None:
    assert "only a config.json in the same folder can say which backbone" in refusal(on_timm / "model.safetensors")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_pad": True, "pad_size": {"height": 96, "width": 96}}, "do not fit into pad_size"),
        ({"size": {"shortest_edge": 480}}, "cannot be followed (KeyError: 'longest_edge')"),
        ({"size": {"max_height": 480, "max_width": 480}}, "cannot be followed"),
        ({"do_normalize": True, "image_std": [1, 1, 0]}, "model.std: must be three positive numbers"),
        ({"image_processor_type": "YolosImageProcessor"}, 'image_processor_type must be "RTDetrImageProcessor"'),
        ({"resample": 3}, "resample must be 2, found 3"),
        ({"do_rescale": False}, "do_rescale must be true, found False"),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(values: dict[str, Any], message: str, own: Path) -> None:
    change(own / "preprocessor_config.json", **values)
    text = refusal(own)
    assert text.startswith(f"{own / 'preprocessor_config.json'}: ")
    assert message in text


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("model.decoder.layers.1.fc1.weight"), "model.decoder.layers.1.fc1.weight is missing"),
        (lambda s: s.pop("model.decoder.layers.1.self_attn.k_proj.weight"), "lacks model.decoder.layers.1.self_attn.k"),
        (lambda s: s.pop("model.decoder.reg_scale"), "lacks model.decoder.reg_scale"),
        (lambda s: s.update({"model.decoder.extra": torch.zeros(1)}), "no place, such as model.decoder.extra"),
        (lambda s: s.update({"a.value_proj.weight": torch.zeros(1)}), "looks like RT-DETR's"),
        (lambda s: s.update({"class_embed.0.bias": torch.zeros(3)}), "class_embed.0.bias is there twice"),
        (lambda s: s.update({WEIGHT: torch.full((32, 32), torch.nan)}), f"{WEIGHT} is not finite"),
        (lambda s: s.update({WEIGHT: torch.zeros(32, 31)}), f"{WEIGHT} (32, 31) does not fit"),
        (lambda s: s.update({"model.decoder.up": torch.zeros(1)}), "model.decoder.up must be one number other than 0"),
        (
            lambda s: s.update({"model.decoder.layers.0.encoder_attn.num_points_scale": torch.full((5,), 0.3)}),
            "num_points_scale must hold 1 / p",
        ),
        (
            lambda s: s.update({"model.backbone.model.embedder.stem1.convolution.weight": torch.zeros(8, 3, 3, 3)}),
            "no HGNetV2 with",
        ),
    ],
)
def test_tensors_that_are_not_a_whole_dfine_are_named(edit: Any, message: str, own: Path) -> None:
    rewrite(own, edit)
    text = refusal(own)
    assert text.startswith(f"{own / 'model.safetensors'}: ")
    assert message in text


def test_deimv2_is_refused_by_its_name(tmp_path: Path) -> None:
    """Its tensors are called as the original's, but for what is new."""
    state = {
        "decoder.enc_score_head.weight": torch.zeros(3, 8),
        "decoder.decoder.layers.0.swish_ffn.w3.bias": torch.ones(1),
    }
    save_file(state, tmp_path / "model.safetensors")
    assert "it is DEIMv2's" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "values",
    [{"shape": [32, 33]}, {"dtype": "I32"}, {"data_offsets": [0, 4]}, {"dtype": "F9"}, {"shape": [2**40, 2**40]}],
)
def test_a_header_that_lies_is_refused(values: dict[str, Any], own: Path) -> None:
    set_header(own, **values)
    assert refusal(own).startswith(f"{own / 'model.safetensors'}: ")


@pytest.mark.parametrize("content", [b"", b"hello", struct.pack("<Q", 2**60) + b"{}"])
def test_what_is_no_safetensors_is_refused(content: bytes, own: Path) -> None:
    (own / "model.safetensors").write_bytes(content)
    assert "damaged or not safetensors" in refusal(own)


def test_files_that_are_missing_or_unreadable_are_named(own: Path, tmp_path: Path) -> None:
    (own / "preprocessor_config.json").write_text("{")
    assert refusal(own).startswith(f"{own / 'preprocessor_config.json'}: not JSON")
    (own / "preprocessor_config.json").write_text('{"resample": 3}')
    assert "resample must be 2, found 3" in refusal(own)
    (own / "config.json").write_text("[]")
    assert refusal(own).startswith(f"{own / 'config.json'}: must hold keys and values")
    (own / "config.json").unlink()
    assert "a folder without config.json" in refusal(own)
    assert "no such checkpoint" in refusal(tmp_path / "none.safetensors")


# On the hub


def test_a_name_on_the_hub_is_fetched_and_its_revision_asked_for(
    folder: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(repository: str, **more: Any) -> str:
        asked.append((repository, more["revision"]))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_model("org/egret-medium")[2] == load_model("org/egret-medium@v1.0")[2] == loaded[2]
    assert asked == [("org/egret-medium", None), ("org/egret-medium", "v1.0")]
    shutil.copytree(folder, tmp_path / "org/egret-medium")
    load_model("org/egret-medium")
    assert len(asked) == 2  # a path that exists comes first


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("client closed"), ValueError("")])
def test_without_network_it_says_which_files_to_fetch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    text = refusal("org/name@main")
    assert "fetch config.json, model.safetensors, preprocessor_config.json of org/name@main elsewhere" in text


@pytest.mark.parametrize("name", ["name", "a/b/c", "/no/folder"])
def test_what_is_neither_a_path_nor_a_name_is_said(name: str) -> None:
    assert "neither a file or folder here nor a name on the Hugging Face hub" in refusal(name)


# Started from


def start(
    folder: Path, loaded: Loaded, *names: str, match_classes: bool = True
) -> tuple[DFine, dict[str, Tensor], str]:
    """A new model from a folder's weights, what it was before, and what is said."""
    torch.manual_seed(0)
    model = DFine(loaded[1].model, len(names))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, before, initialise(model, str(folder), categories(*names), match_classes)


def test_classes_of_the_same_name_keep_their_rows_and_the_rest_start_anew(folder: Path, loaded: Loaded) -> None:
    model, before, said = start(folder, loaded, "table", "list item", "TEXT", "title")
    after, theirs = model.state_dict(), loaded[0].state_dict()
    for name in class_dependent(model):
        assert after[name][[1, 2]].equal(theirs[name][[2, 0]])
        assert after[name][[0, 3]].equal(before[name][[0, 3]])
    assert after["denoising_labels.weight"][4].equal(theirs["denoising_labels.weight"][3])  # padding
    assert all(after[name].equal(theirs[name]) for name in after if name not in class_dependent(model))
    assert "start anew: table, title in " in said
    assert "keep their rows: list item (List-item), TEXT (Text)" in said
    assert "not taken: Section-header" in said


def test_all_is_loaded_where_the_classes_are_the_same(folder: Path, loaded: Loaded) -> None:
    for match_classes in (True, False):
        model, _, said = start(folder, loaded, *NAMES, match_classes=match_classes)
        theirs = loaded[0].state_dict()
        assert all(tensor.equal(theirs[name]) for name, tensor in model.state_dict().items())
        assert said.endswith(f"loaded {len(theirs)} of {len(theirs)} tensors")


def test_matching_can_be_switched_off(folder: Path, loaded: Loaded) -> None:
    model, before, said = start(folder, loaded, "Text", "List-item", match_classes=False)
    assert all(model.state_dict()[name].equal(before[name]) for name in class_dependent(model))
    assert f"start anew: {', '.join(class_dependent(model))}" in said


def test_numbered_classes_are_taken_in_order_if_there_are_as_many(folder: Path, loaded: Loaded) -> None:
    for names, kept in ((("a", "b", "c"), True), (("0", "1"), False)):
        model, before, said = start(folder / "model.safetensors", loaded, *names)
        same = model.selection.class_head.bias.equal(before["selection.class_head.bias"])
        assert same is not kept
        assert ("start anew" in said) is not kept
        assert "3 classes by number" in said


def test_names_that_occur_twice_are_matched_one_by_one() -> None:
    assert matched(["text", "Text", "table"], ["Text", "table", "TEXT", "text"]) == [0, 2, 1, None]
    assert matched([], ["a"]) == [None]


def test_a_checkpoint_of_a_run_keeps_rows_by_name_too(tmp_path: Path) -> None:
    """PubLayNet's Title and Table into DocLayNet."""
    teacher, student = tiny_model(3), tiny_model(2)
    content = ours.weights(Config(model=tiny_config()), categories("title", "list", "table"), teacher)
    ours.save(tmp_path / "best.pt", content)
    said = initialise(student, str(tmp_path / "best.pt"), categories("Table", "Title"))
    assert student.selection.class_head.weight.equal(teacher.selection.class_head.weight[[2, 0]])
    assert "keep their rows: Table (table), Title (title)\n  not taken: list" in said


def test_a_published_model_teaches_those_of_its_classes_that_the_student_has(folder: Path, loaded: Loaded) -> None:
    teacher, config, _ = loaded
    student = Config(model=config.model, distill=DistillConfig(teacher=str(folder)))
    taught = load_teacher(student, "student.yaml", categories("text", "list-item"))
    whole, some = answers(teacher, noise(96, 160)), answers(taught, noise(96, 160))
    assert some[0].shape == (2, 20, 2)
    assert whole[0].shape == (2, 20, 3)
    assert taught.denoising_labels.weight.equal(
        teacher.denoising_labels.weight[[0, 2, 3]]
    )  # the last is of padded slots
    turned = answers(load_teacher(student, "student.yaml", categories("List-item", "Text")), noise(96, 160))
    torch.testing.assert_close(turned[0].flip(-1), some[0])
    torch.testing.assert_close(turned[1], some[1])
    with pytest.raises(ConfigError, match="knows the classes Text, Section-header, List-item"):
        load_teacher(student, "student.yaml", categories("Text", "Table"))


def test_a_run_starts_from_a_model_on_a_backbone_of_timm(on_timm: Path) -> None:
    theirs, config, _ = load_model(on_timm)
    settings = override(config, [f"model.init_from={on_timm}"])
    model = engine.build(settings, categories("Text", "Table", "List item"), torch.device("cpu"), resumed=False)
    for name, tensor in model.state_dict().items():
        rows = [0, 2] if name in class_dependent(model) else ...  # those of Text and List-item
        assert tensor[rows].equal(theirs.state_dict()[name][rows])


def test_a_student_is_taught_by_a_model_on_a_backbone_of_timm(on_timm: Path) -> None:
    theirs, config, _ = load_model(on_timm)
    settings = override(config, [f"distill.teacher={on_timm}", "model.decoder.layers=3"])
    teacher = load_teacher(settings, "student.yaml", categories("List-item", "text", "Section-Header"))
    logits, boxes = answers(theirs, noise(96, 160))
    check(answers(teacher, noise(96, 160)), (logits[..., [2, 0, 1]], boxes))


# Given back


def test_what_is_written_is_read_back_as_it_was(folder: Path, loaded: Loaded, tmp_path: Path) -> None:
    model, config, classes = loaded
    transformers_format.write(tmp_path / "out", model, config, classes)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    again, its_config, its_classes = load_model(tmp_path / "out")
    assert (its_config, its_classes) == (config, classes)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_backbone_of_timm_is_written_so_that_transformers_4_reads_it_too(on_timm: Path, tmp_path: Path) -> None:
    model, config, classes = load_model(on_timm)
    transformers_format.write(tmp_path / "out", model, config, classes)
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(on_timm / "model.safetensors").keys()
    backbone = {"model_type": "timm_backbone", "backbone": "test_convnext", "out_indices": [1, 2, 3]}
    written = json.loads((tmp_path / "out/config.json").read_text())["backbone_config"]
    assert written == backbone | {"use_pretrained_backbone": False}  # it knows no out_features
    again, its_config, its_classes = load_model(tmp_path / "out")
    assert (its_config, its_classes) == (config, classes)
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_config_json_says_how_a_model_was_trained_for_those_who_train_on(tmp_path: Path) -> None:
    noise = DenoisingConfig(queries=7, label_noise=0.25, box_noise=0.75)
    config = tiny_config((16, 32), c=0.125, a=0.75, points=(2, 1)).model_copy(update={"denoising": noise})
    whole = Config(model=config, data=original.SQUASHED)
    transformers_format.write(tmp_path, DFine(config, 3), whole, categories("a", "b", "c"))
    written = json.loads((tmp_path / "config.json").read_text())
    expected = {"num_denoising": 7, "label_noise_ratio": 0.5, "box_noise_scale": 0.75, "up": 0.75, "reg_scale": 8}
    assert {key: written[key] for key in expected} == expected
    assert (written["feat_strides"], written["num_feature_levels"]) == ([16, 32], 2)


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.75])
def test_pages_are_prepared_alike_after_the_way_there_and_back(aspect: float, loaded: Loaded, tmp_path: Path) -> None:
    model, config, classes = copy.deepcopy(loaded)
    model.mean.fill_(0.5)
    edges = {"short_edges": (192,), "eval_short_edge": 192, "max_long_edge": 928}
    data = DataConfig(sizing="squash", squash_aspect=aspect, **edges)
    transformers_format.write(tmp_path, model, config.model_copy(update={"data": data}), classes)
    again, its_config, _ = load_model(tmp_path)
    assert its_config.data.squash_aspect == pytest.approx(aspect)
    assert its_config.data == data.model_copy(update={"squash_aspect": its_config.data.squash_aspect})
    assert again.mean.equal(model.mean)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("test_efficientnet", "8 of its 12 batch norms are timm's BatchNormAct2d, whose activations are lost"),
        ("test_vit", "test_vit has one stride, of which transformers makes no pyramid"),
        ("mambaout_femto", "its maps have their channels last"),
    ],
)
def test_a_backbone_with_which_transformers_would_compute_something_else_is_not_written(
    backbone: str, message: str, tmp_path: Path
) -> None:
    model = tiny_model(backbone=backbone)
    config = Config(model=model.config, data=original.SQUASHED)
    with pytest.raises(CheckpointError, match=f"the layout of transformers cannot express this model: .*{message}"):
        transformers_format.write(tmp_path / "out", model, config, categories("a", "b", "c"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, r"pages keep their aspect \(data.sizing\), .* data.sizing=squash data.squash_aspect=1.45"),
        ({"sizing": "squash", "squash_aspect": 1.414}, "pages are 905x640: .* multiples of 32, such as 896x640"),
    ],
)
def test_sizes_of_pages_that_transformers_cannot_give_its_model_are_refused(
    data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = Config(model=tiny_config(), data=DataConfig(**data))
    with pytest.raises(CheckpointError, match=message):
        transformers_format.write(tmp_path / "out", tiny_model(), config, categories("a", "b", "c"))
    assert not (tmp_path / "out").exists()


def test_the_originals_file_has_the_originals_names_and_reads_back(loaded: Loaded, golden_folder: Path) -> None:
    """The recorded model has a decoder layer less than nano, and as many blocks."""
    nano = json.loads((golden_folder / "15_state_dict_keys.json").read_text())["n"]["state"]
    model, config, _ = loaded
    state = original.state_of(model, config.model)
    third = re.compile(r"decoder\.(decoder\.layers|decoder\.lqe_layers|dec_score_head|dec_bbox_head)\.2\.")
    assert state.keys() == {name for name, *_ in nano if not third.match(name)}
    assert state["decoder.anchors"].shape == (1, 2000, 4)
    assert state["decoder.valid_mask"].shape == (1, 2000, 1)
    weights = original.translated(original.Foreign(state), model)
    assert "denoising_labels.weight" in weights
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in weights.items())


# Exact: beside transformers

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers (the extra bench)"
)
SHAPES = {"n": (256, 320), "s": (192, 128), "m": (96, 160), "l": (160, 96), "x": (96, 160)}


@needs_transformers
def test_the_recorded_answers_are_those_of_the_installed_transformers(folder: Path) -> None:
    expected = recorded()
    check(their_answers(folder, noise(96, 160)), (torch.tensor(expected["logits"]), torch.tensor(expected["boxes"])))


def in_both_directions(theirs: Path, pages: Tensor) -> str:
    """Reads a folder, writes it back, and checks that all three answer alike; how far they are apart, for people."""
    model, config, classes = load_model(theirs)
    transformers_format.write(theirs.parent / "ours", model, config, classes)
    got, expected = answers(model, pages), their_answers(theirs, pages)
    check(got, expected)
    check(got, their_answers(theirs.parent / "ours", pages))
    logits, boxes = ((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
    return f"logits {logits:.1e} of {got[0].abs().max():.1f}, boxes {boxes:.1e}"


@needs_transformers
@pytest.mark.parametrize("size", SHAPES)
def test_a_random_model_answers_alike_here_and_there_in_both_directions(
    size: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Pages are not square; every parameter and statistic is random. Sizes: see `--sizes`."""
    if size not in request.config.getoption("--sizes"):
        pytest.skip("takes half a minute: pytest --sizes nsmlx")
    theirs = publish_size(tmp_path / "theirs", size, [f"class {i}" for i in range({"n": 80, "x": 366}.get(size, 17))])
    stored = len(load_file(theirs / "model.safetensors"))
    print(f"{size}: {stored} tensors; {in_both_directions(theirs, noise(*SHAPES[size])[:1])}")


@needs_transformers
@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "resnet18"])
def test_a_random_model_on_timm_answers_alike_here_and_there_in_both_directions(name: str, tmp_path: Path) -> None:
    theirs = publish_size(tmp_path / "theirs", name, [f"class {i}" for i in range(7)])
    print(f"{name}: {in_both_directions(theirs, noise(128, 192)[:1])}")


@needs_transformers
@pytest.mark.parametrize(
    "overrides",
    [
        [],  # the quickstart's
        [
            "model.backbone.name=repvgg_a0"
        ],  # names that an HGNetV2 has too, and batch norms of timm's, without activation
        ["model.decoder.bins=16", "model.denoising.queries=0", "model.encoder.hidden_dim=64"],
        ["model.strides=[4, 8, 16]", "model.backbone.name=convnext_atto"],
    ],
)
def test_a_model_of_a_run_answers_alike_there(overrides: list[str], tmp_path: Path) -> None:
    config = configs.load(QUICKSTART, [*overrides, "data.sizing=squash"])
    torch.manual_seed(3)
    model = DFine(config.model, 5).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("mean", "std"):
            tensor.mul_(1 + 0.3 * torch.rand_like(tensor)).add_(0.05 * torch.randn_like(tensor).abs())
    transformers_format.write(tmp_path, model, config, categories("a", "b", "c", "d", "e"))
    pages = noise(128, 192)[:1]
    got = answers(model, pages)
    check(got, their_answers(tmp_path, model.normalise(pages, None)))
    assert got[0].std() > 0.01


PAGES = {"A4": (842, 595), "letter": (792, 612), "square": (640, 640), "landscape": (540, 960), "small": (60, 50)}


@needs_transformers
@pytest.mark.parametrize("shape", PAGES)
@pytest.mark.parametrize("recorded_file", [RECORDED, RECORDED_ON_TIMM], ids=["HGNetV2", "ConvNeXt"])
def test_pages_of_any_shape_have_the_same_boxes_there(recorded_file: Path, shape: str, tmp_path: Path) -> None:
    """Prepared, answered and given back by transformers alone, beside `dfine.load` of a run's checkpoint."""
    model, config, classes = load_model(publish_recorded(tmp_path / "recorded", recorded_file))
    model.mean.copy_(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    sizing = ["data.short_edges=[128]", "data.eval_short_edge=128", "data.squash_aspect=1.5"]
    config = override(config, sizing)
    ours.save(tmp_path / "best.pt", ours.weights(config, classes, model))
    transformers_format.write(tmp_path / "there", model, config, classes)
    page = drawn_page(*PAGES[shape])
    scores, labels, boxes = their_detections(tmp_path / "there", page)
    found = dfine.load(tmp_path / "best.pt", "cpu")(page, threshold=0, dedupe=1)
    height, width = page.shape[:2]
    on_page = boxes.clip(0, [width, height, width, height])  # as ours are
    np.testing.assert_allclose(found.scores[: len(scores)], scores, atol=2e-3)  # pixels: a grey level in 255
    for score, label, box in zip(scores[:10], labels, on_page, strict=False):  # some scores are nearly equal
        same = (found.classes == label) & (abs(found.boxes - box).max(1) < 1e-3 * max(height, width))
        assert abs(found.scores[same] - score).min() < 2e-3
