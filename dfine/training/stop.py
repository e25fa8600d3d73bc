"""How a run is told to stop: by signals, which end its waits as well."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dfine import distributed


class Stop:
    """Whether this process was told to stop.

    A signal may come more than once: job schedulers signal every process, and torchrun passes its own on. A second
    Ctrl-C, some seconds after the first, ends the process at once.
    """

    REPEATS = 5.0  # seconds in which another Ctrl-C is taken for the first one, passed on
    PATIENCE = 5.0  # seconds that a wait may go on when the process was told to stop

    def __init__(self, leave: Callable[[], NoReturn]) -> None:
        """
        Args:
            leave: ends the process from another thread, while this one waits.
        """
        self.leave = leave
        self.told = False
        self.ctrl_c: float | None = None  # when the first one came
        self.working, self.waits = threading.Lock(), 0  # held but while this process waits; how often it did
        self.working.acquire()

    def listen(self) -> None:
        """From now on a first signal no longer ends the process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)
        ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        signal.set_wakeup_fd(mouth.fileno())
        threading.Thread(target=self.cut_waits_short, args=(ears, mouth), daemon=True).start()

    def hear(self, number: int, _: Any) -> None:
        self.told = True
        if number == signal.SIGINT:
            now = time.monotonic()
            self.ctrl_c = self.ctrl_c or now
            if now - self.ctrl_c > self.REPEATS:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While this process waits for pages or other processes, between two steps or in an evaluation."""
        self.waits += 1
        self.working.release()
        try:
            yield
        finally:
            self.working.acquire()

    def cut_waits_short(self, ears: socket.socket, mouth: socket.socket) -> None:
        """In a thread of its own: leaves if the process was told to stop and waits on for `PATIENCE`.

        Pages may never come, from a disk or a worker that hangs, nor the other processes that wait for theirs. And
        `hear` may not be called then: Python calls it between two of its own steps, and torch waits in one.

        Args:
            ears: where each signal's number arrives from `mouth`, which lives as long as this thread.
        """
        while ears.recv(1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        while True:
            waits = self.waits
            time.sleep(self.PATIENCE if distributed.is_main() else 2 * self.PATIENCE)  # the main process has to save
            if self.working.acquire(blocking=False):
                if waits == self.waits:
                    self.leave()
                self.working.release()
