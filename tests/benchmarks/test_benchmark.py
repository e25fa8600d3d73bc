"""The benchmark prints what it promises, on a tiny model."""

import argparse
import itertools
import sys
from pathlib import Path

import benchmark
import pytest
import torch
import yaml
from stopwatch import Stopwatch, in_turns, measure, spread
from workload import Case, size

from dfine import config as configs
from dfine.checkpoints import ours
from dfine.config import ConfigError
from dfine.model.detector import DFine

TINY = """
model:
  backbone: {name: test_convnext, pretrained: false}
  hidden_dim: 32
  encoder: {heads: 4, feedforward_dim: 32, depth_mult: 0.34, expansion: 0.5}
  decoder: {heads: 4, feedforward_dim: 32, layers: 2, points: [1, 1, 1]}
"""
CPU = torch.device("cpu")
PARTS = ["forward pass", "matching and losses", "backward pass", "clipping and optimizer"]
FORMS = ["inference", "inference, deploy()", "inference, deploy(fast=True)"]


def printed(
    folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, list[str]]:
    """The cells of each line of the benchmark's tables."""
    (folder / "tiny.yaml").write_text(TINY)
    own = ["--config", str(folder / "tiny.yaml"), "--repeats", "1", "--batch", "1", "--size", "64x96", "--boxes", "3"]
    patch.setattr(sys, "argv", ["benchmark", "train.threads=1", *own, "--queries", "10", *arguments])
    benchmark.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    return {name: cells for name, *cells in lines}


def test_every_part_is_timed_and_the_parts_add_up_to_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    rows = printed(tmp_path, monkeypatch, capsys, "distill.teacher=none.pt")  # which is said, and not measured
    assert [*rows] == ["1 x 64x96, 3 boxes, 10 queries", "---|---|---", *PARTS, "training step", *FORMS]
    times = {part: float(rows[part][0]) for part in [*PARTS, "training step", *FORMS]}
    assert all(time > 0 for time in times.values())
    assert sum(times[part] for part in PARTS) == pytest.approx(times["training step"], abs=0.3)


def test_with_a_teacher_it_says_what_distillation_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = configs.from_dict(yaml.safe_load(TINY))
    names = [{"id": label, "name": f"class {label}"} for label in range(5)]
    ours.save(tmp_path / "teacher.pt", ours.weights(settings, names, DFine(settings.model, 5)))
    rows = printed(tmp_path, monkeypatch, capsys, f"distill.teacher={tmp_path / 'teacher.pt'}")
    distilled, plain, ratio, _ = rows["distillation step / training step"]
    assert float(ratio) == pytest.approx(float(distilled) / float(plain), rel=0.1)


def test_a_teacher_that_teaches_nothing_is_refused():
    settings = configs.override(configs.from_dict(yaml.safe_load(TINY)), ["distill.alpha=0", "distill.teacher=x.pt"])
    with pytest.raises(ConfigError, match="nothing to measure"):
        benchmark.with_teacher(settings, Case(1, 64, 96, 3, 10), CPU, repeats=2)


def test_beside_transformers_it_compares_a_step_and_inference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers", reason="needs the extra `bench`")
    rows = printed(tmp_path, monkeypatch, capsys, "--peer")
    for what in ("training step", *FORMS[1:]):
        assert float(rows[f"{what} / transformers'"][2]) > 0


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="100x64"):
        size("100x64")


def test_the_first_repeats_only_warm_up():
    calls = itertools.count()

    def run(watch: Stopwatch) -> None:
        next(calls)
        watch.mark("part")

    times = measure(run, CPU, repeats=10)
    assert len(times["part"]) == len(times["whole"]) == 10
    assert next(calls) == 12


def test_a_spread_is_median_and_tenths():
    assert spread([float(x) for x in range(20, 0, -1)]) == (10.5, 3, 18)
    assert spread([7.0]) == (7, 7, 7)


def test_what_is_compared_runs_in_turns():
    turns: list[str] = []
    runs = {"ours": lambda: turns.append("ours"), "theirs": lambda: turns.append("theirs")}
    times = in_turns(runs, CPU, repeats=3)
    assert turns == ["ours", "theirs"] * 4
    assert [*times] == ["ours", "theirs"]
