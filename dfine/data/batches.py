"""Batches of pages: which pages, how large, and the processes that load them.

Everything random about a page comes from (seed, epoch, page), the short edge of a batch from (seed, epoch, batch):
which process or worker loads it, and whether the run was interrupted, makes no difference.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

from dfine import distributed
from dfine.config import Config, ConfigError, DataConfig
from dfine.data.sources import Source
from dfine.data.transforms import PageError, augment, augmentation, canvas_of, model_size, pad, sized
from dfine.structures import Batch, Target

try:
    import resource
except ImportError:  # Windows, which shares memory without open files
    resource = None  # type: ignore[assignment]


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
        worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=training and config.data.workers > 0,
    )


# Files that a loader keeps open in this process for each of its workers: pipes, and the tensors of two batches.
FILES = 12
ROOM = 16  # files that a worker can still open before it sends a batch


def make_room(workers: int, key: str) -> None:
    """Sees to it that two loaders of so many workers can be open: raises the limit on open files if it must.

    Raises:
        ConfigError: the limit may not be raised so far; `key` is where the number comes from.
    """
    if not workers or resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = open_files() + 2 * ROOM + 2 * FILES * workers
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    with suppress(OSError, ValueError):  # a system may have a limit of its own above these two
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        fewer = max(0, workers - math.ceil((needed - soft) / (2 * FILES)))
        raise ConfigError(
            f"{key}: {workers} processes that load pages need some {needed} open files, and this process may have "
            f"{soft}: raise that limit (ulimit -n {needed}) or take {fewer}"
        )


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def has_room() -> bool:
    """Whether this process can open as many files as sending a batch takes."""
    if resource is None:
        return True
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return soft == resource.RLIM_INFINITY or open_files() + ROOM <= soft
    except OSError:  # not one is left
        return False


class PageLoader(DataLoader[Batch]):
    """A `DataLoader` that raises its workers' errors unchanged, and only when a batch is asked for."""

    def __init__(self, dataset: Dataset, collate_fn: Callable[[Any], Any], **more: Any) -> None:
        super().__init__(dataset, collate_fn=WithRoom(collate_fn), **more)
        self.skipped: set[str] = set()

    def name(self, errors: list[PageError]) -> None:
        """Names each page that was skipped, once and in whatever process."""
        for error in errors:
            if str(error) not in self.skipped:
                self.skipped.add(str(error))
                text = f"page skipped, {len(self.skipped)} so far: {error}; the next of its batch takes its place"
                tqdm.write(text, file=sys.stderr)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """
        Raises:
            PageError: see `PageDataset`; a plain `DataLoader` wraps it in the worker's stack.
            WorkerError: a worker is gone.
        """
        try:
            others = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
            batches = super().__iter__()
            if others is not None and threading.current_thread() is threading.main_thread():
                # torch would raise a worker's death wherever this process is: halfway through a step, or a save. And
                # the signal may be another program's, whose guest we are.
                signal.signal(signal.SIGCHLD, others)
            for batch in batches:
                if isinstance(batch, PageError | WorkerError):
                    raise batch
                if isinstance(batch, Packed):
                    self.name(batch.errors)
                    batch = batch.batch()
                yield batch
        except (RuntimeError, OSError) as error:  # a worker was killed, or shared memory or file handles ran out
            ran_out = "open files" in str(error) or "ancdata" in str(error)  # torch's words for the same
            raise WorkerError(f"loading pages failed: {NO_ROOM if ran_out else error}") from error


class WorkerError(ValueError):
    """Pages cannot be loaded, and it is not the pages' fault."""


NO_ROOM = "too many open files: raise the limit (ulimit -n 4096), or take fewer workers or smaller batches"


@dataclass(frozen=True)
class WithRoom:
    """Collates, but where a worker has no room to send the batch, says so: torch would lose it and wait for ever."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        if get_worker_info() is not None and not has_room():
            return WorkerError(f"loading pages failed: {NO_ROOM}")
        return self.collate(samples)


def begin_worker(_: int) -> None:
    """What a process that loads or draws pages does first."""
    cv2.setNumThreads(0)  # these processes are the parallelism; OpenCV's own threads only fight with them
    leave_signals_to_the_main_process()


def leave_signals_to_the_main_process() -> None:
    """Ctrl-C, torchrun and job schedulers signal workers as well: they end when the main process does, not before."""
    signal.set_wakeup_fd(-1)  # what a worker is told does not wake the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS: there SIGTERM ends a worker, and then the run
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_heed_the_main_process, daemon=True).start()


def _heed_the_main_process() -> None:
    """Ends this worker when the main process says so, or is gone: torch looks for that between batches only."""
    main, parent = multiprocessing.parent_process(), os.getppid()  # another process where a server forks the workers
    assert main is not None
    while os.getppid() == parent:
        signalled = signal.sigtimedwait({signal.SIGTERM}, 1)
        if signalled is not None and signalled.si_pid == main.pid:
            break
    os._exit(0)


class Packed(NamedTuple):
    """A batch on its way from a worker, in few tensors: each is a file that both processes hold open."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (sum T,) of all pages
    boxes: Tensor  # (sum T, 4)
    pages: list[tuple[Any, ...]]  # of each: valid size, number of boxes, `Target`'s id and size
    errors: list[PageError]

    def batch(self) -> Batch:
        sizes, counts, ids, originals = zip(*self.pages, strict=True)
        truth = zip(self.labels.split(counts), self.boxes.split(counts), ids, originals, strict=True)
        return Batch(self.images, torch.tensor(sizes), [Target(*page) for page in truth])


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
