"""Where pages and their boxes come from: COCO-format folders, and the embedded drawn pages."""

import json
import os
import reprlib
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypedDict

import msgspec
import numpy as np

from dfine import distributed
from dfine.config import ConfigError, PagesConfig
from dfine.data.synthetic.pages import CATEGORIES, coco_dict
from dfine.data.synthetic.styles import STYLES
from dfine.data.transforms import THINNEST, PageError, have_an_area, read_page


class Source(Protocol):
    """Pages with boxes; the categories are in order of their ids, and labels count from 0 in that order."""

    categories: list[dict[str, Any]]  # id and name
    sizes: np.ndarray  # (pages, 2) height, width of each page in pixels
    ids: np.ndarray  # (pages,) image ids

    @property
    def counts(self) -> np.ndarray | None:
        """(pages,) how many boxes each page has; None: that takes drawing it."""
        ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Page (H, W, 3) uint8, labels (T,) int64, boxes (T, 4) float64 xyxy pixels."""
        ...

    def ground_truth(self, pages: Sequence[int] | None = None) -> dict[str, Any]:
        """The truth of the pages with these numbers, or of all, as a COCO dictionary, for evaluation."""
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
        entries, self.categories, things = read_coco(self.annotations)
        files = [page["file_name"] for page in entries]
        missing = [file for file in files if not os.path.isfile(self.images / file)]  # False for any odd name
        if missing and not may_lack:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise PageError(f"{self.images}: {len(missing)} of {len(files)} images of {annotations} missing: {names}")

        # Flat arrays, not lists of objects: processes share them without copying.
        self.files = np.array([file.encode("utf-8", "surrogatepass") for file in files])
        self.ids = np.array([page["id"] for page in entries])
        self.sizes = np.array([(page["height"], page["width"]) for page in entries])
        boxes, kept, clipped = clip(things.xywh, self.sizes[things.pages])
        self.clipped, self.dropped = (int((x & ~things.crowds).sum()) for x in (clipped, ~kept))
        own = np.flatnonzero(kept)
        own = own[np.argsort(things.pages[own], kind="stable")]
        self.truth = Annotations(*(numbers[own] for numbers in things))
        self.first = np.searchsorted(self.truth.pages, np.arange(len(files) + 1))
        self.counts = np.bincount(self.truth.pages[~self.truth.crowds], minlength=len(files))
        boxes = boxes[kept & ~things.crowds]
        self.median = np.median(boxes[:, 2:] - boxes[:, :2], axis=0).tolist() if len(boxes) else []

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        height, width = self.sizes[index].tolist()
        own = slice(self.first[index], self.first[index + 1])
        own = np.arange(own.start, own.stop)[~self.truth.crowds[own]]
        boxes, _, _ = clip(self.truth.xywh[own], self.sizes[[index]])
        file = self.files[index].decode("utf-8", "surrogatepass")
        return read_page(self.images / file, (height, width)), self.truth.labels[own], boxes

    def ground_truth(self, pages: Sequence[int] | None = None) -> dict[str, Any]:
        pages = range(len(self.ids)) if pages is None else pages
        own = [np.arange(self.first[page], self.first[page + 1]) for page in pages]
        truth = Annotations(*(numbers[np.concatenate([np.arange(0), *own])] for numbers in self.truth))
        boxes, _, clipped = clip(truth.xywh, self.sizes[truth.pages])
        truth.xywh[clipped] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)[clipped]
        truth.areas[clipped] = np.minimum(truth.areas, truth.xywh[:, 2:].prod(1))[clipped]
        ids = [category["id"] for category in self.categories]
        columns = (self.ids[truth.pages], truth.labels, truth.xywh, truth.areas, truth.crowds.astype(int))
        annotations = [  # numbered from 1: pycocotools takes a match with annotation 0 for none
            {"id": n, "image_id": i, "category_id": ids[label], "bbox": box, "area": area, "iscrowd": crowd}
            for n, (i, label, box, area, crowd) in enumerate(zip(*(x.tolist() for x in columns), strict=True), 1)
        ]
        images = [{"id": image_id} for image_id in self.ids[pages].tolist()]
        return {"images": images, "annotations": annotations, "categories": self.categories}

    def summary(self, queries: int) -> str:
        boxes = self.counts
        text = f"{len(boxes)} pages of {self.annotations}, {boxes.sum()} boxes"
        text += f" ({boxes.mean():.1f} a page, at most {boxes.max()})"
        if self.median:
            text += ", median {:.0f}x{:.0f} pixels".format(*self.median)
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
        self.truth: dict[tuple[int, ...], dict[str, Any]] = {}
        self.categories = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES]
        self.ids = np.arange(pages)
        self.sizes = np.array([page_size(seed, i)[::-1] for i in range(pages)])

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        page, labels, xywh = self.draw(self.seed, index)
        return page, labels, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)

    def ground_truth(self, pages: Sequence[int] | None = None) -> dict[str, Any]:
        own = tuple(range(len(self.ids)) if pages is None else pages)
        if own not in self.truth:  # drawing takes a moment: once, at the first evaluation
            self.truth = {own: coco_dict(self.seed, own, self.draw)}
        return self.truth[own]

    def summary(self, queries: int) -> str:
        return f"{len(self.ids)} drawn pages of seed {self.seed}, {self.style}"


class Annotations(NamedTuple):
    """The boxes of many pages as flat arrays."""

    pages: np.ndarray  # (T,) int64 which page
    labels: np.ndarray  # (T,) int64
    xywh: np.ndarray  # (T, 4) float64 pixels
    areas: np.ndarray  # (T,) float64 square pixels: of outlines where there were some
    crowds: np.ndarray  # (T,) bool


def clip(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips boxes (T, 4) in pixels to their pages, whose height, width are `sizes` (T, 2).

    Returns:
        (T, 4) float64 xyxy; (T,) bool which boxes stay: they are not empty then, nor thinner than 0.01; and which of
        these are clipped: what leaves its page by less than 0.01 pixels does not count
    """
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    boxes = xyxy.clip(0, sizes[:, [1, 0, 1, 0]])
    kept = have_an_area(boxes)
    return boxes, kept, kept & (np.abs(boxes - xyxy) > THINNEST).any(1)


Whole = Annotated[int, msgspec.Meta(gt=-(2**53), lt=2**53)]
Number = Annotated[float, msgspec.Meta(gt=-(2**53), lt=2**53)]


class File(TypedDict, total=False):
    images: Any
    annotations: list[msgspec.Raw]  # text: as objects, all at once would take gigabytes
    categories: Any


class Annotation(msgspec.Struct, gc=False):
    """What is read of an annotation; msgspec skips the rest, such as outlines, which are most of a large file."""

    image_id: Whole
    category_id: Whole
    bbox: tuple[Number, Number, Number, Number]
    iscrowd: Literal[0, 1] = 0
    area: Annotated[float, msgspec.Meta(ge=0, lt=2**53)] | msgspec.UnsetType = msgspec.UNSET


def read_coco(path: Path, truth: bool = True) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Annotations]:
    """Reads and checks a COCO json; an annotation without an area gets that of its box.

    A `file_name` must lie inside the folder of the images; `./a.png` becomes `a.png`.

    Args:
        truth: False: only images and categories are wanted, and annotations need not be there.
    Returns:
        images: id, file_name, width, height; categories: id and name, in order of their ids; annotations
    Raises:
        PageError: names the file, the entry and what is wrong with it.
    """
    lists = ["images", "annotations", "categories"] if truth else ["images", "categories"]
    try:
        coco = _parse(path.read_bytes())
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
    _by_id(path, coco["categories"], "categories", {"id": int, "name": str})
    categories = sorted(({"id": c["id"], "name": c["name"]} for c in coco["categories"]), key=lambda c: c["id"])
    labels = {category["id"]: label for label, category in enumerate(categories)}
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
    decode, numbers = msgspec.json.Decoder(Annotation).decode, array("d")
    for number, entry in enumerate(coco["annotations"] if truth else ()):
        try:
            thing = decode(entry)
        except (msgspec.DecodeError, TypeError):  # wrong, or not text but an object: see `_parse`
            thing = _checked(f"{path}: annotations[{number}]", entry)
        if thing.image_id not in pages:
            raise PageError(f"{path}: annotations[{number}]: no image has id {thing.image_id}")
        if thing.category_id not in labels:
            raise PageError(f"{path}: annotations[{number}]: no category has id {thing.category_id}")
        area = thing.bbox[2] * thing.bbox[3] if thing.area is msgspec.UNSET else thing.area
        numbers.extend((pages[thing.image_id], labels[thing.category_id], *thing.bbox, area, thing.iscrowd))
    table = np.frombuffer(numbers).reshape(-1, 8)
    page, label = table[:, :2].astype(np.int64).T
    return coco["images"], categories, Annotations(page, label, table[:, 2:6], table[:, 6], table[:, 7] > 0)


def _parse(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data, type=File)
    except (msgspec.DecodeError, RecursionError):  # it may be wrong, or have NaN or a byte order mark: json takes these
        return json.loads(data, object_hook=lambda entry: {k: v for k, v in entry.items() if k != "segmentation"})


def _checked(where: str, entry: Any) -> Annotation:
    """An annotation that msgspec does not take: says what is wrong with it, if anything."""
    try:
        entry = json.loads(bytes(entry)) if isinstance(entry, msgspec.Raw) else entry
    except (ValueError, RecursionError) as error:
        raise PageError(f"{where}: not JSON: {error}") from error
    _check(where, entry, {"image_id": int, "category_id": int, "bbox": list})
    box = entry["bbox"]
    if len(box) != 4 or not all(map(_is_number, box)):
        raise PageError(f"{where}: bbox must be four numbers x, y, width, height, found {_shown(box)}")
    crowd, area = entry.get("iscrowd", 0), entry.get("area", 0)
    if type(crowd) is not int or crowd not in (0, 1):
        raise PageError(f"{where}: iscrowd must be 0 or 1, found {_shown(crowd)}")
    if not _is_number(area) or area < 0:
        raise PageError(f"{where}: area must be a number, 0 or more, found {_shown(area)}")
    area = entry.get("area", msgspec.UNSET)
    return Annotation(entry["image_id"], entry["category_id"], tuple(box), 1 if crowd else 0, area)


def _by_id(path: Path, entries: list[Any], kind: str, fields: dict[str, type]) -> dict[int, int]:
    """Which entry has each id."""
    seen: dict[int, int] = {}
    for number, entry in enumerate(entries):
        _check(f"{path}: {kind}[{number}]", entry, fields)
        if entry["id"] in seen:
            raise PageError(f"{path}: {kind}[{number}]: id {entry['id']} occurs twice")
        seen[entry["id"]] = number
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
        images, annotations = pages.images, pages.annotations
        return distributed.once_a_machine(lambda: CocoPages(images, annotations, may_lack))
    if pages.images:
        raise ConfigError(f"{key}.annotations: name the COCO json of {pages.images}")
    if pages.synthetic < 1:
        raise ConfigError(f"{key}: name images and annotations (or a number of synthetic pages)")
    return SyntheticPages(pages.synthetic, pages.synthetic_seed, pages.synthetic_style)
