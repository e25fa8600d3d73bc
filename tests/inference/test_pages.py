"""A page in, detections out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import drawn_page, shaken, tiny_config, tiny_model
from torchvision.ops import box_iou

import dfine
from dfine.checkpoints import ours
from dfine.config import Config, DataConfig
from dfine.data.transforms import PageError, fit, pad, resize
from dfine.inference.pages import predict_page
from dfine.model.detector import DFine, detect

CATEGORIES = [{"id": 1, "name": "text"}, {"id": 3, "name": "table"}, {"id": 7, "name": "figure"}]
SMALL = DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96)


def model() -> DFine:
    return shaken(tiny_model()).eval()


def test_a_page_is_prepared_as_in_evaluation() -> None:
    page = drawn_page()
    found = predict_page(model(), page, SMALL, threshold=0.0)
    images, sizes = pad([resize(page, fit((120, 90), 64, 96))], 32)
    with torch.no_grad():
        expected = detect(model()(images, sizes), [(120, 90)])[0]
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs)


def test_only_what_reaches_the_threshold_is_given_the_best_first() -> None:
    everything = predict_page(model(), drawn_page(), SMALL, threshold=0.0)
    assert len(everything.scores) == 24  # 8 queries, 3 classes
    assert everything.scores.tolist() == sorted(everything.scores.tolist(), reverse=True)
    threshold = float(everything.scores[9])
    some = predict_page(model(), drawn_page(), SMALL, threshold)
    assert torch.equal(some.scores, everything.scores[:10])
    assert torch.equal(some.boxes, everything.boxes[:10])


def test_deduplication_leaves_no_two_boxes_in_one_place_whatever_their_classes() -> None:
    everything = predict_page(model(), drawn_page(), SMALL, threshold=0.0)
    found = predict_page(model(), drawn_page(), SMALL, threshold=0.0, dedupe=0.5)
    assert 0 < len(found.boxes) <= 8  # each query says the same box under three names
    assert torch.equal(found.boxes[0], everything.boxes[0])
    assert (box_iou(found.boxes, found.boxes) - torch.eye(len(found.boxes))).max() <= 0.5


def test_a_model_that_says_nan_is_an_error() -> None:
    broken = model()
    with torch.no_grad():
        broken.mean.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        predict_page(broken, drawn_page(), SMALL)


# The script


# The public face


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    ours.save(path, ours.weights(Config(model=tiny_config(), data=SMALL), CATEGORIES, model()))
    return path


def test_a_detector_finds_the_same_on_files_pil_images_and_arrays(best: Path, tmp_path: Path) -> None:
    page = drawn_page()
    Image.fromarray(page).save(tmp_path / "page.png")
    forms = [tmp_path / "page.png", str(tmp_path / "page.png"), Image.fromarray(page), page]
    expected, *others = dfine.load(best, "cpu")(forms, threshold=0)
    assert {type(label) for label in expected.labels} == {str}
    assert set(expected.labels) <= {"text", "table", "figure"}
    assert expected.boxes.shape == (len(expected.labels), 4)
    assert (expected.boxes >= 0).all()
    assert (expected.boxes <= [90, 120, 90, 120]).all()
    for found in others:
        assert found.labels == expected.labels
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_one_page_gives_one_answer_and_many_a_list(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    page = drawn_page()
    assert isinstance(detector(page), dfine.Found)
    assert len(detector([page])) == 1
    assert detector([]) == []
    assert len(detector(page for _ in range(3))) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pages_of_any_sizes_keep_their_order_and_do_not_depend_on_their_batch(best: Path, batch_size: int) -> None:
    detector = dfine.load(best, "cpu")
    pages = [drawn_page(120, 90), drawn_page(90, 120), drawn_page(300, 60), drawn_page(90, 121), drawn_page(64, 64)]
    for page, found in zip(pages, detector(pages, 0.0, batch_size=batch_size), strict=True):
        alone = detector(page, 0.0)
        assert found.labels == alone.labels
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)


def test_threshold_and_deduplication_are_the_callers(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    everything = detector(drawn_page(), 0.0)
    least = float(np.median(everything.scores))
    assert len(detector(drawn_page(), least).labels) == (everything.scores >= least).sum()
    assert 0 < len(detector(drawn_page(), 0.0, dedupe=0.3).labels) < len(everything.labels)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (np.zeros((5, 5), np.uint8), r"page 1: expected \(H, W, 3\) uint8 RGB, found \(5, 5\) uint8"),
        (np.zeros((5, 5, 3), np.float32), r"found \(5, 5, 3\) float32"),
        (np.zeros((0, 5, 3), np.uint8), r"found \(0, 5, 3\)"),
        (7, "page 1: expected a path, a PIL image or an array, found int"),
        ("none.png", "none.png: cannot read"),
    ],
    ids=["grey", "floats", "empty", "a number", "no file"],
)
def test_what_is_no_page_is_named(best: Path, page: Any, message: str) -> None:
    with pytest.raises(PageError, match=message):
        dfine.load(best, "cpu")([drawn_page(), page])


def test_a_detector_knows_its_classes_and_is_deployed(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    assert detector.categories == CATEGORIES
    assert isinstance(detector.model, dfine.DFine)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in detector.model.encoder.modules())
    found = detector(drawn_page(), 0.0)
    assert [CATEGORIES[place]["name"] for place in found.classes] == found.labels
