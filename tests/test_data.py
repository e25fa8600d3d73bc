"""Pages and their boxes: nothing is lost, moved or mixed up on the way from the json to a batch."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import CATEGORIES, annotation, image, write
from PIL import Image

from dfine import distributed
from dfine.config import Config, ConfigError, DataConfig, PagesConfig, TrainConfig
from dfine.data import PageDataset, PageKey, TrainBatches, evaluation_batches, evaluation_loader, train_loader
from dfine.sources import CocoPages, open_source, read_coco
from dfine.transforms import PageError, canvas_of, fit

SMALL = DataConfig(batch_size=2, workers=0, short_edges=(32, 64), eval_short_edge=32, max_long_edge=96)


def sample(source: CocoPages, index: int, training: bool = False) -> tuple[np.ndarray, Any]:
    return PageDataset(source, SMALL, seed=0, training=training)[PageKey(index, 64, 0)]


# The json


def test_pages_without_boxes_stay(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1), image(2), image(3)], [annotation(2, [1, 2, 3, 4])]))
    assert source.ids == [1, 2, 3]
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
    assert "4 empty boxes dropped" in source.summary()


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


def test_boxes_go_to_their_page_whatever_the_order_of_the_json_and_image_id_0_is_an_id(tmp_path: Path) -> None:
    annotations = [annotation(9, [9, 9, 9, 9]), annotation(0, [1, 1, 1, 1]), annotation(9, [2, 2, 2, 2])]
    source = CocoPages(*write(tmp_path, [image(9), image(4), image(0)], annotations))
    assert [source.read(i)[2][:, 0].tolist() for i in range(3)] == [[9, 2], [], [1]]
    assert [sample(source, i)[1].image_id for i in range(3)] == [9, 4, 0]


def test_annotations_are_renumbered_from_1(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1)], [annotation(1, [0, 0, 2, 3]), annotation(1, [1, 1, 1, 1])]))
    assert [(a["id"], a["area"]) for a in source.ground_truth()["annotations"]] == [(1, 6), (2, 1)]


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
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\]: bbox must be list, found None"),
        ({"annotations": [7]}, r"annotations\[0\]: expected an object, found 7"),
        ({"images": [image(1), image(1)]}, r"images\[1\]: id 1 occurs twice"),
        ({"images": [image(1) | {"width": "30"}]}, r"images\[0\]: width must be int, found '30'"),
        ({"images": [image(1) | {"height": 0}]}, r"images\[0\]: height must be 1 or more"),
        ({"categories": [{"id": 1}]}, r"categories\[0\]: name must be str, found None"),
        ({"categories": []}, "holds no categories"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = {"images": [image(1)], "annotations": [], "categories": CATEGORIES} | change
    (tmp_path / "pages.json").write_text(json.dumps(content))
    with pytest.raises(PageError, match=rf"pages\.json: {message}"):
        read_coco(tmp_path / "pages.json")


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


def many_sizes(count: int) -> list[tuple[int, int]]:
    random = np.random.default_rng(0)
    return [(int(h), int(w)) for h, w in random.integers(50, 200, (count, 2))]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_every_page_comes_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[int] = Counter()
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        batches = list(TrainBatches(many_sizes(36), SMALL, seed=0, accumulate=2))
        assert len(batches) == 6
        seen.update(key.page for batch in batches for key in batch)
    assert seen == Counter(range(36))


def test_an_epoch_is_filled_up_to_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, 1)
    sampler = TrainBatches(many_sizes(9), SMALL, seed=0, accumulate=4)
    counts = Counter(key.page for batch in sampler for key in batch)
    assert len(sampler) == 8
    assert sum(counts.values()) == 16
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 9


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def batches(seed: int, epoch: int) -> list[list[PageKey]]:
        sampler = TrainBatches(many_sizes(30), SMALL, seed, 1)
        sampler.set_position(epoch, 0)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    pages = [[[key.page for key in batch] for batch in batches(*which)] for which in ((1, 2), (1, 3), (2, 2))]
    assert pages[0] != pages[1]
    assert pages[0] != pages[2]


def test_a_resumed_epoch_gives_the_rest_of_the_same_batches() -> None:
    sampler = TrainBatches(many_sizes(30), SMALL, seed=0, accumulate=1)
    sampler.set_position(4, 0)
    whole = list(sampler)
    sampler.set_position(4, 6)
    assert list(sampler) == whole[6:]


def test_all_processes_draw_the_same_edge_and_all_edges_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        batches = list(TrainBatches(many_sizes(80), SMALL, seed=0, accumulate=1))
        assert all(len({key.short_edge for key in batch}) == 1 for batch in batches)
        edges.append([batch[0].short_edge for batch in batches])
    assert edges[0] == edges[1]
    assert set(edges[0]) == {32, 64}


def test_pages_of_like_aspect_share_a_batch() -> None:
    sizes = many_sizes(200)
    spread = [np.ptp([sizes[key.page][0] / sizes[key.page][1] for key in b]) for b in TrainBatches(sizes, SMALL, 0, 1)]
    random = np.random.default_rng(0).permutation(200).reshape(-1, 2)
    chance = [np.ptp([sizes[page][0] / sizes[page][1] for page in pair]) for pair in random]
    assert np.mean(spread) < np.mean(chance) / 5


def test_evaluation_takes_every_page_once_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = many_sizes(50)
    pages: list[int] = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        pages += [key.page for batch in evaluation_batches(sizes, SMALL, 32) for key in batch]
    assert sorted(pages) == list(range(50))


def test_evaluation_batches_hold_pages_of_one_canvas() -> None:
    sizes = many_sizes(50)
    batches = evaluation_batches(sizes, SMALL, 32)
    assert max(len(batch) for batch in batches) == SMALL.batch_size
    for batch in batches:
        assert len({canvas_of([fit(sizes[key.page], 32, 96)], 32) for key in batch}) == 1


def test_a_page_is_augmented_by_seed_epoch_and_page_whoever_loads_it(tmp_path: Path) -> None:
    annotations = [annotation(i, [5, 5, 12, 20]) for i in range(6)]
    images, file = write(tmp_path, [image(i) for i in range(6)], annotations)
    for path in images.iterdir():
        Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    source = CocoPages(images, file)

    def batches(workers: int, start: int) -> list[Any]:
        data = DataConfig(batch_size=2, workers=workers, short_edges=(32, 64))
        loader, sampler = train_loader(source, Config(data=data, train=TrainConfig(seed=3)))
        sampler.set_position(1, start)
        return list(loader)

    alone = batches(workers=0, start=0)
    for batch, other in zip(alone[1:], batches(workers=2, start=1), strict=True):
        assert torch.equal(batch.images, other.images)
        assert all(torch.equal(a.boxes, b.boxes) for a, b in zip(batch.targets, other.targets, strict=True))


def test_a_batch_lays_pages_in_the_upper_left_corner_and_says_how_large_they_are(tmp_path: Path) -> None:
    source = CocoPages(*write(tmp_path, [image(1, 100, 110), image(2, 98, 100)], []))
    config = Config(data=SMALL)
    (batch,) = evaluation_loader(source, config)
    assert batch.images.shape == (2, 3, 64, 32)
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[35, 32], [33, 32]]
    assert [target.image_id for target in batch.targets] == [1, 2]
    for page, (height, width) in zip(batch.images, batch.sizes.tolist(), strict=True):
        assert (page[:, :height, :width] == 255).all()
        assert page.sum() == 255 * 3 * height * width
