"""Drawn pages as a COCO folder: `python -m dfine.synthetic --out data/drawn --pages 200 --seed 1`."""

import argparse
from pathlib import Path

from dfine.data.synthetic.pages import write_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and annotations.json")
    parser.add_argument("--pages", type=int, required=True, help="how many pages to draw")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pages (default: 0)")
    arguments = parser.parse_args()
    if arguments.pages < 1:
        parser.error(f"--pages must be at least 1, not {arguments.pages}")
    write_folder(arguments.out, arguments.seed, arguments.pages)


if __name__ == "__main__":
    main()
