"""Drawn pages as a COCO folder: `python -m dfine.synthetic --out data/drawn --pages 200 --seed 1`."""

import argparse
from pathlib import Path

from dfine.arguments import open_streams


def arguments() -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and annotations.json")
    parser.add_argument("--pages", type=int, required=True, help="how many pages to draw")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pages (default: %(default)s)")
    parser.add_argument("--style", choices=("plain", "documents"), default="plain", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw (default: %(default)s)")
    options = parser.parse_args()
    if options.pages < 1:
        parser.error(f"--pages must be at least 1, not {options.pages}")
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, not {options.workers}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, not {options.seed}")
    return options


if __name__ == "__main__":
    arguments()  # before numpy and OpenCV are imported, which takes a second: --help need not wait for it

import sys

from dfine.data.synthetic.pages import write_folder
from dfine.data.synthetic.styles import STYLES
from dfine.files import lock


def main() -> None:
    options = arguments()
    _, draw = STYLES[options.style]
    options.out.mkdir(parents=True, exist_ok=True)
    with lock(options.out, "--out"):
        write_folder(options.out, options.seed, options.pages, draw, options.workers)
    print(f"{options.pages} pages in {options.out / 'images'}, their boxes in {options.out / 'annotations.json'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
