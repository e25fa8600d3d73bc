"""Measuring times: on a GPU by its own clock (events), on a CPU by the wall clock, or with one thread by the time that
this process spends on the CPU, which is the same but for what other programs take; always after a warm-up."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Milliseconds between marks; it does not wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Ends the part `name`; the first mark only starts."""
        moment: Any = self.clock()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((name, moment))

    def read(self) -> dict[str, float]:
        """The parts and their sum, `whole`; starts anew."""
        if self.cuda:
            torch.cuda.synchronize()
        moments = [moment for _, moment in self.marks]
        spans = [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in pairwise(moments)]
        parts = {name: span for (name, _), span in zip(self.marks[1:], spans, strict=True)}
        self.marks = []
        return parts | {"whole": sum(spans)}


def measure(run: Callable[[Stopwatch], None], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every part that `run` marks, one a repeat; a fifth of the repeats (at least one) warms up."""
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {}
    for repeat in range(-max(1, repeats // 5), repeats):
        watch.mark("start")
        run(watch)
        for part, span in watch.read().items():
            if repeat >= 0:
                times.setdefault(part, []).append(span)
    return times


def in_turns(runs: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of several that are run one after the other, one of each a repeat."""

    def turn(watch: Stopwatch) -> None:
        for name, run in runs.items():
            run()
            watch.mark(name)

    times = measure(turn, device, repeats)
    return {name: times[name] for name in runs}


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest tenth."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return statistics.median(ordered), ordered[tenth], ordered[-1 - tenth]
