"""Results as files: a JSON list that is whole after every page, and COCO results; and the truth of a page from one."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfine.boxes import xyxy_to_cxcywh
from dfine.data.sources import clip, read_coco
from dfine.data.transforms import SIDEWAYS, PageError, turn_boxes, turn_of
from dfine.inference.documents import PageLocation
from dfine.inference.evaluation import category_ids
from dfine.inference.pages import PageResult
from dfine.structures import Target

BACK = {  # what undoes a turn; the others undo themselves
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}


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
    """The images of a COCO json: which pages they are, and their results in its categories, as `category_ids` says.

    Args:
        categories, checkpoint: the model's, and where it is from.
    Raises:
        PageError: not a COCO json. ConfigError: the model lacks one of its categories.
    """

    def __init__(self, path: Path, categories: list[dict[str, Any]], checkpoint: str = "the model") -> None:
        images, theirs, _ = read_coco(path, truth=False)
        ids = category_ids(categories, theirs, checkpoint, str(path))
        self.ids = {category["id"]: number for category, number in zip(categories, ids, strict=True)}
        self.path, self.images = path, by_name(images)
        self.files: dict[int, str] = {}  # which page an image was, by its id

    def results(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """COCO results of a page of predictions.json, in pixels of the image as the json has it.

        Raises:
            PageError: see `find`, or another page was this image.
        """
        image, turn = find(entry, self.images, self.path)
        if image["id"] in self.files:
            raise PageError(
                f"{entry['file']}: is {image['file_name']} of {self.path}, as {self.files[image['id']]} is: name the "
                "folder of the json's images alone"
            )
        self.files[image["id"]] = entry["file"]
        boxes = np.array([detection["box"] for detection in entry["detections"]]).reshape(-1, 4)
        if turn is not None:
            boxes = turn_boxes(boxes, (entry["height"], entry["width"]), BACK.get(turn, turn))
        return [
            {
                "image_id": image["id"],
                "category_id": number,
                "bbox": [round(x, 3) for x in (x1, y1, x2 - x1, y2 - y1)],
                "score": detection["score"],
            }
            for detection, (x1, y1, x2, y2) in zip(entry["detections"], boxes.tolist(), strict=True)
            if (number := self.ids[detection["category_id"]]) is not None
        ]


def by_name(images: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The images of a COCO json that have each `file_name`: one, as a rule."""
    named: dict[str, list[dict[str, Any]]] = {}
    for image in images:
        named.setdefault(image["file_name"], []).append(image)
    return named


def find(
    entry: dict[str, Any], images: dict[str, list[dict[str, Any]]], path: Path
) -> tuple[dict[str, Any], Image.Transpose | None]:
    """The image that a page is, the one whose `file_name` its path ends with, and how the page was turned to be seen.

    As in training, the json's size decides whether its boxes are those of the image before its EXIF rotation.

    Args:
        entry: the page's `file`, `page`, `width` and `height`.
        images: by `file_name`. path: of their json, for messages.
    Raises:
        PageError: there is none, or several, or it is of another size.
    """
    parts = Path(entry["file"]).parts
    names = ["/".join(parts[first:]) for first in range(len(parts))]  # the longest first
    found = next((images[name] for name in names if name in images), [])
    if not found or entry["page"] > 1:
        raise PageError(f"{entry['file']}, page {entry['page']}: {path} has no such image")
    if len(found) > 1:
        ids = ", ".join(str(image["id"]) for image in found)
        raise PageError(f"{entry['file']}: is the file_name of several images of {path}: {ids}")
    (image,) = found
    size, seen, turn = (image["width"], image["height"]), (entry["width"], entry["height"]), turn_of(entry["file"])
    if size == (seen[::-1] if turn in SIDEWAYS else seen):
        return image, turn
    if size == seen:
        return image, None
    raise PageError(f"{entry['file']}: has {seen[0]}x{seen[1]} pixels, {path} says {size[0]}x{size[1]}")


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
    (images, theirs, things), (height, width) = read_coco(annotations), size
    ids = category_ids(categories, theirs, checkpoint, str(annotations))
    entry = {"file": str(location.file), "page": location.page, "width": width, "height": height}
    image, turn = find(entry, by_name(images), annotations)
    as_stored, own = (image["height"], image["width"]), (things.pages == images.index(image)) & ~things.crowds
    boxes, kept, _ = clip(things.xywh[own], np.array([as_stored]))  # (T, 4) xyxy pixels
    boxes = boxes[kept]
    labels = torch.tensor([ids.index(theirs[i]["id"]) for i in things.labels[own][kept]], dtype=torch.int64)
    if turn is not None:
        boxes = turn_boxes(boxes, as_stored, turn)
    cxcywh = xyxy_to_cxcywh(torch.from_numpy(boxes / [width, height, width, height])).float()
    return Target(labels, cxcywh, image["id"], size)
