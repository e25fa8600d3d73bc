"""What is said about the values of steps."""

import pytest
import torch

from dfine.training.metrics import Pace


@pytest.mark.parametrize("threads", [1, 2])
def test_steps_that_become_three_times_as_slow_are_told_once(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pace = Pace()
    assert not any(pace.slower(seconds) for seconds in [9.0] + 20 * [0.2] + 5 * [0.9, 0.2])  # warming up; now and then
    said = [text for text in map(pace.slower, 30 * [0.7]) if text]
    assert len(said) == 1
    assert "other programs may hold the cores" in said[0]
    assert ("train.threads=1" in said[0]) == (threads > 1)
