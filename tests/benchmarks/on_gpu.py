"""What only a GPU can tell, in one call of at most ten minutes: `python tests/benchmarks/on_gpu.py --out DIR`.

Runs commands that can be run alone as well, each with a time of its own, so that a crash or a slow compiler costs that
one alone, and writes to DIR what each printed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
STEP = "tests/benchmarks/benchmark.py --batch 16 --size 832x640 --repeats 5 distill={} --config configs"
COMMANDS = {  # seconds each; --peer needs the extra `bench`
    "tests": (80, "-m pytest -q -rf tests/test_cuda.py"),
    "quickstart": (60, "train.py --config configs/quickstart.yaml run_dir={out}/run train.max_steps=100"),
    "evaluation": (30, "evaluate.py --checkpoint {out}/run/last.pt run_dir={out}/run"),
    "teacher": (90, f"{STEP}/teacher.yaml"),
    "teacher_compiled": (120, f"{STEP}/teacher.yaml train.compile=true"),
    "student_tiny": (80, f"{STEP}/student_tiny.yaml --peer"),
    "student_tiny_compiled": (80, f"{STEP}/student_tiny.yaml train.compile=true"),
    "roofline": (40, "tests/benchmarks/roofline.py configs/teacher.yaml configs/student_tiny.yaml"),
}


def attempt(arguments: list[str], file: Path, seconds: float) -> str:
    """Runs python with the arguments, what it prints into the file; says how it ended."""
    began = time.monotonic()
    with file.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.wait()
    return f"{status} after {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder (default: runs/on_gpu)")
    out = parser.parse_args().out.resolve()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here")
    out.mkdir(parents=True, exist_ok=True)
    ends = {}
    for name, (seconds, command) in COMMANDS.items():
        arguments = [argument.replace("{out}", str(out)) for argument in command.split()]
        ends[name] = attempt(arguments, out / f"{name}.txt", seconds)
        print(f"{name}: {ends[name]}, see {out / name}.txt", flush=True)
    if not all(end.startswith("done") for end in ends.values()):
        sys.exit("error: not every command was done")


if __name__ == "__main__":
    main()
