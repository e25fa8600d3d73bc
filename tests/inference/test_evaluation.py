"""COCO metrics one can trust."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_folder import CATEGORIES, annotation, evaluated, five_pages, image, write
from processes import ends, launch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import shaken, tiny_model

from dfine import distributed
from dfine.config import PagesConfig
from dfine.data.batches import evaluation_loader
from dfine.data.sources import CocoPages
from dfine.inference.evaluation import OFFICIAL, coco_metrics, coco_results, coco_rows, evaluate, find, table
from dfine.model.detector import DFine
from dfine.structures import Detections


def truth(tmp_path: Path, annotations: list[dict[str, Any]], pages: int = 2) -> dict[str, Any]:
    source = CocoPages(*write(tmp_path, [image(i, 300, 400) for i in range(pages)], annotations))
    return source.ground_truth(range(pages))


def found(like: list[dict[str, Any]], score: float = 0.9) -> np.ndarray:
    """Detections of exactly these annotations."""
    return np.array([[a["image_id"], *a["bbox"], score, a["category_id"]] for a in like]).reshape(-1, 7)


THREE = [annotation(0, [10, 10, 50, 40]), annotation(0, [80, 10, 50, 200], 3), annotation(1, [5, 5, 20, 20], 1)]


# The metric


def test_finding_everything_gives_1_and_classes_without_truth_do_not_count(tmp_path: Path) -> None:
    metrics = coco_metrics(truth(tmp_path, THREE), found(THREE))
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "AP_300"):
        assert metrics[name] == pytest.approx(1)
    assert metrics["per_class"]["text"] == pytest.approx({"AP": 1, "AP50": 1})
    assert metrics["per_class"]["table"] == pytest.approx({"AP": 1, "AP50": 1})
    assert metrics["per_class"]["figure"] == {"AP": None, "AP50": None}


def test_finding_what_a_model_is_taught_gives_1_also_where_truth_leaves_its_page(tmp_path: Path) -> None:
    """It knows the boxes as training clips them, and its own are clipped."""
    boxes = [[-200, 10, 260, 40], [250, 300, 200, 300], [80, 100, 50, 200], [310, 0, 50, 50]]
    images, file = write(tmp_path, [image(0, 300, 400)], [annotation(0, box) for box in boxes])
    source = CocoPages(images, file)
    _, _, taught = source.read(0)
    everything = [annotation(0, [x1, y1, x2 - x1, y2 - y1]) for x1, y1, x2, y2 in taught.tolist()]
    metrics = coco_metrics(source.ground_truth([0]), found(everything))
    assert (metrics["AP"], metrics["AR100"]) == pytest.approx((1, 1))


def test_finding_nothing_gives_0(tmp_path: Path) -> None:
    metrics = coco_metrics(truth(tmp_path, THREE), found([]))
    assert {metrics[name] for name in (*OFFICIAL, "AP_300")} == {0.0}
    assert metrics["per_class"]["text"] == {"AP": 0.0, "AP50": 0.0}


def test_what_people_see_has_a_score_of_at_least_point_3_and_doubles_are_counted_within_a_class(
    tmp_path: Path,
) -> None:
    shifted = THREE[0] | {"bbox": [11, 10, 50, 40]}  # IoU .96 with the first
    other_class = shifted | {"category_id": 3}
    moved = shifted | {"bbox": [25, 10, 50, 40]}  # IoU .54: a mistake, but no duplicate
    unseen = found(THREE[2:], 0.29)  # right, with too low a score
    detections = [*found(THREE[:2]), *found([shifted, other_class, moved], 0.6), *unseen]
    metrics = coco_metrics(truth(tmp_path, THREE), np.array(detections))
    assert metrics["shown"] == pytest.approx({"precision": 2 / 5, "recall": 2 / 3, "duplicates": 1 / 2})
    assert coco_metrics(truth(tmp_path, THREE), coco_results(np.array(detections))) == metrics
    nothing = coco_metrics(truth(tmp_path, []), found([]))
    assert nothing["shown"] == {"precision": None, "recall": None, "duplicates": 0}


def test_without_any_truth_there_is_nothing_to_say(tmp_path: Path) -> None:
    metrics = coco_metrics(truth(tmp_path, []), found(THREE))
    assert {metrics[name] for name in (*OFFICIAL, "AP_300")} == {None}


def test_finding_a_class_on_the_wrong_page_or_under_the_wrong_name_is_wrong(tmp_path: Path) -> None:
    other_page = [a | {"image_id": 1 - a["image_id"]} for a in THREE]
    other_class = [a | {"category_id": 7} for a in THREE]
    for wrong in (other_page, other_class):
        assert coco_metrics(truth(tmp_path, THREE), found(wrong))["AP50"] == 0.0


def test_an_annotation_with_id_0_can_be_found(tmp_path: Path) -> None:
    assert coco_metrics(truth(tmp_path, THREE[:1]), found(THREE[:1]))["AP"] == pytest.approx(1)


def test_boxes_in_a_crowd_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    crowd = annotation(0, [100, 100, 150, 200], iscrowd=1)
    inside = annotation(0, [120, 120, 60, 60])
    everything = np.concatenate([found([inside], 0.95), found(THREE)])
    metrics = coco_metrics(truth(tmp_path, [*THREE, crowd]), everything)
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["shown"] == pytest.approx({"precision": 1, "recall": 1, "duplicates": 0})
    assert coco_metrics(truth(tmp_path, THREE), everything)["AP"] < 0.9


def test_ap_counts_100_boxes_of_a_class_and_page_and_ap_300_more(tmp_path: Path) -> None:
    boxes = [annotation(0, [10 * (i % 20), 10 * (i // 20), 8, 8]) for i in range(200)]
    metrics = coco_metrics(truth(tmp_path, boxes), found(boxes))
    assert metrics["AR100"] == 0.5
    assert metrics["AP"] == pytest.approx(0.5, abs=0.01)
    assert metrics["AP_300"] == pytest.approx(1)


def test_the_twelve_numbers_and_those_of_the_classes_are_pycocotools_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    boxes = [
        annotation(int(random.integers(4)), [*random.uniform(0, 200, 2), *random.uniform(8, 120, 2)], int(category))
        for category in random.choice([1, 3, 7], 60)
    ]
    moved = [a | {"bbox": [x + random.normal(0, 3) for x in a["bbox"]]} for a in boxes if random.random() < 0.8]
    detections = found(moved + moved[:20])
    detections[:, 5] = random.random(len(detections))
    ground_truth = truth(tmp_path, boxes, pages=4)
    metrics = coco_metrics(copy.deepcopy(ground_truth), detections)
    assert capsys.readouterr().out == ""

    def official(categories: list[int]) -> list[float]:
        reference = COCO()
        reference.dataset = copy.deepcopy(ground_truth)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(detections), "bbox")
        evaluation.params.catIds = categories
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return list(evaluation.stats)

    assert [metrics[name] for name in OFFICIAL] == official([1, 3, 7])
    assert 0 < metrics["AP"] < 1
    for category in CATEGORIES:
        numbers = metrics["per_class"][category["name"]]
        assert [numbers["AP"], numbers["AP50"]] == pytest.approx(official([category["id"]])[:2])


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "text"}, {"id": 3, "name": "text"}, {"id": 7, "name": "figure"}]
    source = CocoPages(*write(tmp_path, [image(0, 300, 400)], THREE[:2], categories))
    metrics = coco_metrics(source.ground_truth([0]), found(THREE[:1]))
    assert {name: numbers["AP"] for name, numbers in metrics["per_class"].items()} == {
        "text (id 1)": pytest.approx(1),
        "text (id 3)": 0,
        "figure": None,
    }


def test_measuring_leaves_the_detections_as_they_are(tmp_path: Path) -> None:
    detections = found(THREE)
    coco_metrics(truth(tmp_path, THREE), detections)
    assert (detections == found(THREE)).all()


def test_labels_go_back_to_the_category_ids_of_the_json_and_boxes_to_xywh() -> None:
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0 / 3.0, 1.0]])
    rows = coco_rows(5, Detections(torch.tensor([0.75, 0.5]), torch.tensor([2, 0]), boxes), [1, 3, 7])
    assert coco_results(rows) == [
        {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 6], "score": 0.75},
        {"image_id": 5, "category_id": 1, "bbox": [0, 0, 0.333, 1], "score": 0.5},
    ]


def test_scores_that_differ_by_a_millionth_are_told_apart() -> None:
    scores = torch.tensor([0.123457, 0.123456], dtype=torch.float64)
    rows = coco_rows(5, Detections(scores, torch.tensor([0, 0]), torch.zeros(2, 4)), [1])
    assert rows[:, 5].tolist() == [0.123457, 0.123456]


def test_results_are_rounded_as_python_rounds() -> None:
    """2.6755 is a little less in binary, and 1000 times that is not; an exact half goes to the even digit."""
    numbers = [2.6755, 0.0005, 0.0625, 0.1875, 1.0005, 3.4565, *np.random.default_rng(0).uniform(0, 900, 10_000)]
    boxes = torch.tensor([[x, 0, 2 * x, 1] for x in numbers], dtype=torch.float64)
    count = len(numbers)
    rows = coco_rows(5, Detections(torch.ones(count), torch.zeros(count, dtype=torch.int64), boxes), [1])
    assert rows[:, 1].tolist() == [round(x, 3) for x in numbers]


def test_on_a_cpu_pages_are_evaluated_in_full_precision_whatever_a_gpu_would_do(pages: PagesConfig) -> None:
    source = CocoPages(pages.images, pages.annotations)
    loader = evaluation_loader(source, evaluated(pages))
    one, other = (find(model(), loader, source, bf16=bf16)[1] for bf16 in (True, False))
    assert (one == other).all()


def test_the_table_shows_all_classes_and_a_dash_where_there_is_no_truth(tmp_path: Path) -> None:
    lines = table(coco_metrics(truth(tmp_path, THREE), found(THREE))).splitlines()
    assert lines[0].split() == [*OFFICIAL, "AP_300"]
    assert lines[1].split()[0] == "1.000"
    assert [line.split() for line in lines[-3:]] == [
        ["text", "1.000", "1.000"],
        ["table", "1.000", "1.000"],
        ["figure", "-", "-"],
    ]


# The model on pages


@pytest.fixture
def pages(tmp_path: Path) -> PagesConfig:
    return five_pages(tmp_path / "pages")


def model() -> DFine:
    return shaken(tiny_model()).eval()


def test_every_page_is_found_on_once_in_the_order_of_the_json_whatever_the_batches(pages: PagesConfig) -> None:
    source = CocoPages(pages.images, pages.annotations)
    by_size = [
        coco_results(find(model(), evaluation_loader(source, evaluated(pages, size)), source)[1]) for size in (1, 2)
    ]  # 8 queries of 3 classes: 24 detections a page
    for results in by_size:
        assert [r["image_id"] for r in results] == [i for i in (9, 0, 4, 2, 7) for _ in range(24)]
        assert {r["category_id"] for r in results} <= {1, 3, 7}
    sizes = dict(zip(source.ids, source.sizes, strict=True))
    for one, two in zip(*by_size, strict=True):
        assert one["score"] == pytest.approx(two["score"], abs=1e-5)
        x, y, width, height = one["bbox"]
        assert 0 <= x <= x + width <= sizes[one["image_id"]][1] + 1e-3
        assert 0 <= y <= y + height <= sizes[one["image_id"]][0] + 1e-3


def test_each_process_finds_on_pages_of_its_own(pages: PagesConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CocoPages(pages.images, pages.annotations)
    numbers, alone = find(model(), evaluation_loader(source, evaluated(pages)), source)
    assert numbers == [*range(5)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "any_process", lambda flag: flag)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own, rows = find(model(), evaluation_loader(source, evaluated(pages)), source)
        assert (rows == alone[np.isin(alone[:, 0], source.ids[own])]).all()
        shares += own
    assert sorted(shares) == numbers  # each page in one share


def made_up(pages: int, detections: int, share: slice) -> tuple[dict[str, Any], np.ndarray]:
    """Truth and detections of some pages, with many equal scores, classes without truth, crowds and empty pages."""
    random = np.random.default_rng(0)
    boxes = [[*random.uniform(0, 200, 2), *random.uniform(4, 150, 2)] for _ in range(4 * pages)]
    things = [
        {"id": i + 1, "image_id": int(random.integers(pages)), "category_id": int(random.choice([1, 3])), "bbox": box}
        | {"area": box[2] * box[3], "iscrowd": int(random.random() < 0.05)}
        for i, box in enumerate(boxes)
    ]
    like = [things[i] for i in random.integers(len(things), size=detections)]
    rows = found(like)
    rows[:, 1:5] += random.normal(0, 4, (detections, 4))
    rows[:, 3:5] = rows[:, 3:5].clip(1)
    rows[:, 5] = random.random(detections).round(2)
    rows[:, 6] = np.where(random.random(detections) < 0.9, rows[:, 6], random.choice([1, 3, 7], detections))
    own = range(pages)[share]
    truth = {"images": [{"id": i} for i in own], "annotations": [a for a in things if a["image_id"] in own]}
    return truth | {"categories": CATEGORIES}, rows[np.isin(rows[:, 0], own)]


def measure_share(pages: int, detections: int, folder: Path) -> None:
    distributed.start()
    rank = distributed.rank()
    share = slice(rank, None, distributed.world_size())
    metrics = coco_metrics(*made_up(pages, detections, share))
    (folder / str(rank)).write_text(json.dumps(metrics))
    distributed.finish()


@pytest.mark.parametrize(("pages", "detections"), [(500, 40_000), (1, 5)], ids=["many", "none for one process"])
def test_several_processes_measure_what_one_does_to_the_last_digit(tmp_path: Path, pages: int, detections: int) -> None:
    assert ends(launch(measure_share, pages, detections, tmp_path)) == [0, 0]
    truth, rows = made_up(pages, detections, slice(None))
    alone = json.loads(json.dumps(coco_metrics(truth, rows)))
    assert alone["AP50"] > 0.1
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [alone] * 2


def test_a_detection_that_is_not_finite_is_an_error_and_names_the_image(pages: PagesConfig) -> None:
    source = CocoPages(pages.images, pages.annotations)
    broken = model()
    with torch.no_grad():
        broken.mean.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="image 9: a detection is not finite"):
        evaluate(broken, evaluation_loader(source, evaluated(pages)), source)
