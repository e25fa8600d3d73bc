"""Batches of pages: which pages, and how large.

Everything random about a page comes from (seed, epoch, page), the short edge of a batch from (seed, epoch, batch):
which process or worker loads it, and whether the run was interrupted, makes no difference.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dfine import distributed
from dfine.config import Config, DataConfig
from dfine.data.sources import Source
from dfine.data.transforms import PageError, augment, augmentation, canvas_of, model_size, pad, sized
from dfine.data.workers import Packed, PageLoader
from dfine.structures import Batch, Target


class PageKey(NamedTuple):
    """What the sampler asks a worker for."""

    page: int
    short_edge: int
    epoch: int


class Samples(NamedTuple):
    """The pages of a batch, each (h, w, 3) uint8 with its truth; and why some of its pages are others instead."""

    pages: list[tuple[np.ndarray, Target]]
    errors: list[PageError]


class PageDataset(Dataset):
    """Reads, resizes and (in training) augments: PageKey -> page (h, w, 3) uint8 and its `Target`."""

    def __init__(self, source: Source, config: DataConfig, seed: int, training: bool) -> None:
        self.source, self.config, self.seed = source, config, seed
        self.augmentation = augmentation(config.augment) if training else None
        self.skip_unreadable = config.skip_unreadable and training

    def __getitem__(self, key: PageKey) -> tuple[np.ndarray, Target]:
        page, labels, boxes = self.source.read(key.page)
        original = page.shape[:2]
        page = sized(page, key.short_edge, self.config)
        boxes = boxes * np.tile(np.array(page.shape[1::-1]) / original[::-1], 2)
        if self.augmentation is not None:
            seed = int(np.random.SeedSequence([self.seed, key.epoch, key.page]).generate_state(1)[0])
            page, labels, boxes = augment(self.augmentation, page, labels, boxes, seed)
        boxes = boxes / np.tile(page.shape[1::-1], 2)
        cxcywh = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
        target = Target(
            torch.from_numpy(labels.copy()),
            torch.from_numpy(cxcywh.astype(np.float32)),
            int(self.source.ids[key.page]),
            (original[0], original[1]),
        )
        return page, target

    def __getitems__(self, keys: list[PageKey]) -> "Samples | PageError":
        """A batch, or the error of one of its pages, which `PageLoader` raises in the main process."""
        pages: list[tuple[np.ndarray, Target] | None] = []
        errors: list[PageError] = []
        for key in keys:
            try:
                pages.append(self[key])
            except PageError as error:
                if not self.skip_unreadable:
                    return error
                pages.append(None)
                errors.append(error)
        if len(errors) == len(keys):
            return PageError(f"no page of a batch can be read, so nothing can take their place: {errors[0]}")
        following = [*pages, *pages]
        return Samples([next(page for page in following[i:] if page is not None) for i in range(len(keys))], errors)


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
        canvas = canvas_of([model_size(size, config.eval_short_edge, config)], stride)
        groups.setdefault(canvas, []).append(index)
    batches = [
        [PageKey(index, config.eval_short_edge, 0) for index in group[first : first + config.batch_size]]
        for group in groups.values()
        for first in range(0, len(group), config.batch_size)
    ]
    return batches[distributed.rank() :: distributed.world_size()]


def train_loader(source: Source, config: Config) -> tuple[DataLoader[Batch], TrainBatches]:
    """Batches of augmented pages, and the sampler that says which."""
    sampler = TrainBatches(source.sizes.tolist(), config.data, config.train.seed, config.train.accumulate)
    return _loader(source, config, sampler, training=True), sampler


def evaluation_loader(source: Source, config: Config) -> DataLoader[Batch]:
    """Every page once over all processes."""
    batches = evaluation_batches(source.sizes.tolist(), config.data, config.model.strides[-1])
    return _loader(source, config, batches, training=False)


def _loader(source: Source, config: Config, batches: Any, training: bool) -> DataLoader[Batch]:
    return PageLoader(
        PageDataset(source, config.data, config.train.seed, training),
        batch_sampler=batches,
        collate_fn=Collate(config.model.strides[-1]),
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=training and config.data.workers > 0,
    )


@dataclass(frozen=True)
class Collate:
    """Makes one batch of pages; a class, so that it can be pickled with its stride. A page's error is passed on."""

    stride: int

    def __call__(self, samples: Samples | PageError) -> Packed | PageError:
        if isinstance(samples, PageError):
            return samples
        pages, targets = zip(*samples.pages, strict=True)
        images, sizes = pad(list(pages), self.stride)
        return Packed(
            images,
            torch.cat([target.labels for target in targets]),
            torch.cat([target.boxes for target in targets]),
            [
                ((height, width), len(target.labels), target.image_id, target.size)
                for (height, width), target in zip(sizes.tolist(), targets, strict=True)
            ],
            samples.errors,
        )
