"""The benchmark runs and says what it promises; what it costs to match and to compute the losses, counted not timed."""

import argparse
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from outputs import made_up, with_denoising
from tiny import noised, random_boxes, target, tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dfine import config as configs
from dfine.checkpoints import ours
from dfine.config import ConfigError, LossConfig
from dfine.losses.criterion import criterion
from dfine.model import deformable_attention
from dfine.model.deformable_attention import by_grid_sample
from dfine.model.detector import DFine, detect
from dfine.model.fdr import weighting_function
from dfine.structures import Target
from dfine.tools import benchmark
from dfine.tools.stopwatch import Stopwatch, measure, race, spread
from dfine.tools.workload import Case

TINY = """
model:
  backbone: {name: test_convnext, pretrained: false}
  hidden_dim: 32
  encoder: {heads: 4, feedforward_dim: 32, depth_mult: 0.34, expansion: 0.5}
  decoder: {heads: 4, feedforward_dim: 32, layers: 2, points: [1, 1, 1]}
"""
CPU = torch.device("cpu")

# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """The benchmark's JSON and what it prints, of two numbers of boxes."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "tiny.yaml").write_text(TINY)
    options = ["--config", "tiny.yaml", "--models", "tiny.yaml", "--json", "report.json", "--repeats", "1"]
    workload = ["--batch", "1", "--size", "64x96", "--boxes", "3", "5", "--queries", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own = ["train.threads=1", "distill.teacher=none.pt"]  # which is said, and not measured
        patch.setattr(sys, "argv", ["benchmark", *own, *options, *workload])
        benchmark.main()
    report = json.loads((folder / "report.json").read_text())
    return report, benchmark.table(report)


def test_every_part_of_every_case_is_measured(report: tuple[dict, str]):
    rows = report[0]["parts"]
    times = {
        "data loading, one process", "backbone, forward", "encoder, forward", "selection and decoder, forward",
        "of which matching", "matching and losses", "backward", "clipping and optimizer", "training step",
        "inference", "inference, deploy()", "inference, deploy(fast=True)",
    }  # fmt: skip
    for boxes in (3, 5):
        own = {row["part"]: row for row in rows if row["boxes"] == boxes}
        assert {part for part, row in own.items() if row["unit"] == "ms"} == times
        assert {row["unit"] for row in own.values()} == {"ms", "MiB", "%"}
        assert all(row["median"] > 0 for row in own.values())
        assert {(row["batch"], row["height"], row["width"], row["queries"]) for row in own.values()} == {
            (1, 64, 96, 10)
        }


def test_the_parts_add_up_to_the_step(report: tuple[dict, str]):
    times = {row["part"]: row["median"] for row in report[0]["parts"] if row["boxes"] == 3}
    parts = ("backbone, forward", "encoder, forward", "selection and decoder, forward", "matching and losses")
    parts += ("backward", "clipping and optimizer")
    assert sum(times[part] for part in parts) == pytest.approx(times["training step"])


def test_with_a_teacher_it_says_what_distillation_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = configs.from_dict(yaml.safe_load(TINY))
    names = [{"id": label, "name": f"class {label}"} for label in range(5)]
    ours.save(tmp_path / "teacher.pt", ours.weights(settings, names, DFine(settings.model, 5)))
    settings = configs.override(settings, [f"distill.teacher={tmp_path / 'teacher.pt'}"])
    rows = {row["part"]: row for row in benchmark.distilled(settings, Case(1, 64, 96, 3, 10), CPU, repeats=2)}
    step, asked = rows["distillation step"], rows["of which the teacher's forward pass"]
    assert step["median"] > asked["median"] > 0
    assert rows["distillation step, in training steps"]["median"] > 0
    assert rows["memory of a distillation step, kept for the backward pass"]["median"] > 0


def test_a_teacher_that_teaches_nothing_is_refused():
    settings = configs.override(configs.from_dict(yaml.safe_load(TINY)), ["distill.alpha=0", "distill.teacher=x.pt"])
    with pytest.raises(ConfigError, match="nothing to measure"):
        benchmark.distilled(settings, Case(1, 64, 96, 3, 10), CPU, repeats=2)


def test_the_report_names_machine_and_model_and_prints_every_row(report: tuple[dict, str]):
    content, printed = report
    assert content["machine"].keys() == {"device", "threads", "torch", "date"}
    assert content["machine"]["torch"] == torch.__version__
    (model,) = content["models"]
    assert model["parameters_M"] == pytest.approx(0.29, abs=0.1)
    assert model["gflops"] > 0
    assert all(row["part"] in printed for row in content["parts"])
    assert "1 x 64x96, 5 boxes, 10 queries" in printed


def test_the_benchmark_needs_the_peer_only_when_asked():
    assert "dfine.tools.peer" not in sys.modules


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(argparse.ArgumentTypeError, match="100x64"):
        benchmark.size("100x64")


def test_a_step_is_three_forward_passes_of_training():
    """Which answer in all layers and to denoising queries as well."""
    settings = configs.override(
        configs.from_dict(yaml.safe_load(TINY)), ["model.denoising.queries=1", "model.decoder.queries=100"]
    )
    case = Case(1, 96, 96, 1, 100)
    forward = 1e9 * benchmark.size_of_model(settings, 96, 96)["gflops"]
    assert 3 * forward < benchmark.step_flops(settings, case) < 4 * forward


# The stopwatch


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


def test_a_race_is_run_in_turns():
    turns: list[str] = []
    row = race("x", lambda: turns.append("ours"), lambda: turns.append("theirs"), CPU, repeats=3)
    assert turns == ["ours", "theirs"] * 4
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert row["low"] <= row["high"]


# What matching and losses cost


class Dispatched(TorchDispatchMode):
    """Counts operators, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.numbers, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operators[function.overloadpacket.__name__] += 1
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numbers += x.numel()
                self.largest = max(self.largest, x.numel())
        return result


class Called(TorchFunctionMode):
    """Counts functions and methods by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names[getattr(function, "__name__", str(function))] += 1
        return function(*args, **(kwargs or {}))


def crowd(boxes: int, pages: int, dtype: torch.dtype = torch.float32) -> list[Target]:
    torch.manual_seed(boxes)
    return [target(random_boxes(boxes).tolist(), [i % 3 for i in range(boxes)], i, dtype) for i in range(pages)]


def test_matching_and_all_losses_take_few_operators_and_copy_to_the_cpu_once():
    """6 layers, 300 queries, denoising, 4 pages of 40 boxes. The original takes about 9,900 and reads 1,800 scalars."""
    pages, model = crowd(40, 4), tiny_model(layers=6, queries=300)
    output = model(torch.zeros(4, 3, 160, 160), noised=noised(pages, queries=100))
    assert output.refined.logits.shape[:3] == (6, 4, 300)
    with Dispatched() as dispatched, Called() as called:
        criterion(output, pages, model.decoder.w, LossConfig())
    assert dispatched.operators.total() <= 1500
    assert called.names["cpu"] == 1
    reads = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select"}  # would wait for a GPU as well
    assert not reads & dispatched.operators.keys()
    assert not {"item", "tolist", "__bool__", "__int__", "__float__"} & called.names.keys()


def test_a_training_step_reads_back_only_costs_and_sends_only_matches_and_counts(monkeypatch: pytest.MonkeyPatch):
    """Each read, and each tensor made of Python numbers, would wait for a GPU."""
    monkeypatch.setattr(deformable_attention, "by_embedding_bag", by_grid_sample)  # the form for GPUs
    pages, model, sizes = crowd(5, 2), tiny_model(), torch.tensor([[64, 96], [64, 80]])
    queries = noised(pages)
    with Dispatched() as dispatched, Called() as called:
        output = model(torch.zeros(2, 3, 64, 96), sizes, queries)
        criterion(output, pages, model.decoder.w, LossConfig())
    assert called.names["cpu"] == called.names["tensor"] == 1
    assert not {"item", "tolist", "new_tensor"} & called.names.keys()
    assert "_local_scalar_dense" not in dispatched.operators


@pytest.mark.parametrize("pages", [1, 5])
def test_the_detections_of_all_pages_come_to_the_cpu_in_one_copy(pages: int):
    output = tiny_model().eval()(torch.zeros(pages, 3, 64, 96))
    with Called() as called:
        found = detect(output, [(64, 96)] * pages)
    assert len(found) == pages
    assert called.names["cpu"] == 1


def test_matching_and_losses_grow_linearly_with_the_boxes():
    """Twice the boxes add twice the numbers: no matrix of pairs by pairs, which would add four times as many."""
    w, numbers, largest = weighting_function(8, 0.5, 0.25), [], []
    for boxes in (100, 200, 400):
        output = with_denoising(made_up(queries=400), most=boxes, groups=1)
        with Dispatched() as dispatched:
            criterion(output, crowd(boxes, 2, torch.float64), w, LossConfig())
        numbers.append(dispatched.numbers)
        largest.append(dispatched.largest)
    assert numbers[2] - numbers[1] < 2.1 * (numbers[1] - numbers[0])
    assert largest[2] <= 2.1 * largest[1] <= 2.1 * 2.1 * largest[0]
