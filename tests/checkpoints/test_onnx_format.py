"""ONNX files say what the model says, and run without it."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import pages as coloured
from timm.layers import Conv2dSame
from tiny import drawn_page, shaken, tiny_config, tiny_model
from torch import Tensor, nn

import dfine
import evaluate
from dfine import config as configs
from dfine import export, predict
from dfine.checkpoints import onnx_format, ours
from dfine.checkpoints.onnx_format import OnnxModel
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError, DataConfig
from dfine.inference.evaluation import answer
from dfine.model.detector import DFine
from dfine.structures import Detections

REASON = "needs the extra: pip install 'dfine[export]'"
onnx, onnx_ir = (pytest.importorskip(name, reason=REASON) for name in ("onnx", "onnx_ir"))
pytest.importorskip("onnxruntime", reason=REASON)
ROOT = Path(__file__).parents[2]
CATEGORIES = [{"id": 3, "name": "text"}, {"id": 5, "name": "figure"}, {"id": 9, "name": "table"}]
MODEL = tiny_config(backbone="test_resnet", layers=2)
DATA = DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96, workers=0)


def model() -> DFine:
    return shaken(tiny_model(backbone="test_resnet", layers=2)).eval()


def depthwise() -> DFine:
    return shaken(tiny_model(backbone="test_convnext", layers=2)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the ONNX file that `python -m dfine.export` makes of it."""
    folder = tmp_path_factory.mktemp("run")
    best, exported = folder / "best.pt", folder / "new" / "model.onnx"
    ours.save(best, ours.weights(Config(model=MODEL, data=DATA), CATEGORIES, model()))
    with pytest.MonkeyPatch.context() as patch:
        line = ["export", "--checkpoint", best, "--format", "onnx", "--out", exported]
        patch.setattr(sys, "argv", list(map(str, line)))
        export.main()
    return best, exported


@pytest.fixture(scope="module")
def half_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another model: ConvNeXt's layer norms and depthwise convolutions have types of their own."""
    path = tmp_path_factory.mktemp("half") / "half.onnx"
    onnx_format.write(path, depthwise(), Config(model=depthwise().config, data=DATA), CATEGORIES, half=True)
    return path


def pages(height: int, width: int, count: int = 1) -> Tensor:
    """Smooth noise, (count, 3, height, width) uint8: paper has no sharper edges at each pixel."""
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(height + width))
    return (255 * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")).byte()


def check(found: Detections, expected: Detections, scores: float = 1e-4, boxes: float = 1e-3) -> None:
    """Asserts that the detections are the same: those of equal scores may have changed places.

    Args:
        scores, boxes: how far these may be off, boxes in pixels.
    """
    assert len(found.scores) == len(expected.scores)
    torch.testing.assert_close(found.scores, expected.scores, atol=scores, rtol=0)
    for score, label, box in zip(*expected, strict=True):
        like = (found.labels == label) & ((found.scores - score).abs() <= scores)
        near = (found.boxes[like] - box).abs().amax(-1)
        least = float(near.min()) if like.any() else float("inf")
        # The last ones may be others: there were more of that score than places.
        assert least <= boxes or score <= expected.scores[-1] + scores, f"{label} {score} {box}: {least} pixels off"


@pytest.mark.parametrize(
    ("canvas", "sizes"),
    [
        ((64, 96), [(64, 96)]),
        ((96, 64), [(90, 64), (96, 33), (65, 64)]),
        ((320, 320), [(300, 320)]),
        ((928, 640), [(905, 640)]),
        ((32, 32), [(20, 31)]),
        ((32, 32), [(6, 7)]),  # of fewer cells than queries
    ],
    ids=str,
)
def test_it_finds_what_the_model_finds_on_any_number_of_pages_of_any_shape(
    files: tuple[Path, Path], canvas: tuple[int, int], sizes: list[tuple[int, int]]
) -> None:
    images = pages(*canvas, len(sizes))
    originals = [(height * 3 // 2, width * 2) for height, width in sizes]
    found = OnnxModel(files[1])(images, torch.tensor(sizes), originals)
    with torch.inference_mode():
        expected = answer(model(), images, torch.tensor(sizes), originals)
    assert len(found) == len(sizes)
    for own, theirs in zip(found, expected, strict=True):
        assert len(theirs.scores) > 0
        check(own, theirs)


def test_pages_of_different_shapes_in_one_batch_are_answered_as_alone(files: tuple[Path, Path]) -> None:
    runtime, images = OnnxModel(files[1]), pages(96, 96, 3)
    sizes, originals = torch.tensor([[40, 96], [96, 64], [33, 90]]), [(80, 190), (96, 64), (33, 90)]
    images *= torch.stack([torch.outer(torch.arange(96) < h, torch.arange(96) < w) for h, w in sizes])[:, None]
    together = runtime(images, sizes, originals)
    for i, canvas in enumerate([(64, 96), (96, 64), (64, 96)]):
        (alone,) = runtime(images[i : i + 1, :, : canvas[0], : canvas[1]], sizes[i : i + 1], [originals[i]])
        check(together[i], alone, scores=1e-6, boxes=1e-4)


@pytest.mark.parametrize(
    ("canvas", "size"),
    [((90, 64), (90, 64)), ((96, 50), (96, 50)), ((96, 64), (64, 96)), ((96, 64), (300, 200)), ((96, 64), (0, 64))],
    ids=["height", "width", "width, height", "of the scan", "nothing"],
)
def test_another_runtime_fails_on_other_canvases_and_sizes_and_says_why(
    files: tuple[Path, Path], canvas: tuple[int, int], size: tuple[int, int]
) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(files[1]))
    feed = {"images": np.zeros((2, 3, *canvas), np.uint8), "sizes": np.array([(32, 32), size])}
    with pytest.raises(Exception, match=r"sides of images are no multiples of 32, or sizes are not \(height, width\)"):
        session.run(None, feed | {"originals": np.full((2, 2), 100)})


def test_the_metadata_say_what_the_labels_and_the_pages_are(files: tuple[Path, Path]) -> None:
    file = onnx.load(files[1])
    texts = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(texts["categories"]) == CATEGORIES
    said = json.loads(texts["preprocessing"])
    assert (said["short_edge"], said["max_long_edge"], said["multiple_of"]) == (64, 96, 32)
    assert configs.from_dict(json.loads(texts["config"])) == Config(model=MODEL, data=DATA)
    names = [(port.name, port.type.tensor_type.elem_type) for port in (*file.graph.input, *file.graph.output)]
    whole = onnx.TensorProto.INT64
    inputs = [("images", onnx.TensorProto.UINT8), ("sizes", whole), ("originals", whole)]
    assert names == [*inputs, ("scores", onnx.TensorProto.FLOAT), ("labels", whole), ("boxes", onnx.TensorProto.FLOAT)]


def test_squashed_pages_are_described_as_in_evaluation() -> None:
    """640 pixels wide, 896 high, whatever edges it was trained with."""
    data = DataConfig(sizing="squash", short_edges=(480, 512), eval_short_edge=640, squash_aspect=1.4)
    said = onnx_format.preprocessing(Config(model=MODEL, data=data), 32)
    assert (said["sizing"], said["short_edge"], said["height_by_width"]) == ("squash", 640, 1.4)


def test_deformable_attention_is_written_as_reads_of_four_cells(files: tuple[Path, Path]) -> None:
    kinds = {node.op_type for node in onnx.load(files[1]).graph.node}
    assert "GridSample" not in kinds  # TensorRT computes it wrongly
    assert "Gather" in kinds


STRANGER = """
import json, sys
import numpy as np, onnxruntime
from PIL import Image

page = np.array(Image.open(sys.argv[2]))  # (160, 128, 3)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
texts = session.get_modelmeta().custom_metadata_map
names = [category["name"] for category in json.loads(texts["categories"])]
said = json.loads(texts["preprocessing"])
assert said["sizing"] == "keep_aspect"
scale = min(said["short_edge"] / min(page.shape[:2]), said["max_long_edge"] / max(page.shape[:2]))
height, width = (round(side * scale) for side in page.shape[:2])
assert (height, width) == (80, 64)  # half the page: areas are averaged
small = np.floor(page.reshape(height, 2, width, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8)
canvas = [-(-side // said["multiple_of"]) * said["multiple_of"] for side in (height, width)]
images = np.zeros((1, 3, *canvas), np.uint8)
images[0, :, :height, :width] = small.transpose(2, 0, 1)
feed = {"images": images, "sizes": np.array([[height, width]]), "originals": np.array([page.shape[:2]])}
scores, labels, boxes = (answer[0] for answer in session.run(["scores", "labels", "boxes"], feed))
assert not {"dfine", "torch"} & sys.modules.keys()
print(json.dumps([scores.tolist(), [names[label] for label in labels], boxes.tolist()]))
"""


def test_a_program_without_this_project_follows_what_the_help_says(files: tuple[Path, Path], tmp_path: Path) -> None:
    page = pages(160, 128)[0].permute(1, 2, 0).numpy()
    Image.fromarray(page).save(tmp_path / "page.png")
    line = [sys.executable, "-c", STRANGER, str(files[1]), str(tmp_path / "page.png")]
    answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True)
    scores, labels, boxes = json.loads(answer.stdout)
    expected = dfine.load(files[0], device="cpu")(page, threshold=0.0, dedupe=1.0)
    assert len(expected.labels) == len(labels) > 0
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
    assert labels == expected.labels
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-3)


def test_a_file_says_nothing_of_the_machine_that_wrote_it(files: tuple[Path, Path]) -> None:
    assert str(ROOT).encode() not in files[1].read_bytes()


def test_predict_runs_it_without_a_torch_model(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    found = {}
    for name, file in zip(("torch", "onnx"), files, strict=True):
        line = ["predict", "--checkpoint", file, "--out", tmp_path / name, "--threshold", "0", tmp_path / "page.png"]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        if name == "onnx":
            monkeypatch.setattr(DFine, "__init__", lambda *_: pytest.fail("a torch model was made"))
        assert predict.main() == 0
        found[name] = json.loads((tmp_path / name / "predictions.json").read_text())[0]["detections"]
    assert len(found["onnx"]) == len(found["torch"]) > 0
    for own, theirs in zip(found["onnx"], found["torch"], strict=True):
        assert own["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_evaluate_gives_the_checkpoints_metrics(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    val = coloured(tmp_path / "pages", count=4)
    json_file = Path(val["annotations"])
    coco = json.loads(json_file.read_text())
    truth = []  # some of what the model finds: of random weights no other truth has an AP
    for entry in coco["images"]:
        found = dfine.load(files[0], "cpu")(Path(val["images"]) / entry["file_name"], threshold=0, dedupe=1)
        for place in (1, 4, 9):
            x1, y1, x2, y2 = found.boxes[place].tolist()
            box = {"id": len(truth) + 1, "image_id": entry["id"], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            truth.append(box | {"category_id": CATEGORIES[found.classes[place]]["id"]})
    json_file.write_text(json.dumps(coco | {"annotations": truth, "categories": CATEGORIES}))
    metrics = []
    for file in files:
        overrides = [f"data.val.images={val['images']}", f"data.val.annotations={json_file}", f"run_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(file), *overrides])
        evaluate.main()
        metrics.append(json.loads((tmp_path / f"{file.stem}.metrics.json").read_text()))
    assert metrics[1]["AP"] == pytest.approx(metrics[0]["AP"], abs=5e-4)
    assert metrics[1]["AP"] > 0.1


def test_half_precision_is_computed_in_but_not_for_boxes_and_ranking(half_file: Path) -> None:
    file, whole = onnx.load(half_file), depthwise()
    onnx.checker.check_model(file, full_check=True)
    weights = sum(tensor.nbytes for tensor in whole.state_dict().values())
    stored = sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in file.graph.initializer)
    assert stored < 0.7 * weights
    typed = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(file).graph.value_info
    }
    kinds = [(node.op_type, typed.get(node.input[0], onnx.TensorProto.FLOAT)) for node in file.graph.node]
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert {dtype for kind, dtype in kinds if kind == "Conv"} == {half}
    for kind in ("TopK", "Floor", "Log"):  # ranking and LQE's best bins, where attention reads, boxes
        assert {dtype for other, dtype in kinds if other == kind} == {single}, kind
    assert kinds.count(("Softmax", single)) >= 3 * whole.config.decoder.layers  # where to read, FDR, LQE
    sizes = [(90, 64), (96, 50)]
    images = pages(96, 64, len(sizes))
    with torch.inference_mode():
        expected = answer(whole, images, torch.tensor(sizes), sizes)
    for own, theirs in zip(OnnxModel(half_file)(images, torch.tensor(sizes), sizes), expected, strict=True):
        check(own, theirs, scores=5e-3, boxes=0.1)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_openvino_finds_what_the_deployed_model_finds(files: tuple[Path, Path], half_file: Path, half: bool) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra: pip install 'dfine[bench]'")
    runtime = openvino.compile_model(half_file if half else files[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    whole, scores, boxes = (depthwise(), 5e-3, 0.1) if half else (model(), 1e-4, 1e-3)
    for canvas, sizes in [((96, 64), [(90, 64), (96, 33)]), ((64, 128), [(64, 128)])]:
        images = pages(*canvas, len(sizes))
        with torch.inference_mode():
            expected = answer(whole.deploy(), images, torch.tensor(sizes), sizes)
        answers = runtime([images.numpy(), np.array(sizes), np.array(sizes)]).to_tuple()
        for own, theirs in zip(zip(*map(torch.from_numpy, answers), strict=True), expected, strict=True):
            check(Detections(*own), theirs, scores, boxes)


def test_a_file_that_cannot_be_used_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(files[1].read_bytes()[:1000])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "other", ports[:1], ports[1:])
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(other, tmp_path / "other.onnx")
    for name, message in {
        "none.onnx": "no such file",
        "broken.onnx": "onnxruntime cannot load it",
        "other.onnx": "not an ONNX file of this project: lacks categories, config",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            dfine.load(tmp_path / name)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"config": "{"}, "its metadata are not JSON"),
        ({"categories": "[" * 100_000}, "its metadata are not JSON"),
        ({"config": "[]"}, "lacks config"),
        ({"categories": "{}"}, "lacks categories"),
        ({"categories": '[{"id": 1}]'}, "its categories lack id or name"),
        ({"config": '{"model": {"depth": 3}}'}, "written by another version of dfine .*depth"),
        ({"config": '{"model":' * 500 + "1" + "}" * 500}, "written by another version of dfine"),
    ],
    ids=["cut", "nested", "list", "object", "nameless", "unknown key", "nested objects"],
)
def test_metadata_that_cannot_be_used_are_named_with_their_file(
    files: tuple[Path, Path], tmp_path: Path, texts: dict[str, str], message: str
) -> None:
    file = onnx.load(files[1])
    for entry in file.metadata_props:
        entry.value = texts.get(entry.key, entry.value)
    onnx.save(file, tmp_path / "odd.onnx")
    with pytest.raises((CheckpointError, ConfigError), match=f"odd.onnx: .*{message}"):
        dfine.load(tmp_path / "odd.onnx")


def test_a_copy_of_a_detector_opens_the_file_again(files: tuple[Path, Path]) -> None:
    detector = dfine.load(files[1])
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert twin(drawn_page(), 0.0).boxes.tolist() == detector(drawn_page(), 0.0).boxes.tolist()


def test_what_an_onnx_file_cannot_do_is_said(files: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model.onnx: .*leave out fast"):
        dfine.load(files[1], fast=True)
    with pytest.raises(CheckpointError, match=r"model.onnx: onnxruntime cannot use cuda here"):
        dfine.load(files[1], device="cuda")


def test_without_the_extra_both_sides_say_what_to_install(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(CheckpointError, match=r"pip install 'dfine\[export\]'"):
        OnnxModel(files[1])
    with pytest.raises(CheckpointError, match=r"pip install 'dfine\[export\]'"):
        onnx_format.write(tmp_path / "model.onnx", model(), Config(model=MODEL), CATEGORIES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--out", "model.pt"], "model.pt: name a file that ends in .onnx"),
        (["--format", "transformers", "--out", "folder", "--half"], "--half is for --format onnx"),
    ],
)
def test_options_that_do_not_fit_are_mistakes(
    files: tuple[Path, Path],
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", str(files[0]), *arguments])
    with pytest.raises((CheckpointError, SystemExit)) as raised:
        export.main()
    assert message in f"{raised.value} {capsys.readouterr().err}"


NANO = ["strides=[16,32]", "hidden_dim=128", "backbone.name=hgnetv2_b0", "decoder.points=[6,6]", "decoder.layers=3"]
NANO += ["encoder.feedforward_dim=512", "encoder.depth_mult=0.5", "encoder.expansion=0.34"]
NANO += ["decoder.feedforward_dim=512", "mean=[0,0,0]", "std=[1,1,1]"]


@pytest.mark.skipif("DFINE_PARITY" not in os.environ, reason="takes minutes: DFINE_PARITY=1 runs it")
@pytest.mark.parametrize("name", ["quickstart", "HGNet-N", "ConvNeXt-T"])
def test_models_of_real_size_agree_with_their_files(name: str, tmp_path: Path) -> None:
    base: Any = configs.load(ROOT / "configs/quickstart.yaml") if name == "quickstart" else Config()
    changes = {"quickstart": [], "HGNet-N": NANO, "ConvNeXt-T": ["backbone.name=convnext_tiny"]}[name]
    settings = configs.override(base, ["model.backbone.pretrained=false", *(f"model.{change}" for change in changes)])
    torch.manual_seed(0)
    whole = shaken(DFine(settings.model, 11), 0.02).eval()
    onnx_format.write(tmp_path / "model.onnx", whole, settings, [{"id": i, "name": str(i)} for i in range(11)])
    runtime = OnnxModel(tmp_path / "model.onnx")
    for size in [(320, 320), (352, 250), (640, 480), (470, 928), (928, 640)]:
        images, sizes = pages(*((side + 31) // 32 * 32 for side in size)), torch.tensor([size])
        with torch.inference_mode():
            (expected,) = answer(whole, images, sizes, [size])
        (found,) = runtime(images, sizes, [size])
        check(found, expected)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (2, 2), (3, 1)])
def test_padding_that_depends_on_the_size_is_the_same_once_it_is_fixed(kernel: int, stride: int):
    torch.manual_seed(0)
    model = nn.Sequential(Conv2dSame(2, 3, kernel, stride), nn.Conv2d(3, 3, 3))
    pages = torch.randn(1, 2, 8, 12)
    expected = model(pages)
    onnx_format.fix_padding(model)
    assert not any(isinstance(module, Conv2dSame) for module in model.modules())
    assert model(pages).equal(expected)
