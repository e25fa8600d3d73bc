"""The ablation: which runs it makes, what it repeats, and its table. The runs here are pretended."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dfine.config import Config, ConfigError, DistillConfig, override
from dfine.tools import ablation

STEPS = 10
KEYS = ("classes.weight", "boxes.weight", "go_lsd.weight", "shared", "cells.classes", "cells.boxes", "memory.weight")
KEYS += ("denoising",)
ROWS = {
    "student_alone": None,
    "class_box": (1, 1, 0, 1, 0, 0, 0, 0),
    "class_box_go-lsd": (1, 1, 1, 1, 0, 0, 0, 0),
    "class_box_go-lsd_cells": (1, 1, 1, 1, 1, 1, 0, 0),
    "class_box_go-lsd_cells_memory": (1, 1, 1, 1, 1, 1, 1, 0),
    "full": (1, 1, 1, 1, 1, 1, 1, 1),
    "full_without_second_pass": (1, 1, 1, 0, 1, 1, 1, 1),
    "full_without_go-lsd": (1, 1, 0, 1, 1, 1, 1, 1),
    "class": (1, 0, 0, 1, 0, 0, 0, 0),
    "box": (0, 1, 0, 1, 0, 0, 0, 0),
    "go-lsd": (0, 0, 1, 1, 0, 0, 0, 0),
}
AP = dict.fromkeys(ROWS, 0.3) | {"student_alone": 0.2, "class_box": 0.25, "class_box_go-lsd": 0.28, "go-lsd": 0.23}
FIVE = ("--rows", "student_alone,class_box,class_box_go-lsd,class,go-lsd")


def student(weight: int = 1) -> Config:
    config = override(Config(), [f"train.max_steps={STEPS}", "distill.teacher=teacher.pt"])
    return override(config, [f"distill.{key}={weight}" for key in KEYS])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started; each run ends at once, with the AP of its row and 2 points more a seed."""
    started = []

    def execute(script: str, *arguments: str) -> None:
        if script == "evaluate.py":
            folder = Path(next(a for a in arguments if a.startswith("run_dir=")).partition("=")[2])
            folder.mkdir(parents=True)
            (folder / "teacher.metrics.json").write_text('{"AP": 0.5}')
            return
        config = yaml.safe_load(Path(arguments[1]).read_text())
        folder = Path(config["run_dir"])
        started.append(f"{script} {folder.name}")
        row, _, seed = folder.name.partition("_seed")
        finish(folder, AP[row] + 0.02 * int(seed))

    monkeypatch.setattr(ablation, "execute", execute)
    return started


def finish(folder: Path, average: float, step: int = STEPS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "epoch_steps": 100}, folder / "last.pt")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "AP": average}) + "\n")


def run(folder: Path, *arguments: str) -> None:
    (folder / "student.yaml").write_text(
        yaml.safe_dump({"train": {"max_steps": STEPS}, "distill": {"teacher": "teacher.pt"}})
    )
    with pytest.MonkeyPatch.context() as patch:
        common = ["--config", str(folder / "student.yaml"), "--out", str(folder / "out"), "--seeds", "2"]
        patch.setattr(sys, "argv", ["ablation", *common, *arguments])
        ablation.main()


def test_every_row_differs_by_its_terms_and_seed_alone(tmp_path: Path):
    trials = ablation.plan(student(), tmp_path, seeds=3)
    assert [trial.row for trial in trials].count("student alone") == 3
    assert len({trial.folder for trial in trials}) == len(trials) == 8 * 3 + 3
    for trial in trials:
        row, _, seed = trial.folder.name.partition("_seed")
        same = [f"run_dir={trial.folder}", f"train.seed={seed}"]
        if ROWS[row] is None:
            expected = override(student(), [*same, "distill.teacher="])
            assert trial.config.distill == DistillConfig()
            assert trial.config.train == expected.train
        else:
            terms = zip(KEYS, ROWS[row], strict=True)
            assert trial.config == override(student(), [*same, *(f"distill.{key}={w}" for key, w in terms)])


def test_a_row_keeps_the_configs_weights_and_tries_its_terms_that_have_none(tmp_path: Path):
    full, unset = (ablation.plan(student(weight), tmp_path, 1, ["full"])[0].config.distill for weight in (3, 0))
    assert (full.shared, full.cells.boxes, full.memory.weight, full.denoising) == (3, 3, 3, 3)
    assert (unset.shared, unset.cells.boxes, unset.memory.weight, unset.denoising) == (1, 5, 2, 1)


def test_rows_are_selected_by_name(started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, "--rows", "full,class_box")
    assert started == [f"distill.py {row}_seed{seed}" for seed in (0, 1) for row in ("full", "class_box")]
    assert "- student alone" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--rows: no row 'ful'; known: student_alone, class_box, "):
        run(tmp_path, "--rows", "ful")


def test_the_table_gives_means_spreads_and_paired_differences(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Seeds differ by 2 points (standard deviation 1.4), but the differences are the same for both."""
    run(tmp_path, *FIVE)
    lines = capsys.readouterr().out.splitlines()
    assert "| student alone | 21.0 | 1.4 | 20.0, 22.0 |" in lines
    assert "| GO-LSD | 23.0 |  | 23.0 |" in lines
    assert "| (the teacher) | 50.0 | | |" in lines
    assert "| class + box + GO-LSD - student alone | +8.0 | 0.0 | +8.0, +8.0 |" in lines
    assert "| class + box + GO-LSD - class + box | +3.0 | 0.0 | +3.0, +3.0 |" in lines
    assert {line.split()[0] for line in started if "alone" in line} == {"train.py"}
    assert {line.split()[0] for line in started if "alone" not in line} == {"distill.py"}


def test_what_is_finished_is_skipped_and_what_is_not_goes_on(started: list[str], tmp_path: Path):
    run(tmp_path, *FIVE)
    assert len(started) == 2 * 3 + 2
    finish(tmp_path / "out" / "class_box_seed1", 0.1, step=STEPS - 1)
    del started[:]
    run(tmp_path, *FIVE)
    assert started == ["distill.py class_box_seed1"]


def test_runs_of_other_settings_are_not_mixed_in(started: list[str], tmp_path: Path):
    run(tmp_path, *FIVE)
    with pytest.raises(ConfigError, match=r"student_alone_seed0\.yaml: this run was made with other settings"):
        run(tmp_path, *FIVE, "train.learning_rate=1e-3")


def test_a_run_that_was_stopped_before_its_end_has_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "execute", lambda *_: finish(tmp_path / "out" / "student_alone_seed0", 0.1, step=3))
    with pytest.raises(ConfigError, match=r"student_alone_seed0: the run was stopped before its end"):
        run(tmp_path, *FIVE)


def test_a_script_that_fails_stops_the_table(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nothing\.py --seed 1: failed"):
        ablation.execute("nothing.py", "--seed", "1")
