"""Results as files: a JSON list that is whole after every page, and COCO results; and the truth of a page from one."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfine.boxes import xyxy_to_cxcywh
from dfine.data.sources import on_page, read_coco
from dfine.data.transforms import PageError, have_an_area
from dfine.inference.documents import PageLocation
from dfine.inference.evaluation import category_ids
from dfine.inference.pages import PageResult
from dfine.structures import Target


def page_entry(result: PageResult, picture: str | None, categories: list[dict[str, Any]]) -> dict[str, Any]:
    """A page as predictions.json holds it: pixels and points to three decimals, scores to six."""
    detections = []
    for i, (label, index) in enumerate(zip(result.labels, result.classes.tolist(), strict=True)):
        detection = {
            "label": label,
            "category_id": categories[index]["id"],
            "score": round(float(result.scores[i]), 6),
            "box": [round(x, 3) for x in result.boxes[i].tolist()],
        }
        if result.points is not None:
            detection["points"] = [round(x, 3) for x in result.points[i].tolist()]
        detections.append(detection)
    height, width = result.size
    entry = {"file": str(result.file), "page": result.page, "width": width, "height": height, "picture": picture}
    return entry | {"detections": detections}


class JsonList:
    """A file that holds a JSON list, a line for each item, and is whole after each `append`.

    However a program ends, what it has appended can be read.

    Args:
        items: what the list begins with; the file's former content is gone.
    """

    END = b"\n]\n"

    def __init__(self, path: Path, items: list[dict[str, Any]]) -> None:
        self.path, self.length = path, len(items)
        beside = path.with_name(f"{path.name}.writing")
        beside.write_bytes(b"[" + b",".join(b"\n" + json.dumps(item).encode() for item in items) + self.END)
        beside.replace(path)
        self.file = path.open("r+b", buffering=0)

    def append(self, item: dict[str, Any]) -> None:
        """Overwrites the end of the list with one more item and the end, in one go.

        Raises:
            OSError: the disk is full; names the file, which holds the items before this one.
        """
        end = self.file.seek(-len(self.END), 2)
        data = (b",\n" if self.length else b"\n") + json.dumps(item).encode() + self.END
        try:
            if self.file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.seek(end)
            self.file.write(self.END)
            self.file.truncate()
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.length += 1


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The entries of a predictions.json; none if there is no such file.

    Raises:
        PageError: the file is no list of entries.
    """
    try:
        entries = json.loads(path.read_bytes())
        keys = {"file", "page", "width", "height", "detections"}
        if isinstance(entries, list) and all(keys <= entry.keys() for entry in entries):
            return entries
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PageError(f"{path}: cannot go on with it: {error}") from error
    raise PageError(f"{path}: cannot go on with it: not written by this version")


class CocoImages:
    """The images of a COCO json: which pages they are, and their results.

    Raises:
        PageError: not a COCO json, or its categories are not those of the model.
    """

    def __init__(self, path: Path, categories: list[dict[str, Any]]) -> None:
        self.path = path
        try:
            coco = json.loads(path.read_bytes())
            self.images = {i["file_name"]: (i["id"], (i["width"], i["height"])) for i in coco["images"]}
            theirs = {category["id"]: category["name"] for category in coco["categories"]}
        except OSError as error:
            raise PageError(f"{path}: cannot read the images ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PageError(f"{path}: not COCO: needs the lists images and categories ({error!r})") from error
        if theirs != {category["id"]: category["name"] for category in categories}:
            raise PageError(f"{path}: has the categories {theirs}, the checkpoint knows {categories}")

    def results(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """COCO results of a page of predictions.json; the image is the one whose `file_name` its path ends with.

        Raises:
            PageError: there is none, or it is of another size.
        """
        image_id = id_of(entry, self.images, self.path)
        results = []
        for detection in entry["detections"]:
            x1, y1, x2, y2 = detection["box"]
            box = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
            result = {"image_id": image_id, "category_id": detection["category_id"], "bbox": box}
            results.append(result | {"score": detection["score"]})
        return results


def id_of(entry: dict[str, Any], images: dict[str, tuple[int, tuple[int, int]]], path: Path) -> int:
    """The id of the image that a page is: the one whose `file_name` the page's path ends with.

    Args:
        entry: the page's `file`, `page`, `width` and `height`.
        images: id and (width, height) of the images by `file_name`. path: of their json, for messages.
    Raises:
        PageError: there is none, or it is of another size.
    """
    parts = Path(entry["file"]).parts
    names = ["/".join(parts[first:]) for first in range(len(parts))]  # the longest first
    image = next((images[name] for name in names if name in images), None)
    if image is None or entry["page"] > 1:
        raise PageError(f"{entry['file']}, page {entry['page']}: {path} has no such image")
    image_id, size = image
    if size != (entry["width"], entry["height"]):
        raise PageError(
            f"{entry['file']}: has {entry['width']}x{entry['height']} pixels, {path} says {size[0]}x{size[1]}"
        )
    return image_id


def truth_of(
    location: PageLocation, size: tuple[int, int], annotations: Path, categories: list[dict[str, Any]], checkpoint: str
) -> Target:
    """The truth of a page from a COCO json, as in training: boxes clipped to the page, crowds left out.

    Args:
        size: height, width of the page. categories: of the model; published weights have theirs by name.
        checkpoint: of the model, for messages.
    Raises:
        PageError: not COCO, or without the page. ConfigError: its categories are not those of the model.
    """
    coco, (height, width) = read_coco(annotations), size
    theirs = sorted(({"id": c["id"], "name": c["name"]} for c in coco["categories"]), key=lambda c: c["id"])
    ids = category_ids(categories, theirs, checkpoint, str(annotations))
    images = {i["file_name"]: (i["id"], (i["width"], i["height"])) for i in coco["images"]}
    entry = {"file": str(location.file), "page": location.page, "width": width, "height": height}
    image_id = id_of(entry, images, annotations)
    things = [a for a in coco["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]
    labels = torch.tensor([ids.index(thing["category_id"]) for thing in things], dtype=torch.int64)
    boxes = on_page(things, np.array(size))  # (T, 4) xyxy pixels
    kept = have_an_area(boxes)
    cxcywh = xyxy_to_cxcywh(torch.from_numpy(boxes / [width, height, width, height])).float()
    return Target(labels[kept], cxcywh[kept], image_id, size)
