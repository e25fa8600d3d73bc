"""Augmented training pages with their boxes: `python -m dfine.tools.contact_sheet --config FILE --out sheet.png`."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dfine import config
from dfine.boxes import cxcywh_to_xyxy
from dfine.data.batches import train_loader
from dfine.data.sources import open_source
from dfine.inference.pictures import draw, grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--out", required=True, type=Path, help="picture to write")
    parser.add_argument("--pages", type=int, default=12, help="at least so many pages (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    source = open_source(settings.data.train, "data.train")
    names = [category["name"] for category in source.categories]

    drawn: list[np.ndarray] = []
    for batch in train_loader(source, settings)[0]:
        for image, (height, width), target in zip(batch.images, batch.sizes.tolist(), batch.targets, strict=True):
            page = image[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
            boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
            drawn.append(draw(page, target.labels.numpy(), boxes.numpy(), names))
        if len(drawn) >= arguments.pages:
            break
    Image.fromarray(grid(drawn, columns=6)).save(arguments.out)


if __name__ == "__main__":
    main()
