"""COCO folders of small white pages, to be made awkward by the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [
    {"id": 7, "name": "figure"},
    {"id": 1, "name": "text"},
    {"id": 3, "name": "table"},
]  # neither sorted nor 1..3


def image(image_id: int, width: int = 30, height: int = 40, file_name: str | None = None) -> dict[str, Any]:
    return {"id": image_id, "width": width, "height": height, "file_name": file_name or f"{image_id}.png"}


def annotation(image_id: int, bbox: list[float], category_id: int = 1, **more: Any) -> dict[str, Any]:
    """All have id 0 unless given: what the ids are must not matter."""
    return {"id": 0, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write(
    folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Any = CATEGORIES
) -> tuple[Path, Path]:
    """Writes white pages and the json; returns the folder of images and the json."""
    for entry in images:
        path = folder / "images" / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((entry["height"], entry["width"], 3), 255, np.uint8)).save(path)
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "pages.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "images", folder / "pages.json"
