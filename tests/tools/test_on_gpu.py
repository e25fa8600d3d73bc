"""The script for GPUs, as far as it goes without one."""

from pathlib import Path

import torch

from dfine.structures import Detections
from dfine.tools import on_gpu


def test_a_part_that_fails_leaves_its_reason_in_the_report(tmp_path: Path) -> None:
    ended = on_gpu.attempt("values", tmp_path, 60)
    assert (ended["status"], ended["told"]) == ("failed", [])
    assert ended["errors"] == "error: torch finds no GPU here\n"


def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    assert on_gpu.attempt("values", tmp_path, 0)["status"] == "out of time"


def test_all_parts_together_take_less_than_ten_minutes() -> None:
    assert sum(seconds for seconds, _ in on_gpu.PARTS.values()) <= 9.8 * 60


def test_detections_are_lost_that_moved_or_changed_their_class_or_score() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60], [70, 70, 90, 90]])
    expected = Detections(torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 2, 0]), boxes)
    assert on_gpu.lost(expected, expected) == 0
    moved = boxes + torch.tensor([0, 5, 0, 0])[:, None]
    got = Detections(torch.tensor([0.9, 0.8, 0.7, 0.5]), torch.tensor([0, 1, 1, 0]), moved)
    assert on_gpu.lost(expected, got) == 3
