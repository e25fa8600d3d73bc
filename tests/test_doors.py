"""What all commands have in common."""

import os
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


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_without_a_terminal_nothing_is_printed_and_no_file_takes_its_place(command: list[str]) -> None:
    """As under pythonw. argparse would print its help on stderr instead."""
    answer = subprocess.run(["sh", "-c", '"$@" >&-', "sh", sys.executable, *command, "--help"], cwd=ROOT, stderr=-1)
    assert (answer.returncode, answer.stderr) == (0, b"")


def test_progress_needs_no_stderr_and_class_names_no_terminal_that_shows_them() -> None:
    program = "from dfine.arguments import open_streams; open_streams(); from tqdm import tqdm; print(*tqdm('标题'))"
    line = ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-c", program]
    for encoding, expected in (("utf-8", "标 题\n".encode()), ("ascii", rb"\u6807 \u9898" + b"\n")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        assert subprocess.run(line, cwd=ROOT, env=environment, stdout=-1, check=True).stdout == expected


@pytest.mark.parametrize("asked", ["", "ACTIVE"])
@pytest.mark.parametrize(
    "command", [["-m", "dfine.predict", "none.png", "--out"], ["evaluate.py", "--checkpoint"]], ids=lambda c: c[-2]
)
def test_threads_sleep_while_they_wait_for_one_another_unless_asked_not_to(
    tmp_path: Path, command: list[str], asked: str
) -> None:
    """libgomp says how often its threads look before they sleep; it calls its own 300,000 times passive, too."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    line = [sys.executable, *command, str(tmp_path / "none")]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    if "GOMP_SPINCOUNT" not in answer.stderr:
        pytest.skip("this torch's OpenMP does not say how long its threads spin")
    assert ("GOMP_SPINCOUNT = '0'" in answer.stderr) == (not asked)
