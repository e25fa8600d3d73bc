"""What commands take alone and beside a busy program: `python tests/benchmarks/busy.py 'COMMAND' ['COMMAND' ...]`.

Prints a Markdown table: seconds of each command where nothing else runs, beside a process that computes without end,
and beside one that makes system calls without end; medians of repeats in turns, and how many times as long that is.
Commands run in a shell: `OMP_NUM_THREADS=1 python ...` sets torch's threads, and our ONNX models take as many.
"""

import argparse
import statistics
import subprocess
import sys
import time

BESIDE = {  # each ends with what started it
    "a busy loop": "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))",
    "system calls": "import os\nparent = os.getppid()\nwhile os.getppid() == parent: os.stat('/')",
}


def seconds(command: str, beside: str | None) -> float:
    """How long the command takes while another process runs the Python code `beside`."""
    other = subprocess.Popen([sys.executable, "-c", beside]) if beside else None
    try:
        began = time.perf_counter()
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        taken = time.perf_counter() - began
    finally:
        if other:
            other.kill()
            other.wait()
    if done.returncode:
        sys.exit(f"error: {command}: {done.stderr.strip()}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="+", metavar="COMMAND")
    parser.add_argument("--repeats", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--beside", action="append", choices=BESIDE, help="default: both")
    options = parser.parse_args()
    others = options.beside or [*BESIDE]
    print(f"| command | alone | {' | '.join(others)} |\n|---|---|{'---|' * len(others)}")
    for command in options.commands:
        turns = [
            [seconds(command, program) for program in (None, *map(BESIDE.get, others))] for _ in range(options.repeats)
        ]
        medians = [statistics.median(spans) for spans in zip(*turns, strict=True)]
        cells = [f"{median:.1f} s ({median / medians[0]:.2f})" for median in medians]
        print(f"| `{command}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
