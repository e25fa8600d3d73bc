"""Pages and their boxes: nothing is lost, moved or mixed up on the way from the json to a batch."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import CATEGORIES, annotation, image, write
from PIL import Image

from dfine.config import ConfigError, DataConfig, PagesConfig
from dfine.data.batches import PageDataset, PageKey
from dfine.data.sources import CocoPages, open_source, read_coco
from dfine.data.transforms import PageError

SMALL = DataConfig(batch_size=2, workers=0, short_edges=(32, 64), eval_short_edge=32, max_long_edge=96)


def sample(source: CocoPages, index: int, training: bool = False) -> tuple[np.ndarray, Any]:
    return PageDataset(source, SMALL, seed=0, training=training)[PageKey(index, 64, 0)]


# The json


def test_pages_without_boxes_stay(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1), image(2), image(3)], [annotation(2, [1, 2, 3, 4])]))
    assert source.ids.tolist() == [1, 2, 3]
    assert [len(source.read(i)[2]) for i in range(3)] == [0, 1, 0]
    for training in (False, True):
        target = sample(source, 0, training)[1]
        assert target.boxes.shape == (0, 4)
        assert target.labels.shape == (0,)


def test_boxes_are_clipped_to_the_page_and_empty_ones_dropped_and_counted(tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [25, 35, 10, 10], [30, 0, 5, 5], [4, 4, 0, 9], [4, 4, -3, 9], [0, 41, 9, 9]]
    source = CocoPages(*write(tmp_path, [image(1)], [annotation(1, box) for box in boxes]))
    assert source.read(0)[2].tolist() == [[0, 0, 5, 5], [25, 35, 30, 40]]
    assert source.dropped == 4
    assert source.clipped == 2
    assert "2 boxes clipped to their pages, 4 empty boxes dropped" in source.summary(queries=300)


def test_slivers_are_dropped_and_counted_like_empty_boxes(tmp_path: Path) -> None:
    """In float32 they are empty, and beside an empty answer the matching cost is NaN."""
    boxes = [[5, 5, 1e-7, 9], [5, 5, 9, 1e-7], [-9, 5, 9.000001, 9], [29.999999, 5, 9, 9], [5, 5, 0.1, 9]]
    source = CocoPages(*write(tmp_path, [image(1)], [annotation(1, box) for box in boxes]))
    assert source.read(0)[2].tolist() == [[5, 5, 5.1, 14]]
    assert (source.clipped, source.dropped) == (0, 4)


def test_the_truth_of_evaluation_is_that_of_training(tmp_path: Path) -> None:
    """Clipped, or finding what the model has learnt would be wrong; what stays on its page is not touched."""
    boxes = [[-8, 5, 20, 10], [20, 30, 20, 20], [0.1, 0.2, 29.9000001, 4], [31, 0, 5, 5], [-9, 5, 9.001, 9]]
    annotations = [annotation(1, box, area=150) for box in boxes] + [annotation(1, [-5, -5, 90, 90], iscrowd=1)]
    source = CocoPages(*write(tmp_path, [image(1)], annotations))
    assert (source.clipped, source.dropped) == (2, 2)
    truth = source.ground_truth()["annotations"]
    assert [a["bbox"] for a in truth] == [[0, 5, 12, 10], [20, 30, 10, 10], boxes[2], [0, 0, 30, 40]]
    assert [a["area"] for a in truth] == [120, 100, 150, 1200]
    learnt = np.array([a["bbox"] for a in truth if not a["iscrowd"]])
    learnt[:, 2:] += learnt[:, :2]
    np.testing.assert_allclose(source.read(0)[2], learnt, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_a_box_one_pixel_high_survives(tmp_path: Path, training: bool) -> None:
    source = CocoPages(*write(tmp_path, [image(1, 300, 400)], [annotation(1, [50, 200, 200, 1])]))
    box = sample(source, 0, training)[1].boxes
    assert len(box) == 1
    assert box[0, 3] > 0


def test_a_page_of_400_boxes_keeps_them_all_in_order(tmp_path: Path) -> None:
    boxes = [[10 * (i % 20), 10 * (i // 20), 8, 8] for i in range(400)]
    source = CocoPages(*write(tmp_path, [image(1, 200, 200)], [annotation(1, box) for box in boxes]))
    assert source.read(0)[2][:, :2].tolist() == [box[:2] for box in boxes]
    assert len(sample(source, 0)[1].boxes) == 400


def test_crowd_boxes_are_no_truth_to_learn_from_but_stay_in_the_ground_truth(tmp_path: Path) -> None:
    crowd = annotation(1, [0, 0, 20, 20], iscrowd=1)
    source = CocoPages(*write(tmp_path, [image(1)], [crowd, annotation(1, [1, 2, 3, 4])]))
    assert source.read(0)[2].tolist() == [[1, 2, 4, 6]]
    assert source.dropped == 0
    assert [a["iscrowd"] for a in source.ground_truth()["annotations"]] == [1, 0]


def test_labels_are_the_sorted_category_ids_made_contiguous(tmp_path: Path) -> None:
    annotations = [annotation(0, [0, 0, 5, 5], category_id=i) for i in (7, 3, 1)]
    source = CocoPages(*write(tmp_path, [image(0)], annotations))
    assert [category["id"] for category in source.categories] == [1, 3, 7]
    assert [category["name"] for category in source.categories] == ["text", "table", "figure"]
    assert source.read(0)[1].tolist() == [2, 1, 0]


def test_boxes_beyond_the_queries_are_counted_at_the_start(tmp_path: Path) -> None:
    boxes = [annotation(i, [1, 1, 9, 9]) for i in (1, 1, 1, 2, 2, 3, 3, 3, 3)]
    source = CocoPages(*write(tmp_path, [image(i) for i in range(4)], boxes))
    assert source.counts is not None
    assert source.counts.tolist() == [0, 3, 2, 4]
    assert "2 pages have more boxes than the 2 queries: 3 cannot be found" in source.summary(queries=2)
    assert "more boxes" not in source.summary(queries=4)


def test_boxes_go_to_their_page_whatever_the_order_of_the_json_and_image_id_0_is_an_id(tmp_path: Path) -> None:
    annotations = [annotation(9, [9, 9, 9, 9]), annotation(0, [1, 1, 1, 1]), annotation(9, [2, 2, 2, 2])]
    source = CocoPages(*write(tmp_path, [image(9), image(4), image(0)], annotations))
    assert [source.read(i)[2][:, 0].tolist() for i in range(3)] == [[9, 2], [], [1]]
    assert [sample(source, i)[1].image_id for i in range(3)] == [9, 4, 0]


def test_annotations_are_renumbered_from_1(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1)], [annotation(1, [0, 0, 2, 3]), annotation(1, [1, 1, 1, 1])]))
    assert [(a["id"], a["area"]) for a in source.ground_truth()["annotations"]] == [(1, 6), (2, 1)]


def test_an_area_in_the_json_is_kept(tmp_path: Path) -> None:
    """It is the outline's, and decides whether a box is small or large to COCO's metrics."""
    source = CocoPages(*write(tmp_path, [image(1)], [annotation(1, [0, 0, 2, 3], area=2.5)]))
    assert source.ground_truth()["annotations"][0]["area"] == 2.5
    clipped = CocoPages(*write(tmp_path, [image(1)], [annotation(1, [-8, 5, 20, 10], area=50)]))
    (left,) = clipped.ground_truth()["annotations"]
    assert (left["bbox"], left["area"]) == ([0, 5, 12, 10], 50)


def test_outlines_are_not_kept(tmp_path: Path) -> None:
    outlined = annotation(1, [0, 0, 2, 3], segmentation=[[0, 0, 2, 0, 2, 3, 0, 3]])
    source = CocoPages(*write(tmp_path, [image(1)], [outlined]))
    assert "segmentation" not in source.ground_truth()["annotations"][0]


def test_file_names_may_have_accents_and_folders(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1, file_name="sub dir/página_ñ.png")], []))
    assert source.read(0)[0].shape == (40, 30, 3)


def test_targets_are_fractions_of_the_page_whatever_its_new_size(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1, 100, 200)], [annotation(1, [10, 20, 50, 40])]))
    page, target = sample(source, 0)
    assert page.shape == (96, 48, 3)  # 64 pixels wide it would be 128 high: the long edge rules
    torch.testing.assert_close(target.boxes, torch.tensor([[0.35, 0.2, 0.5, 0.2]]))
    assert target.size == (200, 100)


# What is wrong is named


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, [image(1), image(2), image(3)], [])
    (images / "2.png").unlink()
    with pytest.raises(PageError, match=r"1 of 3 images .* missing: 2\.png"):
        CocoPages(images, annotations)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, [image(1)], [])
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "1.png")
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:1500])
    with pytest.raises(PageError, match=r"1\.png: cannot read"):
        CocoPages(images, annotations).read(0)


def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, [image(1)], [])
    Image.new("RGB", (31, 40)).save(images / "1.png")
    with pytest.raises(PageError, match=r"1\.png: the image is 31x40 pixels, the annotations say 30x40"):
        CocoPages(images, annotations).read(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("# pages", "not JSON"),
        ("[]", "not COCO"),
        ("{}", "not COCO: needs the lists images, annotations and categories"),
        ('{"images": [], "annotations": [], "categories": []}', "holds no images"),
    ],
)
def test_a_file_that_is_not_coco_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(PageError, match=rf"wrong\.json: {message}"):
        read_coco(tmp_path / "wrong.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [annotation(5, [0, 0, 1, 1])]}, r"annotations\[0\]: no image has id 5"),
        ({"annotations": [annotation(1, [0, 0, 1, 1], 2)]}, r"annotations\[0\]: no category has id 2"),
        ({"annotations": [annotation(1, [0, 0, 1])]}, r"annotations\[0\]: bbox must be four numbers"),
        ({"annotations": [annotation(1, [0, 0, 1, float("nan")])]}, r"annotations\[0\]: bbox must be four numbers"),
        ({"annotations": [annotation(1, [0, 0, 1, 10**400])]}, r"annotations\[0\]: bbox must be four numbers"),
        ({"annotations": [annotation(1, [0, 0, 1, True])]}, r"annotations\[0\]: bbox must be four numbers"),
        (
            {"annotations": [annotation(1, [0, 0, 1, 1], iscrowd="0")]},
            r"annotations\[0\]: iscrowd must be .* found '0'",
        ),
        (
            {"annotations": [annotation(1, [0, 0, 1, 1], iscrowd=None)]},
            r"annotations\[0\]: iscrowd must be .* found None",
        ),
        (
            {"annotations": [annotation(1, [0, 0, 1, 1], iscrowd=False)]},
            r"annotations\[0\]: iscrowd must be .* found False",
        ),
        ({"annotations": [annotation(1, [0, 0, 1, 1], area=None)]}, r"annotations\[0\]: area must be .* found None"),
        ({"annotations": [annotation(1, [0, 0, 1, 1], area="1")]}, r"annotations\[0\]: area must be .* found '1'"),
        ({"annotations": [annotation(1, [0, 0, 1, 1], area=-1)]}, r"annotations\[0\]: area must be .* found -1"),
        ({"annotations": [annotation(1, [0, 0, 1, 1], area=float("inf"))]}, r"annotations\[0\]: area must be .* inf"),
        ({"annotations": [annotation(1.0, [0, 0, 1, 1])]}, r"annotations\[0\]: image_id must be int, found 1\.0"),
        ({"annotations": [annotation(True, [0, 0, 1, 1])]}, r"annotations\[0\]: image_id must be int, found True"),
        ({"annotations": [annotation(1, [0, 0, 1, 1], "1")]}, r"annotations\[0\]: category_id must be int, found '1'"),
        ({"annotations": [annotation(2**60, [0, 0, 1, 1])]}, r"annotations\[0\]: image_id is too large: 11529"),
        ({"annotations": [annotation(1, [0, 0, 1, 2**53])]}, r"annotations\[0\]: bbox must be four numbers"),
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\]: bbox must be list, found None"),
        ({"annotations": [7]}, r"annotations\[0\]: expected an object, found 7"),
        ({"images": [image(1), image(1)]}, r"images\[1\]: id 1 occurs twice"),
        ({"images": [image(1) | {"width": "30"}]}, r"images\[0\]: width must be int, found '30'"),
        ({"images": [image(1) | {"width": 10**400}]}, r"images\[0\]: width is too large: 1000"),
        ({"images": [image(1) | {"id": True}]}, r"images\[0\]: id must be int, found True"),
        ({"images": [image(1) | {"height": 0}]}, r"images\[0\]: height must be 1 or more"),
        *(
            (
                {"images": [image(1), image(2, file_name=name)]},
                r"images\[1\]: file_name must be a path inside the folder",
            )
            for name in ("../a.png", "a/../../b.png", "a/../b.png", "/a.png", "..")
        ),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: name must be str, found None"),
        ({"categories": []}, "holds no categories"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"images": [image(1)], "annotations": [], "categories": CATEGORIES} | change
    (tmp_path / "pages.json").write_text(json.dumps(content))
    with pytest.raises(PageError, match=rf"pages\.json: {message}"):
        read_coco(tmp_path / "pages.json")


def test_file_names_are_brought_to_one_form(tmp_path: Path) -> None:
    images, annotations = write(tmp_path, [image(1), image(2, file_name="b/2.png")], [])
    content = json.loads(annotations.read_text())
    for entry, name in zip(content["images"], ("./1.png", "b//./2.png"), strict=True):
        entry["file_name"] = name
    annotations.write_text(json.dumps(content))
    source = CocoPages(images, annotations)
    assert source.files.tolist() == [b"1.png", b"b/2.png"]
    assert [source.read(i)[0].shape for i in range(2)] == [(40, 30, 3)] * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_json_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    annotations = write(tmp_path, [image(1, file_name="página.png")], [annotation(1, [1, 2, 3, 4])])[1]
    content = read_coco(annotations)
    annotations.write_text(annotations.read_text(encoding="utf-8"), encoding=encoding)
    again = read_coco(annotations)
    assert again[:2] == content[:2]
    assert [x.tolist() for x in again[2]] == [x.tolist() for x in content[2]]


def test_what_is_no_number_may_stand_where_nobody_reads_it(tmp_path: Path) -> None:
    outlined = annotation(1, [1, 2, 3, 4], segmentation=[[float("nan")] * 6])
    source = CocoPages(*write(tmp_path, [image(1)], [outlined, annotation(1, [5, 5, 2, 2], area=1, iscrowd=1)]))
    assert source.read(0)[2].tolist() == [[1, 2, 4, 6]]
    assert [(a["area"], a["iscrowd"]) for a in source.ground_truth()["annotations"]] == [(12, 0), (1, 1)]


def test_a_json_too_deep_to_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(PageError, match=r"deep\.json: not JSON"):
        read_coco(tmp_path / "deep.json")


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "x\0.png", "\ud800.png", ""])
def test_a_file_name_that_no_file_can_have_is_missing(tmp_path: Path, name: str) -> None:
    images, annotations = write(tmp_path, [image(1)], [])
    content = json.loads(annotations.read_text())
    content["images"][0]["file_name"] = name
    annotations.write_text(json.dumps(content))
    with pytest.raises(PageError, match=r"1 of 1 images .* missing"):
        CocoPages(images, annotations)


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(PageError, match=re.escape(str(tmp_path / "none.json"))):
        CocoPages(tmp_path, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (PagesConfig(), "data.val: name images and annotations"),
        (PagesConfig(annotations="a.json"), "data.val.images: name the folder with the images of a.json"),
        (PagesConfig(images="pages"), "data.val.annotations: name the COCO json of pages"),
    ],
)
def test_pages_that_are_named_by_half_are_refused(pages: PagesConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(pages, "data.val")


# EXIF: the json rules


@pytest.mark.parametrize("upright", [True, False])
def test_a_rotated_image_is_turned_only_where_that_makes_it_fit_the_json(tmp_path: Path, upright: bool) -> None:
    entry = image(1, 20, 40) if upright else image(1, 40, 20)
    images, annotations = write(tmp_path, [entry], [])
    page = np.full((20, 40, 3), 255, np.uint8)
    page[:, :5] = 0  # the left as it is stored is the top as it is seen
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(page).save(images / "1.png", exif=exif)
    found = CocoPages(images, annotations).read(0)[0]
    assert found.shape[:2] == (entry["height"], entry["width"])
    assert (found[:5] == 0).all() == upright
    assert (found[:, :5] == 0).all() != upright


# Batches
