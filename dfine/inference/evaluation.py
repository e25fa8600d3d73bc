"""COCO metrics of a model: what it finds on pages, and how pycocotools rates that."""

import contextlib
import io
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_convert, box_iou, nms
from tqdm import tqdm

from dfine import distributed
from dfine.checkpoints.loading import listed, matched
from dfine.checkpoints.onnx_format import OnnxModel
from dfine.config import ConfigError
from dfine.data.sources import Source
from dfine.inference import THRESHOLD
from dfine.model.detector import DFine, detect
from dfine.structures import Batch, Detections

# COCO's twelve numbers, in the order of `COCOeval.stats`: over IoU .50 to .95 and at most 100 boxes a page unless the
# name says otherwise; s, m, l are boxes of up to 32^2, up to 96^2 and more square pixels of the original page.
OFFICIAL = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MAX_DETECTIONS = [1, 10, 100, 300]  # a page: COCO's three, and as many as `detect` gives


class Stopped(Exception):
    """An evaluation was given up because a process was told to stop; raised in every process."""


def evaluate(
    model: DFine,
    batches: DataLoader[Batch],
    pages: Source,
    bf16: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The metrics of `coco_metrics`, in every process; all must call it. Leaves the model in evaluation mode."""
    numbers, results = find(model, batches, pages, bf16, stop)
    return coco_metrics(pages.ground_truth(numbers), results)


@torch.inference_mode()
def answer(
    model: DFine | OnnxModel, images: Tensor, sizes: Tensor, originals: list[tuple[int, int]], bf16: bool = False
) -> list[Detections]:
    """All that a model of either kind finds on each page of a batch, as `detect` gives it.

    Args:
        model: in evaluation mode. images: (B, 3, H, W) uint8. sizes: (B, 2) valid height, width.
        originals: height, width of each page in the pixels that boxes are wanted in. bf16: autocast, on a GPU.
    """
    if isinstance(model, OnnxModel):
        return model(images, sizes, originals)
    device = model.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda"):
        output = model(images.to(device, non_blocking=True), sizes)
    return detect(output, originals)


def find(
    model: DFine | OnnxModel,
    batches: DataLoader[Batch],
    pages: Source,
    bf16: bool = False,
    stop: Callable[[], bool] = lambda: False,
    category_ids: Sequence[int | None] | None = None,
    dedupe: float = 1.0,
) -> tuple[list[int], np.ndarray]:
    """What is found on this process's pages: up to 300 a page, pages in the order of the json, the best first.

    Leaves the model in evaluation mode: it is the averaged one, which never trains.

    Args:
        batches: this process's share of the pages. bf16: autocast, on a GPU. stop: asked before each batch.
        category_ids: the json's id of each class of the model, None to leave a class out; by default the classes are
            the json's categories in order.
        dedupe: as for `without_doubles`.
    Returns:
        the numbers of the pages, and the results of `coco_rows`
    Raises:
        FloatingPointError: a score or a box is not finite; names the image id.
        Stopped: a process was told to stop (others that were not told finish their batches first).
    """
    if isinstance(model, DFine):
        model.eval()
    share: dict[int, Detections] = {}
    for batch in tqdm(batches, "evaluation", unit="batch", leave=False, disable=not distributed.is_main()):
        if stop():
            break
        found = answer(model, batch.images, batch.sizes, [target.size for target in batch.targets], bf16)
        for target, page in zip(batch.targets, found, strict=True):
            share[target.image_id] = without_doubles(finite(page, f"image {target.image_id}"), dedupe)
    if distributed.any_process(stop()):
        raise Stopped
    category_ids = category_ids or [category["id"] for category in pages.categories]
    ids = enumerate(pages.ids.tolist())
    own = {number: coco_rows(image_id, share[image_id], category_ids) for number, image_id in ids if image_id in share}
    return [*own], np.concatenate([np.empty((0, 7)), *own.values()])


def finite(found: Detections, page: str) -> Detections:
    """The detections, in memory of their own: views would keep and send the whole batch.

    Raises:
        FloatingPointError: a score or a box is not finite; names the page.
    """
    found = Detections(*(x.clone() for x in found))
    if not (found.scores.isfinite().all() and found.boxes.isfinite().all()):
        raise FloatingPointError(f"{page}: a detection is not finite")
    return found


def without_doubles(found: Detections, dedupe: float) -> Detections:
    """Of boxes that overlap with more than this IoU only the best, whatever their classes, the best first; 1: all."""
    return Detections(*(x[nms(found.boxes, found.scores, dedupe)] for x in found))


def category_ids(
    own: list[dict[str, Any]], pages: list[dict[str, Any]], checkpoint: str, source: str = "data.val"
) -> list[int | None]:
    """The id among the pages' categories of each class of a model; None: the pages do not have the class.

    Classes go by name, whatever their ids; case, `-`, `_` and spaces do not matter. Those of published weights without
    names go by number, if the json has as many.

    Args:
        own, pages: categories of the model and of the pages. checkpoint, source: where they are from, for messages.
    Raises:
        ConfigError: the model lacks one of the pages' classes; names both sides.
    """
    names = [category["name"] for category in own]
    if names == [str(i) for i in range(len(pages))]:
        return sorted(category["id"] for category in pages)
    labels = matched(names, [category["name"] for category in pages])
    if None in labels:
        unknown = [category["name"] for category, label in zip(pages, labels, strict=True) if label is None]
        raise ConfigError(f"{source}: has {', '.join(unknown)}, which {checkpoint} does not know: {listed(names)}")
    ids = {label: category["id"] for category, label in zip(pages, labels, strict=True)}
    return [ids.get(label) for label in range(len(own))]


def ids_by_name(
    classes: Sequence[str], own: list[dict[str, Any]], pages: list[dict[str, Any]], checkpoint: str
) -> list[int | None]:
    """As `category_ids`, but people say it: `Title=title`. Several classes may be one of the pages'; None: not named.

    Raises:
        ConfigError: not such a pair, a name that the one or the other side does not know, or a class named twice.
    """
    names, ids = [category["name"] for category in own], {category["name"]: category["id"] for category in pages}
    chosen: dict[str, int] = {}
    for pair in classes:
        name, _, theirs = pair.partition("=")
        if name not in names:
            raise ConfigError(f"--classes {pair}: {checkpoint} has no class {name!r}, but {listed(names)}")
        if theirs not in ids:
            raise ConfigError(f"--classes {pair}: data.val has no class {theirs!r}, but {listed([*ids])}")
        if name in chosen:
            raise ConfigError(f"--classes {pair}: {name} is there twice")
        chosen[name] = ids[theirs]
    return [chosen.get(name) for name in names]


def coco_rows(image_id: int, found: Detections, category_ids: Sequence[int | None]) -> np.ndarray:
    """Detections of one page as rows of image id, x, y, width, height, score, category id: (K, 7) float64.

    Boxes are in pixels to three decimals, scores to six. Classes whose category id is None are left out.
    """
    ids = np.array([np.nan if i is None else i for i in category_ids])[found.labels.numpy()]
    xywh = rounded(box_convert(found.boxes.double(), "xyxy", "xywh").numpy(), 3)
    scores = rounded(found.scores.double().numpy(), 6)
    return np.column_stack([np.full(len(ids), image_id), xywh, scores, ids])[~np.isnan(ids)]


def rounded(x: np.ndarray, digits: int) -> np.ndarray:
    """As Python rounds: numpy multiplies before it rounds, which errs where a digit is followed by nearly a half."""
    y = np.round(x, digits)
    halves = np.abs(np.abs(x) * 10**digits % 1 - 0.5) < 1e-3
    y[halves] = [round(value, digits) for value in x[halves].tolist()]
    return y


def coco_results(rows: np.ndarray) -> list[dict[str, Any]]:
    """COCO results of the rows of `coco_rows`."""
    return [
        {"image_id": int(image_id), "category_id": int(category_id), "bbox": bbox, "score": score}
        for image_id, *bbox, score, category_id in rows.tolist()
    ]


def coco_metrics(ground_truth: dict[str, Any], detections: np.ndarray | list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of pycocotools, as fractions of 1; None where there is no truth to measure against.

    All processes must call it, each with its own pages, and get what one process would get, to the last digit: each
    matches its pages, and accumulates some classes and ranges of areas over all.

    Args:
        ground_truth: a COCO dictionary; annotation ids must not be 0.
        detections: (N, 7) as `coco_rows` has them, or COCO results; may be empty.
    Returns:
        COCO's twelve numbers by the names in `OFFICIAL`; `AP_300`, the AP with up to 300 boxes a page; `per_class`, AP
        and AP50 by class name, with the id behind a name that several classes have; and `shown`: how good the
        detections are that people see, those with a score of .3 or more: `precision` and `recall` at IoU .5, and
        `duplicates`, how many a page have an IoU above .7 with a better one of their class: `predict` would drop them
    """
    if isinstance(detections, list):
        rows = [[each["image_id"], *each["bbox"], each["score"], each["category_id"]] for each in detections]
        detections = np.array(rows, dtype=np.float64).reshape(-1, 7)
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    result = COCOeval(iouType="bbox")
    result.params.maxDets = MAX_DETECTIONS
    areas = result.params.areaRng
    matches = match(ground_truth, detections, len(categories) * len(areas))
    kinds, world = range(len(matches)), distributed.world_size()
    parts = {kind: distributed.gather(matches.pop(0), to=kind % world) for kind in kinds}
    own = {kind: [page for _, page in sorted(itertools.chain(*part))] for kind, part in parts.items() if part}
    accumulated = {kind: accumulate(pages, areas[kind % len(areas)]) for kind, pages in own.items()}
    counts = np.zeros(3, int) + sum(seen(pages) for kind, pages in own.items() if kind % len(areas) == 0)
    counts = [*counts, duplicates(detections), len(ground_truth["images"])]
    everywhere = distributed.gather((accumulated, counts))
    accumulated = dict(itertools.chain(*(part.items() for part, _ in everywhere)))
    for i, name in enumerate(("precision", "recall")):
        numbers = np.stack([accumulated[kind][i] for kind in kinds], axis=-2)
        result.eval[name] = numbers.reshape(*numbers.shape[:-2], len(categories), len(areas), -1)
    with silence():
        result.summarize()
    precision = result.eval["precision"][:, :, :, 0]  # (IoU thresholds, recalls, classes, MAX_DETECTIONS), any area
    official, most = MAX_DETECTIONS.index(100), MAX_DETECTIONS.index(300)
    metrics: dict[str, Any] = {name: _mean(value) for name, value in zip(OFFICIAL, result.stats, strict=True)}
    metrics["AP_300"] = _mean(precision[..., most])
    often = Counter(category["name"] for category in categories)
    names = [c["name"] if often[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories]
    metrics["per_class"] = {
        name: {"AP": _mean(precision[:, :, i, official]), "AP50": _mean(precision[0, :, i, official])}
        for i, name in enumerate(names)
    }
    truths, found, right, double, pages = np.sum([part for _, part in everywhere], axis=0).tolist()
    metrics["shown"] = {
        "precision": right / found if found else None,
        "recall": right / truths if truths else None,
        "duplicates": double / max(1, pages),
    }
    return metrics


def silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Around calls of pycocotools, which prints; and around nothing else, which may have something to say."""
    return contextlib.redirect_stdout(io.StringIO())


class Matching(COCOeval):
    """Keeps what is read later, in a tenth of the memory."""

    def evaluateImg(self, *which: Any) -> dict[str, np.ndarray] | None:
        page = super().evaluateImg(*which)
        return page and {
            "dtScores": np.array(page["dtScores"]),
            "dtMatches": page["dtMatches"] > 0,
            "dtIgnore": page["dtIgnore"].astype(bool),
            "gtIgnore": page["gtIgnore"].astype(bool),
        }


def match(ground_truth: dict[str, Any], detections: np.ndarray, kinds: int) -> list[list[tuple[int, Any]]]:
    """What `COCOeval` says of each class and range of areas: of each page, by its image id."""
    ids = np.array(sorted(image["id"] for image in ground_truth["images"]), np.int64)
    truths = sorted(ground_truth["annotations"], key=lambda thing: thing["image_id"])
    order = np.argsort(detections[:, 0], kind="stable")
    of_truth, of_rows = np.array([thing["image_id"] for thing in truths]), detections[order, 0]
    matches: list[list[tuple[int, Any]]] = [[] for _ in range(kinds)]
    for first in range(0, len(ids), 200):  # as dictionaries, the detections of all pages would take gigabytes
        pages = ids[first : first + 200].tolist()
        things, rows = (slice(*np.searchsorted(of, [pages[0], pages[-1] + 1])) for of in (of_truth, of_rows))
        truth = COCO()
        truth.dataset = ground_truth | {"images": [{"id": page} for page in pages], "annotations": truths[things]}
        # loadRes fails on an empty list, and gives outlines to results without.
        results = [each | {"segmentation": None} for each in coco_results(detections[order[rows]])]
        with silence():
            truth.createIndex()
            result = Matching(truth, truth.loadRes(results) if results else COCO(), "bbox")
            result.params.maxDets = MAX_DETECTIONS
            result.evaluate()
        for kind, own in enumerate(matches):
            own += zip(pages, result.evalImgs[kind * len(pages) :], strict=False)
    return matches


def accumulate(pages: list[Any], area: list[float]) -> list[np.ndarray]:
    """Precision (IoU thresholds, recalls, MAX_DETECTIONS) and recall (IoU thresholds, MAX_DETECTIONS) of one class."""
    parts = []
    for part in (slice(first, first + 2) for first in range(0, 10, 2)):  # of the thresholds: all would take a gigabyte
        result = COCOeval(iouType="bbox")
        result.params.iouThrs, result.params.maxDets = result.params.iouThrs[part], MAX_DETECTIONS
        result.params.catIds, result.params.areaRng, result.params.imgIds = [1], [area], range(len(pages))
        result.evalImgs = [
            page and page | {key: page[key][part] for key in ("dtMatches", "dtIgnore")} for page in pages
        ]
        result._paramsEval = result.params
        with silence():
            result.accumulate()
        parts.append((result.eval["precision"][:, :, 0, 0], result.eval["recall"][:, 0, 0]))
    return [np.concatenate(both) for both in zip(*parts, strict=True)]


def seen(pages: list[dict[str, np.ndarray]]) -> np.ndarray:
    """How many boxes there are, how many detections people see, and how many of these are right."""
    counts = np.zeros(3, int)
    for page in filter(None, pages):
        counted = (page["dtScores"] >= THRESHOLD) & ~page["dtIgnore"][0]
        counts += [(~page["gtIgnore"]).sum(), counted.sum(), (page["dtMatches"][0] & counted).sum()]
    return counts


def duplicates(detections: np.ndarray) -> int:
    """How many of the detections that people see have an IoU above .7 with a better one of their page and class."""
    rows = detections[detections[:, 5] >= THRESHOLD]
    rows = rows[np.lexsort((-rows[:, 5], rows[:, 6], rows[:, 0]))]
    count = 0
    for group in np.split(rows, np.flatnonzero((np.diff(rows[:, [0, 6]], axis=0) != 0).any(1)) + 1):
        boxes = box_convert(torch.from_numpy(group[:, 1:5]), "xywh", "xyxy")
        count += int((box_iou(boxes, boxes).triu(1) > 0.7).any(0).sum())  # [i, j]: i is better than j
    return count


def _mean(values: np.ndarray) -> float | None:
    """The mean without the entries of -1, by which pycocotools says that there is no truth; None if all are."""
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def table(metrics: dict[str, Any]) -> str:
    """The metrics as plain text: all classes in a few lines, then a line a class."""
    numbers = {name: value for name, value in metrics.items() if name not in ("per_class", "shown")}
    people = ", ".join(f"{name} {_cell(value).strip()}" for name, value in metrics["shown"].items())
    width = max(len(name) for name in (*metrics["per_class"], "class"))
    return "\n".join(
        [
            "".join(f"{name:>7}" for name in numbers),
            "".join(map(_cell, numbers.values())),
            f"scores from {THRESHOLD} on: {people} a page",
            "",
            f"{'class':{width}}     AP   AP50",
            *(f"{name:{width}}{_cell(m['AP'])}{_cell(m['AP50'])}" for name, m in metrics["per_class"].items()),
        ]
    )


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>7}"
