"""Functions in processes of their own, joined as by torchrun, and forked from a server that has done the imports."""

import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from dfine.files import lock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def launch(function: Callable[..., object], *arguments: object, count: int = 2) -> list[ForkServerProcess]:
    """Starts `function(*arguments)` once in each of so many processes, every one in a process group of its own."""
    if count > 1:
        skip_where_groups_hang()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_as_rank, args=(rank, count, port, function, arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def skip_where_groups_hang() -> None:
    if torch.__version__ < "2.7":
        pytest.skip("one in twenty of torch 2.6's processes on CPUs (gloo) hangs when it has done its work")


def ends(processes: list[ForkServerProcess]) -> list[int | None]:
    """Waits for processes and returns their exit codes; None: it does not end."""
    for process in processes:
        process.join(timeout=100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def gone(group: int, seconds: float = 20) -> bool:
    """Whether all processes of a process group end by themselves; ends those that do not."""
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files cannot become larger, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def in_use(folder: Path) -> Iterator[int]:
    """Another process has the folder, as `lock` gives it; its number."""
    folder.mkdir(parents=True, exist_ok=True)
    (process,) = launch(_uses, folder, count=1)
    while not (folder / "used").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    yield process.pid
    process.kill()
    process.join()


def _uses(folder: Path) -> None:
    with lock(folder, "--out"):
        (folder / "used").touch()
        time.sleep(100)


def _as_rank(rank: int, count: int, port: int, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a script
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
    function(*arguments)
