"""COCO metrics of a model: what it finds on pages, and how pycocotools rates that."""

import contextlib
import io
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
    detections = find(model, batches, pages, bf16, stop)
    metrics = coco_metrics(pages.ground_truth(), detections) if distributed.is_main() else None
    return distributed.gather(metrics)[0]


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
) -> list[dict[str, Any]]:
    """COCO results of all processes' pages: up to 300 a page, pages in the order of the json, the best first.

    Leaves the model in evaluation mode: it is the averaged one, which never trains.

    Args:
        batches: this process's share of the pages. bf16: autocast, on a GPU. stop: asked before each batch.
        category_ids: the json's id of each class of the model, None to leave a class out; by default the classes are
            the json's categories in order.
        dedupe: as for `without_doubles`.
    Returns:
        On the main process image_id, category_id (the json's), bbox (xywh in pixels of the original image) and score;
        an empty list on the others.
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
    everywhere: dict[int, Detections] = {}
    for part in distributed.gather(None if stop() else share):
        if part is None:
            raise Stopped
        everywhere |= part
    if not distributed.is_main():
        return []
    category_ids = category_ids or [category["id"] for category in pages.categories]
    return [result for image_id in pages.ids for result in coco_results(image_id, everywhere[image_id], category_ids)]


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


def coco_results(image_id: int, found: Detections, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Detections of one page as COCO results: bbox in pixels to three decimals, scores to six."""
    xywh = box_convert(found.boxes.double(), "xyxy", "xywh").tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": [round(x, 3) for x in box],
            "score": round(score, 6),
        }
        for label, box, score in zip(found.labels.tolist(), xywh, found.scores.tolist(), strict=True)
        if category_ids[label] is not None
    ]


def coco_metrics(ground_truth: dict[str, Any], detections: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of pycocotools, as fractions of 1; None where there is no truth to measure against.

    Args:
        ground_truth: a COCO dictionary; annotation ids must not be 0 (see `read_coco`).
        detections: COCO results; may be empty.
    Returns:
        COCO's twelve numbers by the names in `OFFICIAL`; `AP_300`, the AP with up to 300 boxes a page; `per_class`, AP
        and AP50 by class name, with the id behind a name that several classes have; and `shown`, see there.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        # loadRes fails on an empty list, writes into the dictionaries it gets, and gives outlines to those without.
        found = (
            truth.loadRes([detection | {"segmentation": None} for detection in detections]) if detections else COCO()
        )
        result = COCOeval(truth, found, "bbox")
        result.params.maxDets = MAX_DETECTIONS
        result.evaluate()
        result.accumulate()
        result.summarize()
    precision = result.eval["precision"][:, :, :, 0]  # (IoU thresholds, recalls, classes, MAX_DETECTIONS), any area
    official, most = MAX_DETECTIONS.index(100), MAX_DETECTIONS.index(300)
    metrics: dict[str, Any] = {name: _mean(value) for name, value in zip(OFFICIAL, result.stats, strict=True)}
    metrics["AP_300"] = _mean(precision[..., most])
    categories = truth.loadCats(result.params.catIds)
    often = Counter(category["name"] for category in categories)
    names = [c["name"] if often[c["name"]] == 1 else f"{c['name']} (id {c['id']})" for c in categories]
    metrics["per_class"] = {
        name: {"AP": _mean(precision[:, :, i, official]), "AP50": _mean(precision[0, :, i, official])}
        for i, name in enumerate(names)
    }
    metrics["shown"] = shown(result, detections)
    return metrics


def shown(result: COCOeval, detections: list[dict[str, Any]]) -> dict[str, float | None]:
    """How good the detections are that people see, those with a score of .3 or more.

    `precision` and `recall` are at IoU .5. `duplicates` is the number a page of detections that have an IoU above .7
    with a better one of their class. `predict` would drop these.
    """
    everything = [e for e in result.evalImgs if e is not None and e["aRng"] == result.params.areaRng[0]]
    truths, found, right = 0, 0, 0
    for page in everything:  # of one class each
        counted = (np.array(page["dtScores"]) >= THRESHOLD) & ~page["dtIgnore"][0].astype(bool)
        truths += int((~np.array(page["gtIgnore"], bool)).sum())
        found += int(counted.sum())
        right += int((page["dtMatches"][0] > 0)[counted].sum())
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for detection in detections:
        if detection["score"] >= THRESHOLD:
            groups.setdefault((detection["image_id"], detection["category_id"]), []).append(detection)
    duplicates = 0
    for group in groups.values():
        boxes = torch.tensor([d["bbox"] for d in sorted(group, key=lambda d: -d["score"])], dtype=torch.float64)
        overlaps = box_iou(*[box_convert(boxes, "xywh", "xyxy")] * 2).triu(1)  # [i, j]: i is better than j
        duplicates += int((overlaps > 0.7).any(0).sum())
    return {
        "precision": right / found if found else None,
        "recall": right / truths if truths else None,
        "duplicates": duplicates / max(1, len(result.params.imgIds)),
    }


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
