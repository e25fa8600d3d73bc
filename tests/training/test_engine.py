"""What stands before the first step, and what a step is given."""

from pathlib import Path

import pytest
import torch
from scripts import train

from dfine import distributed
from dfine.config import Config, TrainConfig
from dfine.structures import Batch
from dfine.training import engine
from dfine.training.run import padded_share, step_seed


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
    assert step_seed(0, 1) == step_seed(0, 1)
    assert len({step_seed(seed, step) for seed in range(3) for step in range(3)}) == 9


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
        seeds |= {step_seed(0, step) for step in range(3)}
    assert len(seeds) == 9


def test_the_padded_share_is_that_of_the_pixels() -> None:
    batch = Batch(torch.zeros(2, 3, 10, 20), torch.tensor([[10, 10], [5, 20]]), [])
    assert padded_share(batch) == pytest.approx(0.5)


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (4, 2)])
def test_a_process_has_no_more_threads_than_cores(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    before = torch.get_num_threads()
    try:
        engine.prepare(Config(train=TrainConfig(threads=2)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
