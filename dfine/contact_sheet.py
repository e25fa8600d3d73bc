"""Augmented training pages with their boxes: `python -m dfine.contact_sheet --config FILE --out sheet.png`."""

import argparse
from pathlib import Path

from dfine.arguments import open_streams


def arguments() -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--out", required=True, type=Path, help="picture to write: a .png or .jpg")
    parser.add_argument("--pages", type=int, default=12, help="at least so many pages (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.augment.blur_p=1")
    options = parser.parse_intermixed_args()
    if options.pages < 1:
        parser.error(f"--pages must be at least 1, not {options.pages}")
    if options.out.suffix not in (".png", ".jpg"):
        parser.error(f"--out must end in .png or .jpg, found {options.out}")
    return options


if __name__ == "__main__":
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import sys

import numpy as np
import torch
from PIL import Image

from dfine import config
from dfine.boxes import cxcywh_to_xyxy
from dfine.data.batches import train_loader
from dfine.data.sources import open_source
from dfine.files import try_writing
from dfine.inference.pictures import draw, grid


def main() -> None:
    options = arguments()
    settings = config.load(options.config, options.overrides)
    source = open_source(settings.data.train, "data.train", settings.data.skip_unreadable)
    names = [category["name"] for category in source.categories]
    try_writing(options.out.parent, "--out")

    drawn: list[np.ndarray] = []
    for batch in train_loader(source, settings)[0]:
        for image, (height, width), target in zip(batch.images, batch.sizes.tolist(), batch.targets, strict=True):
            page = image[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
            boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
            drawn.append(draw(page, target.labels.numpy(), boxes.numpy(), names, legend=True))
        if len(drawn) >= options.pages:
            break
    Image.fromarray(grid(drawn, columns=6)).save(options.out)
    print(f"{options.out}: {len(drawn)} pages as data.augment of {options.config} changes them")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
