"""Where pages and their boxes come from: COCO-format folders, and the embedded drawn pages."""

import json
import os
import reprlib
from itertools import compress
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from dfine.config import ConfigError, PagesConfig
from dfine.data.synthetic.pages import CATEGORIES, coco_dict
from dfine.data.synthetic.styles import STYLES
from dfine.data.transforms import THINNEST, PageError, have_an_area, read_page


class Source(Protocol):
    """Pages with boxes; the categories are in order of their ids, and labels count from 0 in that order."""

    categories: list[dict[str, Any]]  # id and name
    sizes: list[tuple[int, int]]  # height, width of each page in pixels
    ids: list[int]  # image ids

    @property
    def counts(self) -> np.ndarray | None:
        """(pages,) how many boxes each page has; None: that takes drawing it."""
        ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Page (H, W, 3) uint8, labels (T,) int64, boxes (T, 4) float64 xyxy pixels."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """The truth as a COCO dictionary, for evaluation."""
        ...

    def summary(self, queries: int) -> str:
        """Pages and boxes, for people; and what a model with so many queries cannot find of them."""
        ...


class CocoPages:
    """A COCO json and a folder of images, such as PubLayNet and DocLayNet.

    Boxes are clipped to the page (`clipped` counts them); what is empty then, or thinner than 0.01 pixels, is dropped
    (`dropped` counts them): in training and in evaluation, so that one can find what the other has taught. Crowd boxes
    count only in evaluation. Pages without boxes stay.

    Args:
        may_lack: whether images may be missing: reading them is an error then.
    Raises:
        PageError: the json or an image is missing, or the json is not COCO; names the file and what is wrong.
    """

    def __init__(self, images: str | Path, annotations: str | Path, may_lack: bool = False) -> None:
        self.images, self.annotations = Path(images), Path(annotations)
        coco = read_coco(self.annotations)
        self.categories = sorted(
            ({"id": c["id"], "name": c["name"]} for c in coco["categories"]), key=lambda category: category["id"]
        )
        labels = {category["id"]: label for label, category in enumerate(self.categories)}
        pages = coco["images"]
        self.ids = [page["id"] for page in pages]
        self.sizes = [(page["height"], page["width"]) for page in pages]
        self.files = [page["file_name"] for page in pages]
        missing = [file for file in self.files if not os.path.isfile(self.images / file)]  # False for any odd name
        if missing and not may_lack:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise PageError(f"{self.images}: {len(missing)} of {len(pages)} images of {annotations} missing: {names}")

        index = {image_id: i for i, image_id in enumerate(self.ids)}
        boxes, self.clipped, self.dropped = clip(coco)
        things = coco["annotations"]
        page = np.array([index[thing["image_id"]] for thing in things], dtype=np.int64)
        own = np.flatnonzero([not thing["iscrowd"] for thing in things])
        own = own[np.argsort(page[own], kind="stable")]
        # Flat arrays, not lists of objects: worker processes share them without copying.
        self.boxes = boxes[own]
        self.labels = np.array([labels[things[i]["category_id"]] for i in own], dtype=np.int64)
        self.first = np.searchsorted(page[own], np.arange(len(pages) + 1))
        self.counts = np.diff(self.first)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = slice(self.first[index], self.first[index + 1])
        return read_page(self.images / self.files[index], self.sizes[index]), self.labels[own], self.boxes[own]

    def ground_truth(self) -> dict[str, Any]:
        coco = read_coco(self.annotations)
        clip(coco)
        return coco

    def summary(self, queries: int) -> str:
        boxes = self.counts
        text = f"{len(boxes)} pages of {self.annotations}, {len(self.boxes)} boxes"
        text += f" ({boxes.mean():.1f} a page, at most {boxes.max()})"
        if len(self.boxes):
            width, height = np.median(self.boxes[:, 2:] - self.boxes[:, :2], axis=0)
            text += f", median {width:.0f}x{height:.0f} pixels"
        text += f"; {(boxes == 0).sum()} pages without boxes"
        text += f", {self.clipped} boxes clipped to their pages, {self.dropped} empty boxes dropped"
        if boxes.max() > queries:
            lost, pages = (boxes - queries).clip(0), (boxes > queries).sum()
            text += f"; {pages} pages have more boxes than the {queries} queries: {lost.sum()} cannot be found"
        return text


class SyntheticPages:
    """Drawn pages of `dfine.synthetic`; page i is the same as in a folder written with the same seed and style."""

    def __init__(self, pages: int, seed: int, style: str = "plain") -> None:
        self.seed, self.style, self.counts = seed, style, None
        page_size, self.draw = STYLES[style]
        self.truth: dict[str, Any] = {}
        self.categories = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]
        self.ids = list(range(pages))
        self.sizes = [page_size(seed, i)[::-1] for i in range(pages)]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        page, labels, xywh = self.draw(self.seed, index)
        return page, labels, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)

    def ground_truth(self) -> dict[str, Any]:
        if not self.truth:  # drawing takes a moment: once, at the first evaluation
            self.truth = coco_dict(self.seed, len(self.ids), self.draw)
        return self.truth

    def summary(self, queries: int) -> str:
        return f"{len(self.ids)} drawn pages of seed {self.seed}, {self.style}"


def clip(coco: dict[str, Any]) -> tuple[np.ndarray, int, int]:
    """Clips the boxes of a COCO dictionary to their pages, and drops those that are empty then or thinner than 0.01.

    An area becomes at most that of what is left of its box.

    Returns:
        (T, 4) float64 xyxy pixels of the annotations that stay, and how many of the others but crowds were clipped and
        dropped; what leaves its page by less than 0.01 pixels does not count as clipped
    """
    sizes = {image["id"]: [image["width"], image["height"]] * 2 for image in coco["images"]}
    things = coco["annotations"]
    xywh = np.array([thing["bbox"] for thing in things], dtype=np.float64).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = xyxy.clip(0, np.array([sizes[thing["image_id"]] for thing in things]).reshape(-1, 4))
    kept = have_an_area(boxes)
    clipped = kept & (np.abs(boxes - xyxy) > THINNEST).any(1)
    for thing, (x1, y1, x2, y2) in zip(compress(things, clipped), boxes[clipped].tolist(), strict=True):
        thing["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        thing["area"] = min(thing["area"], (x2 - x1) * (y2 - y1))
    own = np.array([not thing["iscrowd"] for thing in things], dtype=bool)
    coco["annotations"] = list(compress(things, kept))
    return boxes[kept], int((clipped & own).sum()), int((~kept & own).sum())


def read_coco(path: Path, truth: bool = True) -> dict[str, Any]:
    """Reads and checks a COCO json; annotations are numbered anew from 1 and get what pycocotools needs.

    A `file_name` must lie inside the folder of the images; `./a.png` becomes `a.png`.

    Args:
        truth: False: only images and categories are wanted, and annotations need not be there.
    Raises:
        PageError: names the file, the entry and what is wrong with it.
    """
    lists = ["images", "annotations", "categories"] if truth else ["images", "categories"]
    try:
        coco = json.loads(path.read_bytes(), object_hook=_without_outline)  # bytes: a byte order mark is heeded
    except OSError as error:
        raise PageError(f"{path}: cannot read the annotations ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PageError(f"{path}: not JSON: {error}") from error
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in lists):
        raise PageError(f"{path}: not COCO: needs the lists {', '.join(lists[:-1])} and {lists[-1]}")
    for key in ("images", "categories"):
        if not coco[key]:
            raise PageError(f"{path}: holds no {key}")
    pages = _by_id(path, coco["images"], "images", {"id": int, "file_name": str, "width": int, "height": int})
    categories = _by_id(path, coco["categories"], "categories", {"id": int, "name": str})
    for number, page in enumerate(coco["images"]):
        for side in ("width", "height"):
            if page[side] < 1:
                raise PageError(f"{path}: images[{number}]: {side} must be 1 or more, found {page[side]}")
        name = PurePath(page["file_name"])
        if name.anchor or ".." in name.parts:
            raise PageError(
                f"{path}: images[{number}]: file_name must be a path inside the folder of the images, without '..', "
                f"found {_shown(page['file_name'])}"
            )
        page["file_name"] = name.as_posix()
    for number, annotation in enumerate(coco["annotations"] if truth else ()):
        where = f"{path}: annotations[{number}]"
        _check(where, annotation, {"image_id": int, "category_id": int, "bbox": list})
        if annotation["image_id"] not in pages:
            raise PageError(f"{where}: no image has id {annotation['image_id']}")
        if annotation["category_id"] not in categories:
            raise PageError(f"{where}: no category has id {annotation['category_id']}")
        box = annotation["bbox"]
        if len(box) != 4 or not all(map(_is_number, box)):
            raise PageError(f"{where}: bbox must be four numbers x, y, width, height, found {_shown(box)}")
        crowd, area = annotation.get("iscrowd", 0), annotation.get("area", 0)
        if type(crowd) is not int or crowd not in (0, 1):
            raise PageError(f"{where}: iscrowd must be 0 or 1, found {_shown(crowd)}")
        if not _is_number(area) or area < 0:
            raise PageError(f"{where}: area must be a number, 0 or more, found {_shown(area)}")
        annotation["id"] = number + 1  # pycocotools takes a match with annotation 0 for none
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", box[2] * box[3])
    return coco


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    """Outlines are most of a large json's memory, and nobody reads them."""
    entry.pop("segmentation", None)
    return entry


def _by_id(path: Path, entries: list[Any], kind: str, fields: dict[str, type]) -> set[int]:
    seen: set[int] = set()
    for number, entry in enumerate(entries):
        _check(f"{path}: {kind}[{number}]", entry, fields)
        if entry["id"] in seen:
            raise PageError(f"{path}: {kind}[{number}]: id {entry['id']} occurs twice")
        seen.add(entry["id"])
    return seen


def _check(where: str, entry: Any, fields: dict[str, type]) -> None:
    if not isinstance(entry, dict):
        raise PageError(f"{where}: expected an object, found {_shown(entry)}")
    for key, kind in fields.items():
        value = entry.get(key)
        if type(value) is kind is int and not _is_number(value):
            raise PageError(f"{where}: {key} is too large: {_shown(value)}")
        if type(value) is not kind:  # isinstance takes True for an int
            raise PageError(f"{where}: {key} must be {kind.__name__}, found {_shown(value)}")


def _is_number(x: Any) -> bool:
    """A number that float64 can tell from its neighbours."""
    return type(x) in (int, float) and abs(x) < 2**53


def _shown(value: Any) -> str:
    """A wrong value, for people; if it is long, its beginning."""
    return reprlib.repr(value)


def open_source(pages: PagesConfig, key: str, may_lack: bool = False) -> Source:
    """The pages that `data.train` or `data.val` (the key) names.

    Args:
        may_lack: see `CocoPages`.
    Raises:
        ConfigError: it names none. PageError: see `CocoPages`.
    """
    if pages.annotations:
        if not pages.images:
            raise ConfigError(f"{key}.images: name the folder with the images of {pages.annotations}")
        return CocoPages(pages.images, pages.annotations, may_lack)
    if pages.images:
        raise ConfigError(f"{key}.annotations: name the COCO json of {pages.images}")
    if pages.synthetic < 1:
        raise ConfigError(f"{key}: name images and annotations (or a number of synthetic pages)")
    return SyntheticPages(pages.synthetic, pages.synthetic_seed, pages.synthetic_style)
