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

from PIL import Image
from tqdm import tqdm

from dfine.data.transforms import PageError, read_page
from dfine.inference.pages import Found, load
from dfine.inference.pictures import draw

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


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


def as_json(found: Found, categories: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections as predictions.json holds them."""
    return [
        {
            "label": label,
            "category_id": categories[place]["id"],
            "score": round(score, 6),
            "box": [round(x, 3) for x in box],
        }
        for label, score, box, place in zip(
            found.labels, found.scores.tolist(), found.boxes.tolist(), found.classes.tolist(), strict=True
        )
    ]


def main() -> int:
    """Returns 1 if a page could not be read, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="best.pt of a run, a published folder or file, or a name on the hub"
    )
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
    detector = load(arguments.checkpoint, fast=arguments.fast)
    arguments.out.mkdir(parents=True, exist_ok=True)

    names = [category["name"] for category in detector.categories]
    predictions, failed = [], 0
    for number, file in enumerate(tqdm(image_files(arguments.pages), "predicting", unit="page")):
        try:
            page = read_page(file)
        except PageError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            failed = 1
            continue
        found = detector(page, arguments.threshold, arguments.dedupe)
        picture = f"{number:05d}_{file.stem}.png"  # numbered: files in different folders may share their name
        drawn = draw(page, found.classes, found.boxes, names, found.scores)
        Image.fromarray(drawn).save(arguments.out / picture)
        height, width = page.shape[:2]
        entry = {"file": str(file), "width": width, "height": height, "picture": picture}
        predictions.append(entry | {"detections": as_json(found, detector.categories)})
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
