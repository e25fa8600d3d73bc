"""The drawn pages: reproducible, exactly boxed and as varied as the classes need."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from dfine.data.synthetic import pages
from dfine.data.synthetic.ink import block
from dfine.data.synthetic.pages import CATEGORIES, CLASSES, coco_dict, draw_page, page_size, write_folder

PAGES = 150


@cache
def drawn(index):
    return draw_page(3, index)


@cache
def ink_of(index):
    """Returns where a page is not paper, (H, W); the corner of a page is always paper."""
    image = drawn(index)[0]
    return np.logical_or.reduce([image[..., channel] != image[0, 0, channel] for channel in range(3)])


def corners(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(int)


def test_the_same_seed_and_index_give_the_same_page():
    for first, second in zip(draw_page(5, 7), draw_page(5, 7), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_page_does_not_depend_on_the_pages_drawn_before():
    alone = draw_page(5, 8)
    pages.word_ink.cache_clear()
    draw_page(5, 0)
    np.testing.assert_array_equal(alone[0], draw_page(5, 8)[0])


@pytest.mark.parametrize(("seed", "index"), [(1, 0), (0, 1)])
def test_another_seed_or_index_gives_another_page(seed, index):
    page, other = draw_page(0, 0)[0], draw_page(seed, index)[0]
    assert page.shape != other.shape or (page != other).any()


def test_image_labels_and_boxes_have_the_documented_types_and_ranges():
    for index in range(PAGES):
        image, labels, boxes = drawn(index)
        assert (image.dtype, labels.dtype, boxes.dtype) == (np.uint8, np.int64, np.float64)
        assert image.shape == (*image.shape[:2], 3)
        assert boxes.shape == (len(labels), 4)
        assert (labels >= 0).all()
        assert (labels < len(CLASSES)).all()
        np.testing.assert_array_equal(boxes, boxes.round())


def test_page_size_is_the_size_of_the_drawn_page():
    for index in range(PAGES):
        height, width = drawn(index)[0].shape[:2]
        assert page_size(3, index) == (width, height)


def test_pages_are_mostly_portrait_with_a_short_edge_of_600_to_680_pixels():
    sizes = np.array([page_size(4, index) for index in range(1000)])
    assert 600 <= sizes.min(axis=1).min() <= sizes.min(axis=1).max() <= 680
    assert 0.01 < (sizes[:, 0] > sizes[:, 1]).mean() < 0.06


def test_every_box_is_tight_to_the_ink_and_has_paper_all_around():
    for index in range(PAGES):
        ink, boxes = ink_of(index), drawn(index)[2]
        for left, top, right, bottom in corners(boxes):
            inside = ink[top:bottom, left:right]
            assert inside.shape == (bottom - top, right - left), f"page {index}: a box leaves the page"
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any(), f"page {index}: paper along the inner edge of a box"
            grown = ink[top - 1 : bottom + 1, left - 1 : right + 1]
            assert grown.sum() == inside.sum(), f"page {index}: ink along the outer edge of a box"


def test_ink_that_nobody_would_see_is_dropped_and_widens_no_box():
    drawn = np.array([[0, 10, 0, 0], [10, 200, 10, 0], [0, 10, 90, 10]], np.uint8)
    _, ink, left, _ = block("Text", drawn, gap=3, left=7)
    assert (ink.tolist(), left) == ([[200, 0], [0, 90]], 8)


def test_boxes_do_not_overlap():
    for index in range(PAGES):
        image, _, boxes = drawn(index)
        covered = np.zeros(image.shape[:2], int)
        for left, top, right, bottom in corners(boxes):
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1, f"page {index}"


def test_no_ink_lies_outside_the_boxes_but_hairlines():
    for index in range(PAGES):
        rest, boxes = ink_of(index).copy(), drawn(index)[2]
        for left, top, right, bottom in corners(boxes):
            rest[top:bottom, left:right] = False
        rows = np.flatnonzero(rest.any(axis=1))
        assert len(rows) <= 3, f"page {index}: rows {rows}"
        assert (np.diff(rows) > 1).all(), f"page {index}: rows {rows}"


def test_pages_hold_ten_boxes_on_average_and_every_class_is_on_every_sixth_page():
    labels = [drawn(index)[1] for index in range(PAGES)]
    assert np.mean([len(each) for each in labels]) >= 10
    for position, name in enumerate(CLASSES):
        assert np.mean([position in each for each in labels]) >= 0.15, name


def test_coco_dict_describes_the_drawn_pages():
    data = coco_dict(3, 4)
    assert data["categories"] == CATEGORIES
    assert [image["id"] for image in data["images"]] == [0, 1, 2, 3]
    assert [entry["id"] for entry in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    for index in range(4):
        entries = [entry for entry in data["annotations"] if entry["image_id"] == index]
        np.testing.assert_array_equal([entry["category_id"] - 1 for entry in entries], drawn(index)[1])
        np.testing.assert_array_equal([entry["bbox"] for entry in entries], drawn(index)[2])
        assert all(entry["area"] == entry["bbox"][2] * entry["bbox"][3] for entry in entries)


def test_a_written_folder_holds_the_same_pages(tmp_path):
    write_folder(tmp_path, seed=3, pages=3)
    data = json.loads((tmp_path / "annotations.json").read_text())
    assert data == coco_dict(3, 3)
    for index, entry in enumerate(data["images"]):
        image = np.asarray(Image.open(tmp_path / "images" / entry["file_name"]))
        np.testing.assert_array_equal(image, drawn(index)[0])
