"""What all commands have in common."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = ["predict", "export", "explain", "synthetic", "contact_sheet"]
COMMANDS = [["train.py"], ["distill.py"], ["evaluate.py"], *(["-m", f"dfine.{module}"] for module in MODULES)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    line = [sys.executable, "-X", "importtime", *command, "--help"]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("usage: ")
    imported = {name.rpartition("|")[2].strip() for name in answer.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "cv2", "timm"}
