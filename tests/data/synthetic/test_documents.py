"""Drawn documents: the same everywhere, boxes tight and apart, all classes, with and without typefaces."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfine.config import PagesConfig
from dfine.data.sources import open_source
from dfine.data.synthetic.documents import text
from dfine.data.synthetic.documents.pages import KINDS, Page, draw_page, draw_style, page_size
from dfine.data.synthetic.pages import CLASSES, Drawn, coco_dict, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*typefaces are missing")  # fewer of them draw just as well


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return [draw_page(3, index) for index in range(60)]


@pytest.fixture
def no_typefaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "families", frozenset)


def overlap(boxes: np.ndarray) -> np.ndarray:
    """The part of the smaller of two boxes (T, 4) xywh that lies in the other, (T, T)."""
    low, high = boxes[:, None, :2], (boxes[:, :2] + boxes[:, 2:])[:, None]
    sides = (np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))).clip(0)
    area = boxes[:, 2] * boxes[:, 3]
    return sides.prod(axis=2) / np.minimum(area[:, None], area)


def test_a_page_depends_on_seed_and_index_alone(drawn: list[Drawn]) -> None:
    for again, before in zip(draw_page(3, 7), drawn[7], strict=True):
        np.testing.assert_array_equal(again, before)
    assert draw_page(4, 7)[0].shape != drawn[7][0].shape or (draw_page(4, 7)[0] != drawn[7][0]).any()


def test_the_size_is_known_without_drawing(drawn: list[Drawn]) -> None:
    assert [page_size(3, index) for index in range(60)] == [image.shape[1::-1] for image, _, _ in drawn]


def test_boxes_lie_on_the_page_and_hardly_overlap(drawn: list[Drawn]) -> None:
    for image, labels, boxes in drawn:
        assert len(labels) == len(boxes) > 0
        assert (boxes[:, 2:] > 0).all()
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= image.shape[1::-1]).all()
        assert np.triu(overlap(boxes), 1).max() < 0.3


def test_boxes_are_tight_to_what_is_drawn(drawn: list[Drawn]) -> None:
    """Every edge of a text's box on a white page touches its ink."""
    checked = 0
    for image, labels, boxes in drawn:
        if (np.median(image, axis=(0, 1)) < 255).any() or (image[:3] < 255).any():
            continue  # tinted, scanned, or with a ground
        for label, (x, y, width, height) in zip(labels, boxes.astype(int), strict=True):
            if CLASSES[label] in ("Text", "List-item", "Caption", "Footnote"):
                part = image[y : y + height, x : x + width].min(axis=2) < 250
                assert part[0].any()
                assert part[-1].any()
                assert part[:, 0].any()
                assert part[:, -1].any()
                checked += 1
    assert checked > 100


def test_a_ground_hides_what_was_there_and_its_boxes() -> None:
    boxes = [(5, 5, 30, 20), (30, 40, 60, 70), (50, 5, 70, 20), (5, 60, 30, 90)]  # the first two are under it
    page = Page(np.full((100, 80, 3), 255, np.uint8), "report", labels=[0, 1, 2, 3], boxes=boxes[:])
    page.ground(0, 40, 50, (200, 0, 0))
    assert (page.labels, page.boxes) == ([2, 3], boxes[2:])
    assert (page.image[:50, :40] == (200, 0, 0)).all()


def test_every_class_occurs(drawn: list[Drawn]) -> None:
    assert {CLASSES[label] for _, labels, _ in drawn for label in labels} == set(CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_style(kind: str) -> None:
    style = draw_style(np.random.default_rng(0), kind, 1.1)
    assert style.pitch > style.font.size > 0


@pytest.mark.usefixtures("no_typefaces")
def test_pillows_own_face_is_enough() -> None:
    labels = np.concatenate([draw_page(3, index)[1] for index in range(12)])
    assert len(set(labels.tolist())) > 6


def test_missing_typefaces_are_counted_in_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    monkeypatch.setattr(text, "matplotlib_fonts", lambda: None)
    with pytest.warns(UserWarning, match=r"typefaces are missing.*dfine\[pages\]"):
        assert text.families.__wrapped__() == frozenset()


def test_a_source_draws_the_style_that_is_asked_for(drawn: list[Drawn]) -> None:
    source = open_source(PagesConfig(synthetic=3, synthetic_seed=3, synthetic_style="documents"), "data.train")
    image, labels, boxes = source.read(2)
    np.testing.assert_array_equal(image, drawn[2][0])
    np.testing.assert_array_equal(labels, drawn[2][1])
    np.testing.assert_array_equal(boxes[:, 2:] - boxes[:, :2], drawn[2][2][:, 2:])
    assert source.sizes.tolist() == [[*image.shape[:2]] for image, _, _ in drawn[:3]]
    assert "documents" in source.summary(queries=300)


def test_a_folder_drawn_by_two_processes_is_what_a_source_draws(tmp_path: Path, drawn: list[Drawn]) -> None:
    write_folder(tmp_path, 3, 10, draw_page, workers=2)
    assert json.loads((tmp_path / "annotations.json").read_text()) == coco_dict(3, 10, draw_page)
    for index in (0, 9):
        np.testing.assert_array_equal(Image.open(tmp_path / "images" / f"{index:06d}.png"), drawn[index][0])
