"""The values of a step, and metrics.jsonl: a line for each evaluation, with the means of the steps since the last."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfine import distributed
from dfine.config import ConfigError
from dfine.structures import Batch


def finite_means(step: int, batches: list[Batch], losses: list[dict[str, Tensor]], norm: Tensor) -> dict[str, float]:
    """The mean of every loss over the batches of a step and over the processes, and the gradient norm; one copy.

    Args:
        losses: of each batch, the same names in each; a tensor of several numbers counts as their sum.
    Raises:
        FloatingPointError: in every process, if a value of any process is not finite; names the value, the step, and
            the image ids of the processes whose losses are not finite (of all, where only the gradient norm is not).
    """
    means = {name: torch.stack([each[name].detach().sum() for each in losses]).mean() for name in losses[0]}
    own = torch.stack([*means.values(), norm])
    everywhere = distributed.sum_over_processes(own) / distributed.world_size()
    values = dict(zip([*means, "gradient_norm"], everywhere.tolist(), strict=True))
    if not all(map(np.isfinite, values.values())):
        wrong = [name for name, value in zip(values, own.tolist(), strict=True) if not np.isfinite(value)]
        pages = [target.image_id for batch in batches for target in batch.targets]
        seen = distributed.gather((wrong, pages))
        theirs = [each for each in seen if set(each[0]) - {"gradient_norm"}] or seen
        wrong = [name for name in values if any(name in names for names, _ in theirs)]
        pages = [page for _, pages in theirs for page in pages]
        raise FloatingPointError(f"step {step}: not finite: {', '.join(wrong)}; image ids {pages}")
    return values


class Pace:
    """Notices that steps on a CPU take three times as long as they did: libgomp's threads wait for one another, so one
    busy program beside two threads costs far more than its share.
    """

    def __init__(self) -> None:
        self.recent, self.best, self.said = deque[float](maxlen=10), float("inf"), False

    def slower(self, seconds: float) -> str | None:
        """Takes the time of a step; what to say, once, if the last ten were slow."""
        self.recent.append(seconds)
        if len(self.recent) < 10 or self.said:
            return None
        mean = sum(self.recent) / 10
        self.best = min(self.best, mean)
        if mean <= 3 * self.best:
            return None
        self.said = True
        advice = "; train.threads=1 (with --resume) loses less to them" if torch.get_num_threads() > 1 else ""
        return f"a step takes {mean:.2g} s, before it took {self.best:.2g}: other programs may hold the cores{advice}"


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def recall(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to a step. Drops later ones from the file: a run resumed at that step will write them again.

    Raises:
        ConfigError: a line is broken; names file and line.
    """
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines()  # on a full disk the last may have been cut short
    lines = [_evaluation(text, f"{path}: line {number}") for number, text in enumerate(whole, start=1)]
    lines = [line for line in lines if line["step"] <= step]
    beside = path.with_name(f"{path.name}.writing")
    beside.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    beside.replace(path)
    return lines


def _evaluation(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        known = isinstance(line["step"], int) and isinstance(line["AP"], float | int | None)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"{where}: not an evaluation: mend or delete this line")
    return line


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """The means of all values, and how the gradient norms were spread.

    A resumed run may have other loss terms: the mean of each is over the steps that had it.
    """
    if not steps:
        return {}
    counts, edges = np.histogram([step["gradient_norm"] for step in steps], bins=20)
    names = dict.fromkeys(name for step in steps for name in step)
    means: dict[str, Any] = {name: float(np.mean([s[name] for s in steps if name in s])) for name in names}
    return means | {"gradient_norm_histogram": {"counts": counts.tolist(), "edges": edges.tolist()}}
