"""One process or many: the few things that differ. Imports nothing of ours."""

import contextlib
import mmap
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

T = TypeVar("T")

# Through this group processes wait for one another, on the CPU, and none is given up for being slow: the main process
# saves and measures alone, which may take hours. On GPUs gradients keep torch's limit: there, all are in the same step.
_waiting: Any = None
PATIENCE = timedelta(days=30)


def start() -> torch.device:
    """Joins the processes that `torchrun` started, if it did, and returns this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl")
            global _waiting
            _waiting = dist.new_group(backend="gloo", timeout=PATIENCE)
        else:  # one group for all: of two, torch 2.6 sometimes does not get rid at the end
            dist.init_process_group("gloo", timeout=PATIENCE)
    return device


def _end_with(torchrun: int) -> None:
    """Does what a torchrun that was killed leaves undone: tells this process to stop, and kills it half a minute later.

    torchrun starts each process in a session of its own, so nothing else reaches it then.
    """
    while os.getppid() == torchrun:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
    os.kill(os.getpid(), signal.SIGKILL)


def finish() -> None:
    global _waiting
    _waiting = None
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def cores() -> int:
    """CPU cores for this process: its share of those that the processes on this machine may run on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def say(text: str) -> None:
    """Prints on the main process only, above a progress bar. Nobody needs to read it to the end, as with `| head`."""
    if not is_main():
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sum_over_processes(x: Tensor) -> Tensor:
    """The same sum in every process; `x` itself where there is only one."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    flags = torch.tensor(float(flag))
    if world_size() > 1:
        dist.all_reduce(flags, group=_waiting)
    return bool(flags)


def gather(item: Any, to: int | None = None) -> list[Any]:
    """Every process's item, in order of rank, in every process; with `to` only in that one, none in the others."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    if to is None:
        dist.all_gather_object(items, item, group=_waiting)
        return items
    dist.gather_object(item, items if to == rank() else None, dst=to, group=_waiting)
    return items if to == rank() else []


def on_main(work: Callable[[], T]) -> T:
    """What the main process gets from `work`, in every process; the others wait.

    Raises:
        ValueError: in every process, where `work` raises one.
    """
    return _outcomes(work if is_main() else None)[0]


def _outcomes(work: Callable[[], Any] | None) -> list[Any]:
    """What every process gets from its work, if it has some; see `on_main`."""
    outcome = None
    if work is not None:
        try:
            outcome = work()
        except ValueError as error:
            outcome = error
    outcomes = gather(outcome)
    for each in outcomes:
        if isinstance(each, ValueError):
            raise each
    return outcomes


def once_a_machine(work: Callable[[], T]) -> T:
    """What one process of each machine gets from `work`, in all: its arrays are in memory that they share.

    Raises:
        ValueError: in every process, where `work` raises one.
    """
    if world_size() == 1:
        return work()
    local = int(os.environ.get("LOCAL_RANK", 0))
    with contextlib.ExitStack() as stack:

        def write() -> tuple[str, list[tuple[int, int]]]:
            arrays: list[pickle.PickleBuffer] = []
            data = pickle.dumps(work(), 5, buffer_callback=arrays.append)
            try:
                file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="dfine-"))
                file.write(data)
                places = []
                for array in arrays:
                    file.seek(-file.tell() % 64, os.SEEK_CUR)  # numpy is slow with odd places
                    places.append((file.tell(), file.write(array.raw())))
                file.flush()
            except OSError as error:
                raise ValueError(
                    f"{tempfile.gettempdir()}: cannot write what processes share ({error.strerror}): set TMPDIR to "
                    "another folder"
                ) from error
            return file.name, places

        name, places = _outcomes(None if local else write)[rank() - local]  # torchrun numbers one machine after another
        with open(name, "rb") as shared:
            memory = memoryview(mmap.mmap(shared.fileno(), 0, access=mmap.ACCESS_READ))
        gather(None)  # all have opened it: now it can go
    return pickle.loads(memory, buffers=[memory[start : start + size] for start, size in places])


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Gives every process the main process's buffers."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)
