"""The ablation: which runs it makes, what it repeats, and its table. The runs here are pretended."""

import json
import sys
from pathlib import Path

import ablation
import pytest
import torch
import yaml

from dfine.config import Config, ConfigError, DistillConfig, override

STEPS = 10
ROWS = ("alone", "classes+boxes+shared", ablation.FULL)
AP = dict(zip(ROWS, (0.2, 0.25, 0.3), strict=True))


def student(weight: float = 0) -> Config:
    keys = [key for weights in ablation.TERMS.values() for key in weights]
    config = override(Config(), [f"train.max_steps={STEPS}", "distill.teacher=teacher.pt"])
    return override(config, [f"distill.{key}={weight}" for key in keys])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started; each run ends at once, with the AP of its row and 2 points more a seed."""
    started = []

    def execute(script: str, *arguments: str) -> None:
        folder = Path(yaml.safe_load(Path(arguments[1]).read_text())["run_dir"])
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
        patch.setattr(sys, "argv", ["ablation", *common, "--rows", ",".join(ROWS), *arguments])
        ablation.main()


def test_a_row_has_its_terms_and_no_others(tmp_path: Path):
    config = ablation.trial(student(weight=3), tmp_path, "classes+boxes+shared", seed=1)
    same = [f"run_dir={tmp_path / 'classes+boxes+shared_seed1'}", "train.seed=1"]
    weights = ["classes.weight=3", "boxes.weight=3", "shared=3"]
    assert config == override(student(0), [*same, *(f"distill.{weight}" for weight in weights)])
    assert ablation.trial(student(), tmp_path, "alone", seed=1).distill == DistillConfig()
    with pytest.raises(ConfigError, match="--rows: no term 'class'; known: classes, boxes,"):
        ablation.trial(student(), tmp_path, "boxes+class", seed=0)


def test_a_row_keeps_the_configs_weights_and_tries_its_terms_that_have_none(tmp_path: Path):
    full, unset = (ablation.trial(student(weight), tmp_path, ablation.FULL, 0).distill for weight in (3, 0))
    assert (full.shared, full.cells.boxes, full.memory.weight, full.denoising) == (3, 3, 3, 3)
    assert (unset.shared, unset.cells.boxes, unset.memory.weight, unset.denoising) == (1, 5, 2, 1)


def test_the_table_gives_means_spreads_and_paired_differences(
    started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Seeds differ by 2 points (standard deviation 1.4), but the differences are the same for both."""
    run(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "| alone | 21.0 | 1.4 | 20.0, 22.0 |" in lines
    assert "| classes+boxes+shared, less alone | +5.0 | 0.0 | +5.0, +5.0 |" in lines
    assert started == [
        f"{'train' if row == 'alone' else 'distill'}.py {row}_seed{seed}" for row in ROWS for seed in (0, 1)
    ]


def test_what_is_finished_is_skipped_and_what_is_not_goes_on(started: list[str], tmp_path: Path):
    run(tmp_path)
    finish(tmp_path / "out" / f"{ROWS[1]}_seed1", 0.1, step=STEPS - 1)
    del started[:]
    run(tmp_path)
    assert started == [f"distill.py {ROWS[1]}_seed1"]


def test_runs_of_other_settings_are_not_mixed_in(started: list[str], tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"alone_seed0\.yaml: this run was made with other settings"):
        run(tmp_path, "train.learning_rate=1e-3")


def test_a_run_that_was_stopped_before_its_end_has_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ablation, "execute", lambda *_: finish(tmp_path / "out" / "alone_seed0", 0.1, step=3))
    with pytest.raises(ConfigError, match=r"alone_seed0: the run was stopped before its end"):
        run(tmp_path)


def test_a_script_that_fails_stops_the_table():
    with pytest.raises(ConfigError, match=r"nothing\.py --seed 1: failed"):
        ablation.execute("nothing.py", "--seed", "1")
