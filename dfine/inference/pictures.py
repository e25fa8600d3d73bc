"""Pages with named boxes, for people to look at. Pages are (H, W, 3) uint8 RGB."""

import math
import unicodedata
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont
from torchvision.utils import make_grid

from dfine.data.transforms import canvas_of

# Far apart in Oklab, yet dark enough for thin lines on white paper and for white text (a contrast of 4.5 or more).
# fmt: off
COLOURS = (
    "#0f69ff", "#e1000f", "#008700", "#b45a00", "#8700f0", "#1e7869", "#e10f87", "#4b1e4b", "#b400c3", "#004b69",
    "#870f00", "#965a78", "#004b00", "#3c78b4", "#694b0f", "#783ca5", "#960069", "#003cb4", "#0000ff", "#3c0087",
)
# fmt: on
TINT = 0.14  # the share of its class's colour inside a box
BOX, INK, LABEL = 1, 8, 64  # the cost of hiding a pixel inside a box, of ink, of another label


def draw(
    page: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: np.ndarray | None = None,
    legend: bool = False,
) -> np.ndarray:
    """The page with its boxes in their classes' colours, each with its name and, where there is one, its score.

    A label is above, below or beside its box, where it hides least; it is inside only if there is no room around the
    box. A name too long for the page is cut short, and a label that does not fit into the page at all is left out.
    Pillow's own font is used: accents are dropped, and letters that are not Latin are drawn as empty boxes.

    Args:
        page: (H, W, 3) uint8. labels: (K,). boxes: (K, 4) xyxy pixels, best first. names: of the labels.
        legend: the names are in rows added below the page, once each; the labels have only the scores.
    Returns:
        (H, W, 3) uint8, or more rows with a legend; a new array
    """
    height, width = page.shape[:2]
    size = font_size((height, width))
    font, pen = ImageFont.load_default(size), max(1, round(size / 10))
    ends, corners = [width, height, width, height], boxes.reshape(-1, 2, 2)
    inner = np.concatenate([np.floor(corners.min(1)), np.ceil(corners.max(1))], axis=1).clip(0, ends).astype(int)
    outer = (inner + np.array([-pen, -pen, pen, pen])).clip(0, ends)  # lines are around a box and hide nothing of it
    colours = [colour(label) for label in labels]

    frames = (outer - [0, 0, 1, 1]).tolist()  # Pillow's x2 and y2 are inside
    order = np.argsort(np.prod(outer[:, 2:] - outer[:, :2], axis=1), kind="stable")[::-1]  # small boxes on top
    tint = Image.new("RGB", (width, height), "white")
    for i in order:
        light = tuple(round(255 - TINT * (255 - channel)) for channel in colours[i])
        ImageDraw.Draw(tint).rectangle(frames[i], fill=light)
    picture = ImageChops.multiply(Image.fromarray(page), tint)  # black text stays black
    canvas = ImageDraw.Draw(picture)
    for i in order:
        canvas.rectangle(frames[i], outline=colours[i], width=pen)

    costs, placed = page_costs(page, inner, outer, pen), []
    for i, label in enumerate(labels):
        score = "" if scores is None else f"{scores[i]:.2f}"
        name = "" if legend else shortened(names[label], font, width - size - font.getlength("  " + score))
        caption = f"{name}  {score}".strip()
        w, h = math.ceil(font.getlength(caption)) + size // 2, round(1.2 * size)
        if caption and w <= width and h <= height:
            x, y = label_corner(inner[i].tolist(), pen, w, h, costs)
            costs[y : y + h, x : x + w] = LABEL
            placed.append((x, y, w, h, caption, colours[i]))
    for x, y, w, h, caption, fill in reversed(placed):  # the best is on top
        canvas.rectangle((x, y, x + w - 1, y + h - 1), fill=fill)
        canvas.text((x + w / 2, y + h / 2), caption, "white", font, anchor="mm")
    drawn = np.array(picture)
    if legend and len(labels) > 0:
        drawn = np.concatenate([drawn, legend_of(np.unique(labels).tolist(), names, width, size)])
    return drawn


def font_size(size: tuple[int, int]) -> int:
    """In pixels, for a picture of this height and width."""
    return max(10, round(math.sqrt(size[0] * size[1]) / 88))


def page_costs(page: np.ndarray, inner: np.ndarray, outer: np.ndarray, pen: int) -> np.ndarray:
    """The cost of hiding each pixel by a label, (H, W) uint8, before any label is placed."""
    grey = cv2.blur(cv2.cvtColor(page, cv2.COLOR_RGB2GRAY), (2 * pen + 1, 2 * pen + 1))  # so that a speck is no ink
    paper = np.median(grey[::4, ::4])
    costs = ((grey < paper - 40) | (grey > paper + 40)) * np.uint8(INK)
    for (x1, y1, x2, y2), (left, top, right, bottom) in zip(inner, outer, strict=True):
        inside = costs[y1:y2, x1:x2] | BOX
        costs[top:bottom, left:right] &= BOX  # the ink that the line hides anyway
        costs[y1:y2, x1:x2] = inside
    return costs


def label_corner(box: list[int], pen: int, w: int, h: int, costs: np.ndarray) -> tuple[int, int]:
    """The upper left corner of a label of w x h pixels: above, below or beside its box, where it costs least."""
    (x1, y1, x2, y2), (height, width) = box, costs.shape
    across = [round(x1 - pen + share * (x2 - x1 + 2 * pen - w)) for share in (0, 1, 0.5, 0.25, 0.75)]
    along = [round(y1 - pen + share * (y2 - y1 + 2 * pen - h)) for share in (0, 1, 0.5)]
    corners = [(x, y) for y in (y1 - h, y2) for x in across] + [(x, y) for x in (x1 - w, x2) for y in along]
    corners = [(min(max(x, 0), width - w), min(max(y, 0), height - h)) for x, y in corners]
    outside = [(x, y) for x, y in corners if x + w <= x1 or x >= x2 or y + h <= y1 or y >= y2]

    def cost(corner: tuple[int, int]) -> float:
        x, y = corner
        reach = 2 * h if y >= y2 else h  # a label that is just above another box would be taken for that one's
        return cv2.mean(costs[y : y + reach, x : x + w])[0]

    return min(outside or corners, key=cost)  # the first of equals


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text in one line and without its accents, which Pillow's font lacks; cut off where it is too wide."""
    text = "".join(
        mark for mark in unicodedata.normalize("NFKD", " ".join(text.split())) if not unicodedata.combining(mark)
    )
    while len(text) > 1 and (length := font.getlength(text)) > width:
        text = text[: max(0, min(len(text) - 2, int(len(text) * width / length)))] + "…"
    return text


def legend_of(labels: Iterable[int], names: Sequence[str], width: int, size: int) -> np.ndarray:
    """The colours and names of classes, side by side in as many lines as they need: (h, width, 3) uint8."""
    font = ImageFont.load_default(size)
    entries, x, y = [], size, 0
    for label in labels:
        name = shortened(names[label], font, width - 3.5 * size)
        length = 2 * size + math.ceil(font.getlength(name))  # with its square
        if x > size and x + length > width:
            x, y = size, y + 2 * size
        entries.append((x, y, name, colour(label)))
        x += length + size
    strip = Image.new("RGB", (width, y + 2 * size), "white")
    canvas = ImageDraw.Draw(strip)
    canvas.line((0, 0, width, 0), "grey")
    for x, y, name, fill in entries:
        canvas.rectangle((x, y + size // 2, x + size, y + size // 2 + size), fill=fill)
        canvas.text((x + 1.5 * size, y + size), name, "black", font, anchor="lm")
    return np.asarray(strip)


def headed(picture: np.ndarray, heading: str) -> np.ndarray:
    """A picture (H, W, 3) uint8 with a heading above it, in rows of its own."""
    size = 2 * font_size(picture.shape[:2])
    strip = Image.new("RGB", (picture.shape[1], 2 * size), "white")
    ImageDraw.Draw(strip).text((size, size), heading, "black", ImageFont.load_default(size), anchor="lm")
    return np.concatenate([np.asarray(strip), picture])


def colour(label: int) -> tuple[int, int, int]:
    """The RGB colour of a class."""
    red, green, blue = ImageColor.getrgb(COLOURS[label % len(COLOURS)])[:3]
    return red, green, blue


def grid(pages: list[np.ndarray], columns: int) -> np.ndarray:
    """Pages of any size side by side on grey, row by row, each in the upper left corner of its cell."""
    height, width = canvas_of([(page.shape[0], page.shape[1]) for page in pages], 1)
    cells = torch.full((len(pages), 3, height, width), 128, dtype=torch.uint8)
    for cell, page in zip(cells, pages, strict=True):
        cell[:, : page.shape[0], : page.shape[1]] = torch.from_numpy(page).permute(2, 0, 1)
    return make_grid(cells, nrow=columns, padding=8, pad_value=128).permute(1, 2, 0).numpy()
