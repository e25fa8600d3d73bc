"""Drawn document pages with exact boxes: a data set of any size that needs no download.

Every block of a page is first drawn by itself as *ink*, an array of darkness, then cropped to what is visible
and put on the page, so its box is exact to the pixel. Page `index` of `seed` depends on nothing else: give
training and validation different seeds and they share no page.

`python -m dfine.synthetic` writes them as a COCO folder.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from dfine.data.synthetic.blocks import (
    bullets,
    figure,
    footnotes,
    formula,
    heading,
    paragraph,
    tabular,
)
from dfine.data.synthetic.ink import (
    Block,
    Font,
    Ink,
    Rng,
    Style,
    block,
    paste,
    pick,
    prose,
    set_text,
    tall,
    word_ink,
)

# fmt: off
CLASSES: tuple[str, ...] = (
    "Caption", "Footnote", "Formula", "List-item", "Page-footer", "Page-header",
    "Picture", "Section-header", "Table", "Text", "Title",
)
CATEGORIES: list[dict[str, Any]] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
# fmt: on

Drawn = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.float64]]  # image, labels, boxes
Coco = dict[str, list[dict[str, Any]]]
Draw = Callable[[int, int], Drawn]  # from (seed, index)

WRITERS: dict[str, Callable[[Rng, Style, int, int], list[Block]]] = {
    "text": paragraph,
    "heading": heading,
    "list": bullets,
    "figure": figure,
    "table": tabular,
    "formula": formula,
}
# The types of pages: the share of each, the chances of its parts, the weights of what follows in a column.
KINDS = [
    dict(zip(("share", "columns", "title", "notes", "header", "footer", *WRITERS), row, strict=True))
    for row in (
        # share columns title notes header footer; text heading list figure table formula
        (0.22, 0.7, 1.0, 0.35, 0.4, 0.7, 8.0, 2.5, 0.5, 0.8, 0.0, 1.2),  # article, first page
        (0.26, 0.7, 0.0, 0.25, 0.7, 0.7, 8.0, 2.0, 0.0, 1.5, 0.7, 2.2),  # article, another page
        (0.20, 0.1, 0.2, 0.30, 0.6, 0.8, 7.0, 2.5, 1.0, 1.0, 0.5, 0.0),  # report
        (0.16, 0.2, 0.2, 0.15, 0.7, 0.8, 4.0, 3.0, 3.0, 1.0, 0.3, 0.0),  # manual
        (0.16, 0.1, 0.2, 0.40, 0.6, 0.8, 5.0, 3.0, 0.5, 0.0, 4.0, 0.0),  # accounts
    )
]


@dataclass
class Page:
    """The ink of a page, and the label and the xywh box of each block so far."""

    ink: Ink
    labels: list[int] = field(default_factory=list)
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)

    def put(self, blocks: Sequence[Block], x: int, y: int) -> int:
        """Puts blocks below each other and below y in the column at x, and returns where they end."""
        for label, ink, left, gap in blocks:
            high, wide = ink.shape
            paste(self.ink, ink, x + left, y + gap)
            self.labels.append(CLASSES.index(label))
            self.boxes.append((x + left, y + gap, wide, high))
            y += gap + high
        return y


def draw_style(rng: Rng) -> Style:
    """Draws the typography of a page."""
    font = Font(int(pick(rng, (9, 10, 10, 11, 11, 12))), stretch=pick(rng, (0.9, 1.0)))
    pitch, indent = round(font.size * rng.uniform(1.18, 1.5)), int(pick(rng, (0, 0, 12, 18)))
    return Style(
        font=font,
        heading=Font(font.size + int(rng.integers(1, 6)), bold=rng.random() < 0.75),
        pitch=pitch,
        align=pick(rng, ("justify", "justify", "left")),
        indent=indent,
        gap=int(rng.integers(3, 6)) if indent else int(rng.uniform(0.5, 1.0) * pitch),
        numbered=rng.random() < 0.5,
    )


def draw_palette(rng: Rng) -> npt.NDArray[np.uint8]:
    """Draws the RGB colour of each darkness, (256, 3), from paper to ink; in between there may be a tint."""
    paper = np.minimum(255, pick(rng, (260, 260, 250, 238)) - rng.integers(0, 6, size=3))
    ink = np.full(3, rng.integers(70))
    stops = [paper, rng.integers(60, 190, size=3), ink] if rng.random() < 0.3 else [paper, ink]
    at = (0, 80, 255) if len(stops) == 3 else (0, 255)
    channels = [np.interp(np.arange(256), at, colours) for colours in np.transpose(stops)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def running_line(page: Page, rng: Rng, label: str, side: int, y: int) -> None:
    """Puts the page number, running heads or both in a header or a footer, each a block."""
    font = Font(int(rng.integers(7, 10)))
    number = [word_ink(pick(rng, ("{}", "-{}-", "{}/400")).format(rng.integers(1, 400)), font)]
    head = prose(rng, rng.uniform(2, 6), font, stops=0)
    left, middle, right = 0, 1, 2
    looks = ({middle: number}, {middle: head}, {left: head, right: number}, {left: number, right: head})
    for place, inks in pick(rng, looks).items():
        ink = set_text(inks)
        x = side + (page.ink.shape[1] - 2 * side - ink.shape[1]) * place // 2
        page.put([block(label, ink, 0)], x, y)


def front_matter(rng: Rng, style: Style, width: int, article: bool) -> list[Block]:
    """Draws a title and, for an article, its authors and their abstract."""
    font = Font(int(rng.integers(16, 27)), bold=rng.random() < 0.6)
    align, inset = pick(rng, ("left", "center", "center")), int(pick(rng, (0, 30)))
    title = set_text(prose(rng, rng.uniform(3, 12), font, stops=0), width, round(1.2 * font.size), align)
    blocks = [block("Title", title, 0)]
    if not article:
        return blocks
    for stops, gap in ((0.2, 14), (0.0, 6)):
        authors = prose(rng, rng.uniform(2, 10), style.font, stops)
        blocks.append(block("Text", set_text(authors, width, style.pitch, align), gap))
    if rng.random() < 0.6:
        name = word_ink("Abstract", style.font._replace(bold=True))
        blocks.append(block("Section-header", set_text([name], width, 0, align), 16))
    words = prose(rng, rng.uniform(50, 130), style.font)
    abstract = set_text(words, width - 2 * inset, style.pitch, style.align)
    return [*blocks, block("Text", abstract, 10, inset)]


def fill_column(
    page: Page, rng: Rng, style: Style, kind: dict[str, float], x: int, top: int, width: int, bottom: int
) -> None:
    """Fills a column, at times with footnotes at its foot or with its rest left blank."""
    notes = footnotes(rng, style, width) if rng.random() < kind["notes"] else []
    if notes and tall(notes) < (bottom - top) // 3:
        bottom -= tall(notes)
        page.put(notes, x, bottom)
        page.ink[bottom - 5, x : x + int(width * rng.uniform(0.2, 0.5))] = 200
        bottom -= 14
    elif rng.random() < 0.2:
        bottom -= int((bottom - top) * rng.uniform(0.1, 0.6))
    y, last = top, "heading"
    while True:
        weights = np.array([kind[name] * (name == "text" or name != last) for name in WRITERS])
        for last in (str(rng.choice(list(WRITERS), p=weights / weights.sum())), "text"):
            blocks = WRITERS[last](rng, style, width, bottom - y)
            if blocks and tall(blocks) <= bottom - y:
                break
        else:
            return
        y = page.put(blocks, x, y - blocks[0].gap if y == top else y)
        y += 0 if last == "text" else style.pitch // 3


def _draw_size(rng: Rng) -> tuple[int, int]:
    """Draws the size of a page: mostly portrait A4 or Letter at 70 to 80 dots an inch."""
    short, ratio, odd = int(rng.integers(600, 681)), pick(rng, (11 / 8.5, 2**0.5)), rng.random()
    if odd < 0.03:
        return round(short * ratio), short
    return short, round(short * (rng.uniform(1.15, 1.6) if odd < 0.06 else ratio))


def page_size(seed: int, index: int) -> tuple[int, int]:
    """Returns the (width, height) of a page in pixels, without drawing it."""
    return _draw_size(np.random.default_rng([seed, index]))


def draw_page(seed: int, index: int) -> Drawn:
    """Draws page `index` of `seed`.

    Returns the image (H, W, 3) in RGB, the labels (T,) as positions in `CLASSES`, and the boxes (T, 4): x and
    y of the top left corner, width and height in whole pixels. They are tight to the ink and never overlap.
    """
    rng = np.random.default_rng([seed, index])
    width, height = _draw_size(rng)
    number = int(rng.choice(len(KINDS), p=[kind["share"] for kind in KINDS]))
    kind, style, page = KINDS[number], draw_style(rng), Page(np.zeros((height, width), np.uint8))
    side, top, bottom = (int(start + rng.integers(20)) for start in (45, 56, height - 76))
    if rng.random() < kind["header"]:
        running_line(page, rng, "Page-header", side, int(rng.integers(24, 36)))
        page.ink[49, side : width - side] = pick(rng, (0, 0, 200))
    if rng.random() < kind["footer"]:
        running_line(page, rng, "Page-footer", side, height - int(rng.integers(34, 46)))
    if rng.random() < kind["title"]:
        top = page.put(front_matter(rng, style, width - 2 * side, number == 0), side, top) + 2 * style.pitch
    columns = 2 if rng.random() < kind["columns"] else 1
    if columns == 2 and number > 0 and rng.random() < 0.3:
        spanning = pick(rng, (figure, tabular))(rng, style, width - 2 * side, 0)
        if tall(spanning) < (bottom - top) // 2:
            top = page.put(spanning, side, top) + 2 * style.pitch
    gutter = int(rng.integers(14, 30))
    step = (width - 2 * side + gutter) // columns
    for x in range(side, side + columns * step, step):
        fill_column(page, rng, style, kind, x, top, step - gutter, bottom)
    image = np.asarray(cv2.applyColorMap(page.ink, draw_palette(rng)[:, None]), np.uint8)
    return image, np.array(page.labels, np.int64), np.array(page.boxes, np.float64).reshape(-1, 4)


def _add_page(data: Coco, index: int, page: Drawn) -> None:
    """Adds a page to a COCO data set."""
    image, labels, boxes = page
    height, width = image.shape[:2]
    data["images"].append({"id": index, "file_name": f"{index:06d}.png", "width": width, "height": height})
    for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
        entry = {"id": len(data["annotations"]) + 1, "image_id": index, "category_id": label + 1}
        data["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})


def coco_dict(seed: int, pages: int | Sequence[int], draw: Draw = draw_page) -> Coco:
    """The first so many pages of `seed`, or those of these numbers, as a COCO data set; image ids are these numbers."""
    data: Coco = {"images": [], "annotations": [], "categories": CATEGORIES}
    for index in range(pages) if isinstance(pages, int) else pages:
        _add_page(data, index, draw(seed, index))
    return data


def write_folder(out: Path, seed: int, pages: int, draw: Draw = draw_page, workers: int = 1) -> None:
    """Writes the pages of `coco_dict` to `out`/annotations.json and, lossless, `out`/images/NNNNNN.png.

    More than one worker: so many processes draw.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    data: Coco = {"images": [], "annotations": [], "categories": CATEGORIES}
    write = partial(_write_page, out / "images", draw, seed)
    with ProcessPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        drawn = pool.map(write, range(pages), chunksize=8) if pool else map(write, range(pages))
        for index, page in enumerate(tqdm(drawn, "drawing", pages, unit="page", disable=None)):
            _add_page(data, index, page)
    (out / "annotations.json").write_text(json.dumps(data))


def _write_page(folder: Path, draw: Draw, seed: int, index: int) -> Drawn:
    """Draws a page into the folder; what comes back has the size of the image only, which is cheap to send."""
    image, labels, boxes = draw(seed, index)
    Image.fromarray(image).save(folder / f"{index:06d}.png")
    return np.broadcast_to(np.uint8(0), image.shape), labels, boxes
