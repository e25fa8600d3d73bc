"""A step and an epoch of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import train
from torch import nn

from dfine import distributed
from dfine.config import Config, TrainConfig
from dfine.structures import Batch
from dfine.training import engine, optim


def test_a_non_finite_loss_stops_with_term_step_and_images_and_keeps_the_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=2")
    before = (run / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"step 2: not finite: .*fgl.*image ids \["):
        train(config, run, "--resume", "loss.fgl=1e300")
    assert (run / "last.pt").read_bytes() == before


def test_the_step_seed_depends_on_seed_and_step() -> None:
    assert engine.step_seed(0, 1) == engine.step_seed(0, 1)
    assert len({engine.step_seed(seed, step) for seed in range(3) for step in range(3)}) == 9


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_trains_in_bf16_if_asked_to_and_if_it_multiplies_bf16(
    multiplies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    one = torch.ones(1, 1)
    for asked, expected in ((True, dtype), (False, torch.float32)):
        with engine.autocast(torch.device("cpu"), TrainConfig(bf16_cpu=asked)):
            assert (one @ one).dtype == expected


def test_no_two_processes_and_steps_share_their_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seeds |= {engine.step_seed(0, step) for step in range(3)}
    assert len(seeds) == 9


# A step on a model of three weights, whose gradients can be told in advance


class Three(nn.Module):
    """The loss of x is x times the sum of all weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1, bias=False)


class Step:
    """What `optimize` needs of a run, and what it did."""

    def __init__(self, step: int = 0, **train: object) -> None:
        self.config = Config(train=TrainConfig(**{"clip": 1e9, "epochs": 10} | train))
        self.model, self.step, self.epoch_steps = Three(), step, 10
        self.optimizer = SimpleNamespace(step=self.keep, zero_grad=self.model.zero_grad)
        self.optimizer.param_groups = [{"factor": 1.0}, {"factor": 0.1}]
        self.auxiliary = nn.Module()
        self.ema = SimpleNamespace(update=lambda model, step: self.averaged.append(step))
        self.gradients: list[float | None] = []
        self.averaged: list[int] = []

    def keep(self) -> None:
        assert self.model.training
        self.gradients = [p.grad.item() if p.grad is not None else None for p in self.model.parameters()]

    def take(self, *batches: float) -> dict[str, float]:
        """A step on batches with these losses."""
        return engine.optimize(self, list(batches), self.losses_of)

    def losses_of(self, x: float) -> dict[str, torch.Tensor]:
        return {"a": x * sum(self.model.parameters()), "b": 2 * x * torch.ones(2)}  # two layers


def test_accumulated_batches_are_averaged() -> None:
    step = Step()
    values = step.take(3.0, 5.0, 10.0)
    assert step.gradients == pytest.approx([6.0] * 3)
    assert values["b"] == pytest.approx(24)
    assert values["loss"] == pytest.approx(values["a"] + values["b"])


def test_gradients_are_clipped_and_what_is_logged_is_their_norm_before() -> None:
    step = Step(clip=0.5)
    assert step.take(4.0)["gradient_norm"] == pytest.approx(4 * 3**0.5)
    assert step.gradients == pytest.approx([0.5 / 3**0.5] * 3)
    step.take(0.1)
    assert step.gradients == pytest.approx([0.1] * 3)  # shorter ones are not


def test_every_step_starts_from_no_gradient_and_is_averaged() -> None:
    step = Step()
    step.take(1.0)
    step.take(1.0)
    assert step.gradients == pytest.approx([1.0] * 3)
    assert step.averaged == [0, 0]


@pytest.mark.parametrize(("at", "frozen"), [(1, True), (2, False)])
def test_a_frozen_backbone_gets_no_gradient_and_keeps_its_statistics(at: int, frozen: bool) -> None:
    step = Step(at, freeze_backbone_steps=2)
    step.take(1.0)
    assert step.gradients == ([None, None, 1.0] if frozen else [1.0] * 3)
    assert step.model.backbone.training != frozen


@pytest.mark.parametrize("at", [0, 50, 99])
def test_every_step_has_the_learning_rate_of_the_schedule(at: int) -> None:
    step = Step(at, backbone_factor=0.1)
    rate = optim.learning_rate(at, 100, step.config.train)
    values = step.take(1.0)
    assert [group["lr"] for group in step.optimizer.param_groups] == pytest.approx([rate, 0.1 * rate])
    assert values["learning_rate"] == rate
    assert values["learning_rate_backbone"] == pytest.approx(0.1 * rate)


def test_the_padded_share_is_that_of_the_pixels() -> None:
    batch = Batch(torch.zeros(2, 3, 10, 20), torch.tensor([[10, 10], [5, 20]]), [])
    assert engine.padded_share(batch) == pytest.approx(0.5)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (4, 2)])
def test_a_process_has_no_more_threads_than_cores(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        engine.prepare(Config(train=TrainConfig(threads=2)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
