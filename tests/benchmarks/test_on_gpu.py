"""The script for GPUs, as far as it goes without one."""

from pathlib import Path

import on_gpu


def test_what_a_command_printed_is_kept_and_how_it_ended(tmp_path: Path) -> None:
    assert on_gpu.attempt(["-c", "print('x')"], tmp_path / "out.txt", 60).startswith("done after ")
    assert (tmp_path / "out.txt").read_text() == "x\n"
    assert on_gpu.attempt(["-c", "raise SystemExit('why')"], tmp_path / "out.txt", 60).startswith("failed after ")
    assert (tmp_path / "out.txt").read_text() == "why\n"


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    assert on_gpu.attempt(["-c", "import time; time.sleep(60)"], tmp_path / "out.txt", 0).startswith("out of time")


def test_all_commands_together_take_less_than_ten_minutes() -> None:
    assert sum(seconds for seconds, _ in on_gpu.COMMANDS.values()) < 600
