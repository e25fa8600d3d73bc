"""A step and an epoch of them."""

from pathlib import Path

import pytest
import torch
from scripts import train

from dfine.config import TrainConfig
from dfine.training import engine


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
