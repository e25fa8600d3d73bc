"""COCO folders of small white pages, to be made awkward by the tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import tiny_config

from dfine.config import Config, DataConfig, PagesConfig

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


def five_pages(folder: Path) -> PagesConfig:
    """Pages of three shapes, whose ids are not in order."""
    shapes = {9: (90, 120), 0: (120, 90), 4: (90, 120), 2: (60, 60), 7: (90, 120)}
    entries = [image(image_id, *size) for image_id, size in shapes.items()]
    images, annotations = write(folder, entries, [annotation(9, [5, 5, 40, 30], 3)])
    return PagesConfig(images=str(images), annotations=str(annotations))


def evaluated(pages: PagesConfig, batch_size: int = 2) -> Config:
    """A config by which a tiny model is evaluated on these pages."""
    data = DataConfig(
        val=pages, batch_size=batch_size, workers=0, short_edges=(64,), eval_short_edge=64, max_long_edge=96
    )
    return Config(model=tiny_config(), data=data)
