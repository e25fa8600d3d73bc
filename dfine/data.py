"""Pages and their boxes: COCO-format folders, the embedded pages, and the batches made of them.

Everything random about a page comes from (seed, epoch, page), the short edge of a batch from (seed, epoch, batch):
which process or worker loads it, and whether the run was interrupted, makes no difference.
"""

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dfine import distributed, synthetic
from dfine.config import Config, ConfigError, DataConfig, PagesConfig
from dfine.structures import Batch, Target
from dfine.transforms import PageError, augment, augmentation, canvas_of, fit, pad, read_page, resize


class Source(Protocol):
    """Pages with boxes; the categories are in order of their ids, and labels count from 0 in that order."""

    categories: list[dict[str, Any]]  # id and name
    sizes: list[tuple[int, int]]  # height, width of each page in pixels
    ids: list[int]  # image ids

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Page (H, W, 3) uint8, labels (T,) int64, boxes (T, 4) float64 xyxy pixels."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """The truth as a COCO dictionary, for evaluation."""
        ...

    def summary(self) -> str:
        """Pages and boxes, for people."""
        ...


class CocoPages:
    """A COCO json and a folder of images, such as PubLayNet and DocLayNet.

    Boxes are clipped to the page, what is empty then is dropped (`dropped` counts them), crowd boxes count only in
    evaluation. Pages without boxes stay.

    Raises:
        PageError: the json or an image is missing, or the json is not COCO; names the file and what is wrong.
    """

    def __init__(self, images: str | Path, annotations: str | Path) -> None:
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
        missing = [file for file in self.files if not (self.images / file).is_file()]
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise PageError(f"{self.images}: {len(missing)} of {len(pages)} images of {annotations} missing: {names}")

        index = {image_id: i for i, image_id in enumerate(self.ids)}
        things = [a for a in coco["annotations"] if not a.get("iscrowd", 0)]
        page = np.array([index[a["image_id"]] for a in things], dtype=np.int64)
        xywh = np.array([a["bbox"] for a in things], dtype=np.float64).reshape(-1, 4)
        limit = np.array(self.sizes, dtype=np.float64).reshape(-1, 2)[page][:, [1, 0, 1, 0]]
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).clip(0, limit)
        kept = np.flatnonzero((xyxy[:, 2:] > xyxy[:, :2]).all(1))
        self.dropped = len(things) - len(kept)
        kept = kept[np.argsort(page[kept], kind="stable")]
        # Flat arrays, not lists of objects: worker processes share them without copying.
        self.boxes = xyxy[kept]
        self.labels = np.array([labels[things[i]["category_id"]] for i in kept], dtype=np.int64)
        self.first = np.searchsorted(page[kept], np.arange(len(pages) + 1))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        own = slice(self.first[index], self.first[index + 1])
        return read_page(self.images / self.files[index], self.sizes[index]), self.labels[own], self.boxes[own]

    def ground_truth(self) -> dict[str, Any]:
        return read_coco(self.annotations)

    def summary(self) -> str:
        boxes, pages = np.diff(self.first), len(self.ids)
        text = f"{pages} pages of {self.annotations}, {len(self.boxes)} boxes"
        text += f" ({boxes.mean():.1f} a page, at most {boxes.max()})"
        if len(self.boxes):
            width, height = np.median(self.boxes[:, 2:] - self.boxes[:, :2], axis=0)
            text += f", median {width:.0f}x{height:.0f} pixels"
        return f"{text}; {(boxes == 0).sum()} pages without boxes, {self.dropped} empty boxes dropped"


class SyntheticPages:
    """Drawn pages of `dfine.synthetic`; page i is the same as in a folder written with the same seed."""

    def __init__(self, pages: int, seed: int) -> None:
        self.seed = seed
        self.truth: dict[str, Any] = {}
        self.categories = [{"id": c["id"], "name": c["name"]} for c in synthetic.CATEGORIES]
        self.ids = list(range(pages))
        self.sizes = [synthetic.page_size(seed, i)[::-1] for i in range(pages)]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        page, labels, xywh = synthetic.draw_page(self.seed, index)
        return page, labels, np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)

    def ground_truth(self) -> dict[str, Any]:
        if not self.truth:  # drawing takes a moment: once, at the first evaluation
            self.truth = synthetic.coco_dict(self.seed, len(self.ids))
        return self.truth

    def summary(self) -> str:
        return f"{len(self.ids)} drawn pages of seed {self.seed}"


def read_coco(path: Path) -> dict[str, Any]:
    """Reads and checks a COCO json; annotations are numbered anew from 1 and get what pycocotools needs.

    Raises:
        PageError: names the file, the entry and what is wrong with it.
    """
    try:
        coco = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_outline)
    except OSError as error:
        raise PageError(f"{path}: cannot read the annotations ({error.strerror})") from error
    except ValueError as error:
        raise PageError(f"{path}: not JSON: {error}") from error
    if not isinstance(coco, dict) or not all(
        isinstance(coco.get(k), list) for k in ("images", "annotations", "categories")
    ):
        raise PageError(f"{path}: not COCO: needs the lists images, annotations and categories")
    for key in ("images", "categories"):
        if not coco[key]:
            raise PageError(f"{path}: holds no {key}")
    pages = _by_id(path, coco["images"], "images", {"id": int, "file_name": str, "width": int, "height": int})
    categories = _by_id(path, coco["categories"], "categories", {"id": int, "name": str})
    for number, page in enumerate(coco["images"]):
        for side in ("width", "height"):
            if page[side] < 1:
                raise PageError(f"{path}: images[{number}]: {side} must be 1 or more, found {page[side]}")
    for number, annotation in enumerate(coco["annotations"]):
        where = f"{path}: annotations[{number}]"
        _check(where, annotation, {"image_id": int, "category_id": int, "bbox": list})
        if annotation["image_id"] not in pages:
            raise PageError(f"{where}: no image has id {annotation['image_id']}")
        if annotation["category_id"] not in categories:
            raise PageError(f"{where}: no category has id {annotation['category_id']}")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in box):
            raise PageError(f"{where}: bbox must be four numbers x, y, width, height, found {box}")
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
        raise PageError(f"{where}: expected an object, found {entry!r}")
    for key, kind in fields.items():
        if not isinstance(entry.get(key), kind):
            raise PageError(f"{where}: {key} must be {kind.__name__}, found {entry.get(key)!r}")


def open_source(pages: PagesConfig, key: str) -> Source:
    """The pages that `data.train` or `data.val` (the key) names.

    Raises:
        ConfigError: it names none. PageError: see `CocoPages`.
    """
    if pages.annotations:
        if not pages.images:
            raise ConfigError(f"{key}.images: name the folder with the images of {pages.annotations}")
        return CocoPages(pages.images, pages.annotations)
    if pages.images:
        raise ConfigError(f"{key}.annotations: name the COCO json of {pages.images}")
    if pages.synthetic < 1:
        raise ConfigError(f"{key}: name images and annotations (or a number of synthetic pages)")
    return SyntheticPages(pages.synthetic, pages.synthetic_seed)


class PageKey(NamedTuple):
    """What the sampler asks a worker for."""

    page: int
    short_edge: int
    epoch: int


class PageDataset(Dataset):
    """Reads, resizes and (in training) augments: PageKey -> page (h, w, 3) uint8 and its `Target`."""

    def __init__(self, source: Source, config: DataConfig, seed: int, training: bool) -> None:
        self.source, self.config, self.seed = source, config, seed
        self.augmentation = augmentation(config.augment) if training else None

    def __getitem__(self, key: PageKey) -> tuple[np.ndarray, Target]:
        page, labels, boxes = self.source.read(key.page)
        original = page.shape[:2]
        page = resize(page, fit(original, key.short_edge, self.config.max_long_edge))
        boxes = boxes * np.tile(np.array(page.shape[1::-1]) / original[::-1], 2)
        if self.augmentation is not None:
            seed = int(np.random.SeedSequence([self.seed, key.epoch, key.page]).generate_state(1)[0])
            page, labels, boxes = augment(self.augmentation, page, labels, boxes, seed)
        boxes = boxes / np.tile(page.shape[1::-1], 2)
        cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
        target = Target(
            torch.from_numpy(labels.copy()),
            torch.from_numpy(cxcywh.astype(np.float32)),
            self.source.ids[key.page],
            (original[0], original[1]),
        )
        return page, target

    def __getitems__(self, keys: list[PageKey]) -> list[tuple[np.ndarray, Target]] | PageError:
        """What a `DataLoader` asks for; see `PageLoader`."""
        try:
            return [self[key] for key in keys]
        except PageError as error:
            return error


class TrainBatches(Sampler[list[PageKey]]):
    """This process's batches of one epoch: pages of like aspect together, one short edge for all processes.

    Every page comes once an epoch; the last batch is filled up with pages of its start.
    """

    WINDOW = 64  # batches that are sorted by aspect together: large enough to find like pages, small enough to mix

    def __init__(self, sizes: list[tuple[int, int]], config: DataConfig, seed: int, accumulate: int) -> None:
        self.aspects = np.array([height / width for height, width in sizes])
        self.config, self.seed = config, seed
        self.world = distributed.world_size()
        self.rank = distributed.rank()
        self.together = config.batch_size * self.world  # pages of all processes in one step
        self.length = math.ceil(len(sizes) / (self.together * accumulate)) * accumulate
        self.epoch, self.start = 0, 0

    def set_position(self, epoch: int, start: int) -> None:
        """The next iteration gives this epoch's batches from number `start` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[PageKey]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.resize(random.permutation(len(self.aspects)), self.length * self.together)
        step = self.WINDOW * self.together
        windows = np.split(order, range(step, len(order), step))
        order = np.concatenate([w[np.argsort(self.aspects[w], kind="stable")] for w in windows])
        batches = order.reshape(self.length, self.together)[random.permutation(self.length)]
        edges = random.choice(self.config.short_edges, self.length)
        for batch, edge in zip(batches[self.start :], edges[self.start :], strict=True):
            yield [PageKey(int(index), int(edge), self.epoch) for index in batch[self.rank :: self.world]]


def evaluation_batches(sizes: list[tuple[int, int]], config: DataConfig, stride: int) -> list[list[PageKey]]:
    """This process's share of batches of pages with equal canvas, so that no page is padded for another's sake."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        canvas = canvas_of([fit(size, config.eval_short_edge, config.max_long_edge)], stride)
        groups.setdefault(canvas, []).append(index)
    batches = [
        [PageKey(index, config.eval_short_edge, 0) for index in group[first : first + config.batch_size]]
        for group in groups.values()
        for first in range(0, len(group), config.batch_size)
    ]
    return batches[distributed.rank() :: distributed.world_size()]


def train_loader(source: Source, config: Config) -> tuple[DataLoader[Batch], TrainBatches]:
    """Batches of augmented pages, and the sampler that says which."""
    sampler = TrainBatches(source.sizes, config.data, config.train.seed, config.train.accumulate)
    return _loader(source, config, sampler, training=True), sampler


def evaluation_loader(source: Source, config: Config) -> DataLoader[Batch]:
    """Every page once over all processes."""
    batches = evaluation_batches(source.sizes, config.data, config.model.strides[-1])
    return _loader(source, config, batches, training=False)


def _loader(source: Source, config: Config, batches: Any, training: bool) -> DataLoader[Batch]:
    return PageLoader(
        PageDataset(source, config.data, config.train.seed, training),
        batch_sampler=batches,
        collate_fn=Collate(config.model.strides[-1]),
        num_workers=config.data.workers,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=training and config.data.workers > 0,
    )


class PageLoader(DataLoader[Batch]):
    """Raises a worker's page error as it is; a plain `DataLoader` wraps it in the worker's stack."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, PageError):
                raise batch
            yield batch


def leave_signals_to_the_main_process(_: int) -> None:
    """Ctrl-C, torchrun and job schedulers signal workers as well: they end when the main process does, not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed_the_main_process, daemon=True).start()


def _heed_the_main_process() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


@dataclass(frozen=True)
class Collate:
    """A picklable `pad` with its stride; lets a page error through."""

    stride: int

    def __call__(self, samples: list[tuple[np.ndarray, Target]] | PageError) -> Batch | PageError:
        if isinstance(samples, PageError):
            return samples
        images, sizes = pad([page for page, _ in samples], self.stride)
        return Batch(images, sizes, [target for _, target in samples])
