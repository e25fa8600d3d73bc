"""What several commands have in common at their start. Imports nothing that takes time: --help need not wait."""

import argparse
import os
import sys


def open_streams() -> None:
    """Lets a command print what its terminal or log file cannot show, or where there is neither, as under pythonw."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # what a notebook puts there may not have it
            getattr(sys, name).reconfigure(errors="backslashreplace")


def threads_sleep() -> None:
    """Lets torch's threads sleep, not spin, while they wait for one another, unless the environment says otherwise.

    To be called before torch is imported. Beside a busy program `predict` then takes 1.4 times as long, not 1.7. For
    training it is not worth it: with two threads and nothing else running, a step would take half as long again.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def training(description: str | None) -> argparse.Namespace:
    """Parses the command line: `config`, `resume` and `overrides`."""
    open_streams()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt, if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.batch_size=8")
    return parser.parse_intermixed_args()


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def page_ranges(numbers: str) -> list[range]:
    """ "1-3,7" -> [range(1, 4), range(7, 8)]; "5-" goes to the end.

    Raises:
        ValueError: no numbers of pages.
    """
    ranges = []
    for part in numbers.split(",") if numbers else []:
        first, to, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not last)):
            raise ValueError(f"{part!r}: write numbers of pages such as 1-3,7")
        ranges.append(range(int(first), (int(last) if last else sys.maxsize if to else int(first)) + 1))
        if ranges[-1].start < 1 or not ranges[-1]:
            raise ValueError(f"{part!r}: pages count upwards from 1")
    return ranges
