"""What distillation adds: `python tests/benchmarks/ablation.py --config FILE --out DIR distill.teacher=PATH`.

Trains the same student alone and with parts of the distillation, each with the same seeds and steps, one run after the
other, and prints the table. A row names the terms that it has, such as `classes+boxes+shared`: the others have weight
0, its own those of the config, or those below where the config leaves them at 0. Started again, it skips what is
finished and goes on with what is not.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import yaml

from dfine import config as configs
from dfine.checkpoints import ours
from dfine.config import Config, ConfigError

TERMS = {  # the weights of each term in `distill`; `shared`: on the teacher's queries
    "classes": {"classes.weight": 1.0},
    "boxes": {"boxes.weight": 5.0},
    "go_lsd": {"go_lsd.weight": 1.5},
    "shared": {"shared": 1.0},
    "cells": {"cells.classes": 1.0, "cells.boxes": 5.0},
    "memory": {"memory.weight": 2.0},
    "denoising": {"denoising": 1.0},
}
ALONE, FULL = "alone", "+".join(TERMS)
ROOT = Path(__file__).parents[2]  # where the scripts are


def trial(config: Config, out: Path, row: str, seed: int) -> Config:
    """The config of one run.

    Raises:
        ConfigError: the row has a term that there is not.
    """
    config = configs.override(config, [f"run_dir={out / f'{row}_seed{seed}'}", f"train.seed={seed}"])
    if row == ALONE:
        return configs.override(config, ["distill={}"])
    terms = row.split("+")
    unknown = [term for term in terms if term not in TERMS]
    if unknown:
        raise ConfigError(f"--rows: no term {unknown[0]!r}; known: {', '.join(TERMS)}, and the row {ALONE}")
    overrides = []
    for term, weights in TERMS.items():
        section = getattr(config.distill, term)
        for key, usual in weights.items():
            given = section if isinstance(section, float | int) else getattr(section, key.partition(".")[2])
            overrides.append(f"distill.{key}={(given or usual) if term in terms else 0.0}")
    return configs.override(config, overrides)


def result(config: Config) -> float | None:
    """AP in points at the run's last step, or None while the run is not finished or not whole."""
    folder, train = Path(config.run_dir), config.train
    try:
        content = ours.read(folder / "last.pt")
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (ours.CheckpointError, OSError, IndexError, json.JSONDecodeError):
        return None  # train.py --resume mends what can be mended, and says what is wrong
    steps = train.epochs * content["epoch_steps"]
    finished = content["step"] == line["step"] == min(steps, train.max_steps or steps)
    return 100 * (line["AP"] or 0.0) if finished else None


def complete(config: Config) -> float:
    """The run's result; it is started or resumed if need be.

    Raises:
        ConfigError: the folder holds a run with other settings, or the run failed or was stopped.
    """
    settings = yaml.safe_dump(configs.to_dict(config), sort_keys=False)
    file = Path(f"{config.run_dir}.yaml")
    if file.exists() and file.read_text() != settings:
        raise ConfigError(f"{file}: this run was made with other settings: use the same ones, or another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings)
    if result(config) is None:
        print(config.run_dir, flush=True)
        execute("distill.py" if config.distill.teacher else "train.py", "--config", str(file), "--resume")
    points = result(config)
    if points is None:
        raise ConfigError(f"{config.run_dir}: the run was stopped before its end; the same command goes on with it")
    return points


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


def table(points: dict[str, list[float]]) -> str:
    """Markdown: the AP of each row, and its difference from the first one seed by seed.

    Args:
        points: AP in points by row and seed.
    """
    lines = ["| terms | AP | spread | by seed |", "|---|---|---|---|"]
    first, *others = points
    lines += [f"| {row} | {summary(by_seed, '.1f')} |" for row, by_seed in points.items()]
    for row in others:
        differences = [a - b for a, b in zip(points[row], points[first], strict=True)]
        lines.append(f"| {row}, less {first} | {summary(differences, '+.1f')} |")
    return "\n".join(lines)


def summary(values: list[float], form: str) -> str:
    """Mean, standard deviation over seeds, and each."""
    spread = f"{stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):{form}} | {spread} | {', '.join(format(value, form) for value in values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the student's YAML file")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: 3)")
    parser.add_argument("--rows", default=f"{ALONE},{FULL}", help="with commas between (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as distill.teacher=PATH")
    arguments = parser.parse_intermixed_args()
    config = configs.load(arguments.config, arguments.overrides)
    if not config.distill.teacher:
        raise ConfigError("distill.teacher: name a checkpoint")
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    rows, seeds = arguments.rows.split(","), range(arguments.seeds)
    runs = {row: [trial(config, arguments.out, row, seed) for seed in seeds] for row in rows}
    print(table({row: [complete(run) for run in own] for row, own in runs.items()}))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except ValueError as error:
        sys.exit(f"error: {error}")
