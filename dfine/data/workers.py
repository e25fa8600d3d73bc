"""Processes that load pages: what they need, what they send, and how they end."""

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
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from dfine.config import ConfigError
from dfine.data.transforms import PageError
from dfine.structures import Batch, Target

try:
    import resource
except ImportError:  # Windows, which shares memory without open files
    resource = None  # type: ignore[assignment]


class PageLoader(DataLoader[Batch]):
    """A `DataLoader` that raises its workers' errors unchanged, and only when a batch is asked for."""

    def __init__(self, dataset: Dataset, collate_fn: Callable[[Any], Any], **more: Any) -> None:
        super().__init__(dataset, collate_fn=WithRoom(collate_fn), worker_init_fn=begin_worker, **more)
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


FEWER = "or take fewer workers or smaller batches"
NO_ROOM = f"too many open files: raise the limit (ulimit -n 4096), {FEWER}"
NO_MEMORY = f"too little shared memory: raise its limit (docker run --shm-size 8g), {FEWER}"


@dataclass(frozen=True)
class WithRoom:
    """Collates, but where a worker has no room to send the batch, says so: torch would lose it and wait for ever."""

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        if get_worker_info() is None:
            return self.collate(samples)
        if not has_room():
            return WorkerError(f"loading pages failed: {NO_ROOM}")
        batch = self.collate(samples)
        try:
            for tensor in tensors_of(batch):
                tensor.share_memory_()  # on its way torch would do so, and lose the batch where there is too little
        except RuntimeError as error:
            cause = NO_ROOM if "open files" in str(error) else NO_MEMORY
            return WorkerError(f"loading pages failed: {cause} ({error})")
        return batch


def tensors_of(batch: Any) -> Iterator[Tensor]:
    if torch.is_tensor(batch):
        yield batch
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from tensors_of(part)


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
