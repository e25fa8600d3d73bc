"""Layout of page images: `python -m dfine.predict --checkpoint runs/NAME/best.pt PAGE_OR_FOLDER ... --out DIR`.

Writes a picture of each page with its boxes, and predictions.json: a list of pages with `file`, `width`, `height`,
`picture` and `detections`, each with `label`, `category_id`, `score` and `box`: [x1, y1, x2, y2] in pixels of the image
as one sees it, that is after its EXIF rotation. Of files with several pages the first is read.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms
from tqdm import tqdm

from dfine import checkpoint
from dfine.config import DataConfig
from dfine.evaluation import finite_on_cpu
from dfine.model import DFine, detect
from dfine.pictures import draw, grid
from dfine.sources import Source
from dfine.structures import Detections
from dfine.transforms import PageError, fit, pad, read_page, resize

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@torch.inference_mode()
def predict_page(
    model: DFine, page: np.ndarray, config: DataConfig, threshold: float = 0.3, dedupe: float = 1.0
) -> Detections:
    """What the model finds on one page, prepared as in evaluation.

    Args:
        model: in evaluation mode. page: (H, W, 3) uint8 RGB. threshold: the least score.
        dedupe: of boxes that overlap with more than this IoU only the best stays, whatever their classes; 1: all stay.
    Returns:
        On the CPU, boxes in pixels of the page.
    Raises:
        FloatingPointError: a score or a box is not finite.
    """
    size = page.shape[:2]
    images, sizes = pad([resize(page, fit(size, config.eval_short_edge, config.max_long_edge))], model.strides[-1])
    output = model(images.to(model.mean.device), sizes.to(model.mean.device))
    found = finite_on_cpu(detect(output, [size])[0], "the page")
    found = Detections(*(x[found.scores >= threshold] for x in found))
    return Detections(*(x[nms(found.boxes, found.scores, dedupe)] for x in found))


def beside_truth(model: DFine, pages: Source, index: int, config: DataConfig, threshold: float = 0.3) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a page of a data set: predictions on the left, truth on the right."""
    page, labels, boxes = pages.read(index)
    names = [category["name"] for category in pages.categories]
    found = predict_page(model, page, config, threshold)
    predicted = draw(page, found.labels.numpy(), found.boxes.numpy(), names, found.scores.numpy())
    return grid([predicted, draw(page, labels, boxes, names)], columns=2)


def image_files(paths: list[Path]) -> list[Path]:
    """Files as they are; of folders all images, in sub-folders as well, sorted.

    Raises:
        PageError: there are none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise PageError(f"no images in {', '.join(map(str, paths))}")
    return files


def as_json(found: Detections, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections as predictions.json holds them."""
    return [
        {
            "label": categories[label]["name"],
            "category_id": categories[label]["id"],
            "score": round(score, 6),
            "box": [round(x, 3) for x in box],
        }
        for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    ]


def main() -> int:
    """Returns 1 if a page could not be read, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE_OR_FOLDER")
    parser.add_argument("--out", required=True, type=Path, help="folder for predictions.json and the pictures")
    parser.add_argument(
        "--threshold", type=fraction, default=0.3, help="least score, from 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--dedupe",
        type=fraction,
        default=1.0,
        metavar="IOU",
        help="drop boxes that overlap a better one by more",
    )
    parser.add_argument("--fast", action="store_true", help="half precision, and compiled on a GPU: for many pages")
    arguments = parser.parse_intermixed_args()
    model, config, categories = checkpoint.load_model(arguments.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu").deploy(arguments.fast)
    arguments.out.mkdir(parents=True, exist_ok=True)

    names = [category["name"] for category in categories]
    predictions, failed = [], 0
    for number, file in enumerate(tqdm(image_files(arguments.pages), "predicting", unit="page")):
        try:
            page = read_page(file)
        except PageError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        found = predict_page(model, page, config.data, arguments.threshold, arguments.dedupe)
        picture = f"{number:05d}_{file.stem}.png"  # numbered: files in different folders may share their name
        drawn = draw(page, found.labels.numpy(), found.boxes.numpy(), names, found.scores.numpy())
        Image.fromarray(drawn).save(arguments.out / picture)
        height, width = page.shape[:2]
        entry = {"file": str(file), "width": width, "height": height, "picture": picture}
        predictions.append(entry | {"detections": as_json(found, categories)})
    (arguments.out / "predictions.json").write_text(json.dumps(predictions, indent=1))
    return failed


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
