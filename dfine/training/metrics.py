"""metrics.jsonl: a line for each evaluation of a run, with the means of its steps since the last one."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dfine.config import ConfigError


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
