"""What distillation adds: `python -m dfine.tools.ablation --config FILE --out DIR distill.teacher=PATH`.

Trains the same student alone and with parts of the distillation, each with the same seeds and steps, one run after the
other, and prints the table. Started again, it skips what is finished and goes on with what is not.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import yaml

from dfine import config as configs
from dfine.checkpoints import ours
from dfine.config import Config, ConfigError

TRIED = {  # the weights of `distill`, and what a row gives those of its terms that the config leaves at 0
    "classes.weight": 1.0,
    "boxes.weight": 5.0,
    "go_lsd.weight": 1.5,
    "shared": 1.0,
    "cells.classes": 1.0,
    "cells.boxes": 5.0,
    "memory.weight": 2.0,
    "denoising": 1.0,
}
ALONE, CLASS_BOX, GO_LSD, FULL = "student alone", "class + box", "class + box + GO-LSD", "full"
WITH_CELLS, WITH_MEMORY = f"{GO_LSD} + cells", f"{GO_LSD} + cells + memory"
NO_SECOND_PASS, NO_GO_LSD = "full without second pass", "full without GO-LSD"
WITHOUT: dict[str, tuple[str, ...]] = {  # the weights that are 0 in each row; names are of keys or their sections
    CLASS_BOX: ("go_lsd", "cells", "memory", "denoising"),
    GO_LSD: ("cells", "memory", "denoising"),
    WITH_CELLS: ("memory", "denoising"),
    WITH_MEMORY: ("denoising",),
    FULL: (),
    NO_SECOND_PASS: ("shared",),
    NO_GO_LSD: ("go_lsd",),
    "class": ("boxes", "go_lsd", "cells", "memory", "denoising"),
    "box": ("classes", "go_lsd", "cells", "memory", "denoising"),
    "GO-LSD": ("classes", "boxes", "cells", "memory", "denoising"),
}
SINGLE = ("class", "box", "GO-LSD")  # of these one seed is enough
COMPARED = (
    *((row, ALONE) for row in WITHOUT if row not in SINGLE),
    (GO_LSD, CLASS_BOX),
    (WITH_CELLS, GO_LSD),
    (WITH_MEMORY, WITH_CELLS),
    (FULL, WITH_MEMORY),
    (NO_SECOND_PASS, FULL),
    (NO_GO_LSD, FULL),
)
ROOT = Path(__file__).parents[2]  # where the scripts are


class Trial(NamedTuple):
    """One run of the table."""

    row: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


def slug(row: str) -> str:
    """A row's name on the command line and in folders."""
    return row.replace(" + ", "_").replace(" ", "_").lower()


ROWS = {slug(row): row for row in (ALONE, *WITHOUT)}


def plan(config: Config, out: Path, seeds: int, rows: Collection[str] = ROWS) -> list[Trial]:
    """The runs of some rows, with every seed from 0; of the single terms with seed 0.

    Args:
        rows: their slugs.
    Raises:
        ConfigError: there is no such row.
    """
    unknown = [row for row in rows if row not in ROWS]
    if unknown:
        raise ConfigError(f"--rows: no row {unknown[0]!r}; known: {', '.join(ROWS)}")
    chosen = [ROWS[row] for row in rows]
    order = [(row, seed) for seed in range(seeds) for row in chosen if row not in SINGLE]
    order += [(row, 0) for row in chosen if row in SINGLE]
    trials = []
    for row, seed in order:
        own = configs.override(config, [f"run_dir={out / f'{slug(row)}_seed{seed}'}", f"train.seed={seed}"])
        trials.append(Trial(row, seed, configs.override(own, overrides(row, config))))
    return trials


def overrides(row: str, config: Config) -> list[str]:
    """What a row changes in `distill`: terms that it does without have no weight, the others have one."""
    if row == ALONE:
        return ["distill={}"]
    changed = []
    for key, tried in TRIED.items():
        section, _, name = key.partition(".")
        given = getattr(config.distill, section)
        weight = (getattr(given, name) if name else given) or tried
        changed.append(f"distill.{key}={0.0 if section in WITHOUT[row] else weight}")
    return changed


def result(trial: Trial) -> float | None:
    """AP in points at the run's last step, or None while the run is not finished or not whole."""
    metrics, train = trial.folder / "metrics.jsonl", trial.config.train
    try:
        content = ours.read(trial.folder / "last.pt")
        line = json.loads(metrics.read_text().splitlines()[-1])
    except (ours.CheckpointError, OSError, IndexError, json.JSONDecodeError):
        return None  # train.py --resume mends what can be mended, and says what is wrong
    steps = train.epochs * content["epoch_steps"]
    finished = content["step"] == line["step"] == min(steps, train.max_steps or steps)
    return 100 * (line["AP"] or 0.0) if finished else None


def complete(trial: Trial) -> float:
    """The run's result; it is started or resumed if need be.

    Raises:
        ConfigError: the folder holds a run with other settings, or the run failed or was stopped.
    """
    settings = yaml.safe_dump(configs.to_dict(trial.config), sort_keys=False)
    file = trial.folder.with_suffix(".yaml")
    if file.exists() and file.read_text() != settings:
        raise ConfigError(f"{file}: this run was made with other settings: use the same ones, or another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings)
    if result(trial) is None:
        print(f"{trial.row}, seed {trial.seed}: {trial.folder}", flush=True)
        execute("train.py" if trial.row == ALONE else "distill.py", "--config", str(file), "--resume")
    points = result(trial)
    if points is None:
        raise ConfigError(f"{trial.folder}: the run was stopped before its end; the same command goes on with it")
    return points


def teacher(config: Config, out: Path) -> float:
    """The teacher's AP in points on the students' pages."""
    file = out / "teacher" / f"{Path(config.distill.teacher).stem}.metrics.json"
    if not file.exists():
        val = [f"data.val.{key}={value}" for key, value in dict(config.data.val).items()]
        execute("evaluate.py", "--checkpoint", config.distill.teacher, f"run_dir={file.parent}", *val)
    return 100 * json.loads(file.read_text())["AP"]


def execute(script: str, *arguments: str) -> None:
    """Runs a script to its end; a signal to stop is passed on, and the script saves before it obeys.

    Raises:
        ConfigError: it failed.
    """
    with subprocess.Popen([sys.executable, str(ROOT / script), *arguments]) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code:
        raise ConfigError(f"{script} {' '.join(arguments)}: failed")


def table(points: dict[str, dict[int, float]], teacher_points: float) -> str:
    """Two Markdown tables: AP by row, and differences between rows seed by seed.

    Args:
        points: AP in points by row and seed.
    """
    lines = ["| trained with | AP | spread | by seed |", "|---|---|---|---|"]
    lines += [f"| {row} | {_summary(list(by_seed.values()), '.1f')} |" for row, by_seed in points.items()]
    lines += [f"| (the teacher) | {teacher_points:.1f} | | |", ""]
    lines += ["| difference | AP | spread | by seed |", "|---|---|---|---|"]
    for row, other in ((row, other) for row, other in COMPARED if row in points and other in points):
        differences = [points[row][seed] - points[other][seed] for seed in points[row]]
        lines.append(f"| {row} - {other} | {_summary(differences, '+.1f')} |")
    return "\n".join(lines)


def _summary(values: list[float], form: str) -> str:
    """Mean, standard deviation over seeds, and each."""
    spread = f"{stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{form}} | {spread} | {', '.join(format(value, form) for value in values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the student's YAML file")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each compared row (default: %(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas between (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as distill.teacher=PATH")
    arguments = parser.parse_intermixed_args()
    config = configs.load(arguments.config, arguments.overrides)
    if not config.distill.teacher:
        raise ConfigError("distill.teacher: name a checkpoint")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    points: dict[str, dict[int, float]] = {}
    for trial in plan(config, arguments.out, arguments.seeds, arguments.rows.split(",")):
        points.setdefault(trial.row, {})[trial.seed] = complete(trial)
    print(table(points, teacher(config, arguments.out)))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
