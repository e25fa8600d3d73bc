"""A page in, detections out."""

import pytest
import torch
from tiny import drawn_page, shaken, tiny_model
from torchvision.ops import box_iou

from dfine.config import DataConfig
from dfine.data.transforms import fit, pad, resize
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
