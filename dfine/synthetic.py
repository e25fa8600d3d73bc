"""Drawn document pages with exact boxes: a data set of any size that needs no download.

Every block of a page is first drawn by itself as *ink*, an array of darkness, then cropped to what is visible
and put on the page, so its box is exact to the pixel. Page `index` of `seed` depends on nothing else: give
training and validation different seeds and they share no page.

    python -m dfine.synthetic --out data/drawn --pages 200 --seed 1
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# fmt: off
CLASSES: tuple[str, ...] = (
    "Caption", "Footnote", "Formula", "List-item", "Page-footer", "Page-header",
    "Picture", "Section-header", "Table", "Text", "Title",
)
CATEGORIES: list[dict[str, Any]] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]

NAMES = (
    "model", "value", "data", "rate", "time", "case", "result", "level", "total", "point", "order", "field",
    "test", "size", "range", "work", "system", "process", "sample", "average", "period", "change", "cost",
    "unit", "section", "method", "effect", "water", "power", "energy", "growth", "market", "service",
)
SYLLABLES = ("al", "ber", "con", "dar", "el", "fin", "gra", "hol", "im", "jor", "ka", "lum", "ven", "tis")
WORDS = (
    "the", "of", "and", "to", "in", "a", "is", "for", "with", "that", "by", "on", "as", "are", "at", "from",
    "this", "be", "we", "which", "can", "it", "or", "not", "was", "have", "each", "both", "than", "these",
    "between", "under", "over", "first", "given", "using", "where", "such", "more", "most", "after", "new",
    *NAMES, *(a + b + c for a in SYLLABLES for b in SYLLABLES[:6] for c in ("", *SYLLABLES[12:]) if a != b),
)
# fmt: on
NUMBERS = ("{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "{:.1f}%", "({:,.0f})")
FAINT = 20  # less darkness is dropped: nobody would see it, and a box should not reach out for it

Ink = npt.NDArray[np.uint8]  # (height, width) darkness: 0 is paper, 255 is full ink
Rng = np.random.Generator
Drawn = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.float64]]  # image, labels, boxes
Coco = dict[str, list[dict[str, Any]]]
T = TypeVar("T")


class Font(NamedTuple):
    """A cut of Pillow's built-in face: `size` in pixels, `stretch` a factor for the widths."""

    size: int
    bold: bool = False
    slant: float = 0.0
    stretch: float = 1.0


class Style(NamedTuple):
    """The typography of a page; lengths in pixels."""

    font: Font
    heading: Font
    pitch: int  # from one baseline to the next
    align: str
    indent: int
    gap: int  # between paragraphs
    numbered: bool


class Block(NamedTuple):
    """Something with a label: its cropped ink, `left` pixels into its column, `gap` below the block above."""

    label: str
    ink: Ink
    left: int
    gap: int


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Returns one of the options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def visible(ink: Ink) -> tuple[slice, slice]:
    """Returns the rows and the columns from the first to the last with visible ink."""
    seen = ink >= FAINT
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def block(label: str, ink: Ink, gap: int, left: int = 0) -> Block:
    """Crops ink that was drawn `left` pixels into its column."""
    rows, columns = visible(ink)
    ink = ink[rows, columns]
    return Block(label, ink * (ink >= FAINT), left + columns.start, gap)


def tall(blocks: Sequence[Block]) -> int:
    """Returns the height of blocks below each other, with their gaps."""
    return sum(each.gap + each.ink.shape[0] for each in blocks)


def paste(canvas: Ink, ink: Ink, x: int, y: int) -> None:
    """Draws ink on a canvas with its top left corner at (x, y); what sticks out right or below is lost."""
    part = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    np.maximum(part, ink[: part.shape[0], : part.shape[1]], out=part)


# Text: a word is drawn once and then copied, for FreeType would take longer than all the rest.


@cache
def _glyph(character: str, font: Font) -> tuple[Ink, float]:
    """Returns the ink of a character with some room on both sides, and the way to the next character."""
    face = ImageFont.load_default(font.size)
    assert isinstance(face, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    (ascent, descent), stroke = face.getmetrics(), font.bold * font.size / 28
    advance = face.getlength(character) + 0.3 * font.bold
    image = Image.new("L", (ceil(advance) + font.size, ascent + descent))
    ImageDraw.Draw(image).text((font.size // 2, 0), character, 255, face, stroke_width=stroke)
    if font.slant or font.stretch != 1:
        matrix = (1 / font.stretch, font.slant, -font.slant * ascent, 0, 1, 0)
        image = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.array(image), advance * font.stretch


@lru_cache(maxsize=1 << 16)
def word_ink(word: str, font: Font) -> Ink:
    """Returns the ink of a word, (height of a line, width without side bearings); not to be written to."""
    glyphs = [_glyph(character, font) for character in word]
    canvas = np.zeros((glyphs[0][0].shape[0], sum(ink.shape[1] for ink, _ in glyphs)), np.uint8)
    x = 0.0
    for ink, advance in glyphs:
        paste(canvas, ink, round(x), 0)
        x += advance
    columns = np.flatnonzero(canvas.max(axis=0) >= FAINT)
    return canvas[:, columns[0] : columns[-1] + 1]


def prose(rng: Rng, count: float, font: Font, stops: float = 0.07) -> list[Ink]:
    """Returns words, of which the share `stops` ends a sentence and as many come before a comma."""
    inks, fresh = [], True
    for place, mark in rng.random((max(1, int(count)), 2)).tolist():
        word = WORDS[int(len(WORDS) * place**2)]  # the first words are the most frequent
        word = word.capitalize() if fresh else word
        fresh = mark < stops
        inks.append(word_ink(word + ("." if fresh else "," if mark < 2 * stops else ""), font))
    return inks


def set_text(
    inks: Sequence[Ink], width: int = 0, pitch: int = 0, align: str = "left", indent: int = 0, most: int = 99
) -> Ink:
    """Sets words in lines of `width` pixels (0: one line), `pitch` apart, and keeps `most` of them."""
    space = max(2, round(0.27 * inks[-1].shape[0]))
    width = width or sum(ink.shape[1] + space for ink in inks)
    lines: list[list[Ink]] = [[]]
    room = width - indent
    for ink in inks:
        if lines[-1] and ink.shape[1] > room:
            lines.append([])
            room = width
        lines[-1].append(ink)
        room -= ink.shape[1] + space
    last, lines = len(lines) - 1, lines[:most]
    canvas = np.zeros((pitch * (len(lines) - 1) + max(ink.shape[0] for ink in inks), width), np.uint8)
    for row, line in enumerate(lines):
        start = 0 if row else indent
        slack = width - start - sum(ink.shape[1] for ink in line) - space * (len(line) - 1)
        step = slack / max(1, len(line) - 1) if align == "justify" and row < last else 0.0
        x = start + max(0, {"center": slack / 2, "right": slack}.get(align, 0.0))
        for ink in line:
            paste(canvas, ink, int(x), row * pitch)
            x += ink.shape[1] + space + step
    return canvas


def write(canvas: Ink, text: str, x: int, y: int, font: Font, wide: int = 0) -> int:
    """Writes from x on, or centred in `wide` pixels there, around the row y, and returns the next x."""
    ink = word_ink(text, font)
    paste(canvas, ink, x + max(0, wide - ink.shape[1]) // 2, y - ink.shape[0] // 2)
    return x + max(wide, int(ink.shape[1])) + 1


# Blocks: a writer draws what comes next in a column of `width` pixels with `room` rows left, or nothing.


def paragraph(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a paragraph, cut where the column ends as if it went on in the next."""
    most = room // style.pitch - 1
    if most < 2:
        return []
    inks = prose(rng, rng.uniform(2, 12) * width / (3.4 * style.font.size), style.font)
    return [block("Text", set_text(inks, width, style.pitch, style.align, style.indent, most), style.gap)]


def heading(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a section header, unless too few lines of text would fit below it."""
    if room < 6 * style.pitch:
        return []
    minor = pick(rng, ("", f".{rng.integers(1, 6)}"))
    font = style.heading._replace(size=style.heading.size - bool(minor))
    inks = [word_ink(f"{rng.integers(1, 8)}{minor}", font)] * style.numbered
    ink = set_text(inks + prose(rng, rng.uniform(1, 6), font, stops=0), width, round(1.2 * font.size))
    return [block("Section-header", ink, style.gap + style.pitch // 2)]


def bullets(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a list, each item with its mark a block."""
    font, size, mark = style.font, style.font.size, pick(rng, ("·", "·", "-", "{}.", "({})"))
    left, gap = int(pick(rng, (0, 0, 10))), int(rng.integers(3, 4 + style.pitch // 2))
    inner, length, blocks = width - 2 * size - left, rng.uniform(0.5, 2), []
    for number in range(1, int(rng.integers(3, 7))):
        inks = prose(rng, length * rng.uniform(0.3, 1.7) * inner / (3.4 * size), font)
        ink = np.pad(set_text(inks, inner, style.pitch, style.align), ((0, 0), (2 * size, 0)))
        if mark == "·":
            dot = word_ink(mark, Font(2 * size))
            paste(ink, dot[visible(dot)[0]], 2, round(0.6 * size))
        else:
            paste(ink, word_ink(mark.format(number), font), 0, 0)
        blocks.append(block("List-item", ink, gap, left))
    while len(blocks) > 2 and tall(blocks) > room:
        blocks.pop()
    return blocks


def footnotes(rng: Rng, style: Style, width: int) -> list[Block]:
    """Draws one to three footnotes with raised marks."""
    font, blocks = style.font._replace(size=style.font.size - 2), []
    for number in range(1, int(rng.integers(2, 5))):
        inks = [word_ink(str(number), Font(6)), *prose(rng, rng.uniform(4, 35), font)]
        blocks.append(block("Footnote", set_text(inks, width, round(1.2 * font.size), style.align), 3))
    return blocks


def caption(rng: Rng, style: Style, width: int, name: str) -> Block:
    """Draws the caption of a picture or a table, in the middle at times if it fits in a line."""
    font = style.font._replace(size=style.font.size - int(rng.integers(2)))
    lead = font._replace(bold=bool(rng.integers(2)))
    inks = [word_ink(name, lead), word_ink(f"{rng.integers(1, 20)}{pick(rng, ':.')}", lead)]
    inks += prose(rng, rng.uniform(0.3, 2.5) * width / (3.4 * font.size), font)
    align = style.align if set_text(inks).shape[1] > width else pick(rng, ("left", "center"))
    return block("Caption", set_text(inks, width, round(1.22 * font.size), align), 7)


def figure(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a picture, mostly with a caption below it."""
    wide = min(420, int(width * pick(rng, (1.0, 1.0, 0.85, 0.7))))
    ink = pick(rng, (chart, chart, photo, diagram))(rng, wide, int(wide * rng.uniform(0.4, 0.85)))
    picture = block("Picture", ink, style.gap + 8, (width - wide) // 2)
    return [picture, caption(rng, style, width, "Figure")][: 2 if rng.random() < 0.8 else 1]


def tabular(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a table, mostly with a caption above or below it."""
    wide = int(width * pick(rng, (1.0, 1.0, 0.8)))
    body = block("Table", table(rng, style, wide), style.gap + 8, (width - wide) // 2)
    note = caption(rng, style, width, "Table")
    above = [note._replace(gap=body.gap), body._replace(gap=6)]
    return pick(rng, ([body], [body, note], above, above))


def table(rng: Rng, style: Style, width: int) -> Ink:
    """Draws a table with a row of column names, a column of row names and numbers."""
    font = style.font._replace(size=style.font.size - int(rng.integers(2)))
    rows, pitch, first = int(rng.integers(4, 15)), int(font.size * rng.uniform(1.4, 2.0)), int(0.36 * width)
    columns = max(1, min(int(rng.integers(2, 8)), (width - first) // (5 * font.size)))
    edges = np.linspace(first, width, columns + 1).astype(int).tolist()
    formats = [pick(rng, NUMBERS) for _ in range(columns)]
    look, shade = pick(rng, ("book", "grid", "lines", "plain", "stripes")), int(pick(rng, (0, 0, 40, 70)))
    ink = np.zeros((rows * pitch + 1, width), np.uint8)
    if look == "stripes":
        ink[:-1].reshape(rows, pitch, width)[::2] = 30
    ink[:pitch] = shade
    rules = {"book": [0, pitch, -1], "plain": [pitch], "stripes": [0, -1]}
    ink[rules.get(look, range(0, rows * pitch + 1, pitch))] = 200
    if look == "grid":
        ink[:, [0, *edges[:-1], width - 1]] = 200
    for row in range(rows):
        cut = font._replace(bold=row == 0 or (row == rows - 1 and shade > 0))
        y = row * pitch + (pitch - font.size) // 2 - 1
        paste(ink, set_text(prose(rng, rng.uniform(1, 4), cut, stops=0), first - 8, most=1), 4, y)
        for number, left, right in zip(formats, edges[:-1], edges[1:], strict=True):
            text = number.format(10 ** rng.uniform(0, 3)) if row else pick(rng, NAMES).capitalize()
            cell = word_ink(text, cut)
            paste(ink, cell, max(left + 2, right - cell.shape[1] - 4), y)
    return ink


def formula(rng: Rng, style: Style, width: int, room: int) -> list[Block]:
    """Draws a displayed formula, mostly with its number at the right margin, which belongs to its box."""
    font = Font(style.font.size + 1)
    axis = 3 * font.size
    ink = np.zeros((2 * axis, width), np.uint8)
    left = int(rng.uniform(0.02, 0.35) * width)
    x = write(ink, pick(rng, "EFLPQRfghuyz"), left, axis, font._replace(slant=0.2))
    for sign in ("=", *rng.choice(("+", "-"), size=rng.integers(4)).tolist()):
        if x < 0.55 * width:
            x = term(rng, ink, write(ink, sign, x + 3, axis, font) + 4, axis, font)
    if rng.random() < 0.7:
        number = f"({rng.integers(1, 30)})"
        write(ink, number, width - word_ink(number, style.font).shape[1], axis, style.font)
    return [block("Formula", ink, style.gap + style.pitch // 2)]


def term(rng: Rng, ink: Ink, x: int, axis: int, font: Font) -> int:
    """Writes a fraction, a sum, a product or a variable with an index from x on, and returns the next x."""
    italic, small = font._replace(slant=0.2), font._replace(size=max(7, font.size - 3))
    a, b, c = (pick(rng, "abcdhkpqstxyzABDGHNSTVX") for _ in range(3))
    look, up, half = rng.random(), pick(rng, (-1, 1)) * font.size // 3, round(0.7 * font.size)
    if look < 0.3:
        wide = int(word_ink(f"{a}+{b}", italic).shape[1]) + 4
        ink[axis, x : x + wide] = 220
        write(ink, f"{a}+{b}", x, axis - half, italic, wide)
        return write(ink, pick(rng, (c, f"{c}{b}", f"1-{c}")), x, axis + half + 1, italic, wide) + 2
    if look < 0.5:
        return write(ink, pick(rng, (f"({a}-{b})", f"{a}({b})", f"{a}{b}")), x, axis, italic)
    if look < 0.75:
        sign = sum_sign(font.size)
        paste(ink, sign, x, axis - sign.shape[0] // 2)
        write(ink, pick(rng, "nNm"), x, axis - 2 * half, small, sign.shape[1])
        x = write(ink, pick(rng, ("i=1", "k=0", "j")), x, axis + 2 * half, small, sign.shape[1])
    return write(ink, pick(rng, "2nijk"), write(ink, a, x, axis, italic), axis + up, small)


@cache
def sum_sign(size: int) -> Ink:
    """Draws the sign that the built-in face lacks, four times too large for smooth edges."""
    image = Image.new("L", (4 * size, 6 * size))
    corners = ((0.9, 0.15), (0.9, 0.02), (0.1, 0.02), (0.55, 0.5), (0.1, 0.97), (0.9, 0.97), (0.9, 0.85))
    points = [(4 * size * x, 6 * size * y) for x, y in corners]
    ImageDraw.Draw(image).line(points, 255, width=max(4, size // 3))
    return np.array(image.resize((size, 3 * size // 2), Image.Resampling.BOX))


def chart(rng: Rng, wide: int, high: int) -> Ink:
    """Draws curves, dots or bars over labelled axes, at times with a grid and a frame."""
    image, font, low, end = Image.new("L", (wide, high)), Font(8), high - 24, wide - 3
    draw, look = ImageDraw.Draw(image), pick(rng, ("curves", "curves", "dots", "bars"))
    ticks = pick(rng, (30, end))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 8 + share * (low - 8)
        draw.line((26, y, ticks, y), 60)
    for shade in (110, 255, 170, 80)[: 1 if look == "bars" else int(rng.integers(1, 5))]:
        count, depth = int(rng.integers(4, 40)), rng.uniform(0.3, 1) * (high - 40)
        walk = np.cumsum(rng.normal(size=count))
        ys = low - 6 - (walk - walk.min()) / np.ptp(walk) * depth
        points = list(zip(np.linspace(38, wide - 12, count).tolist(), ys.tolist(), strict=True))
        if look == "curves":
            draw.line(points, shade, width=int(rng.integers(1, 3)))
            continue
        half, below = (1, 2) if look == "dots" else (min(7, 100 // count), high)
        for x, y in points:
            draw.rectangle((x - half, y, min(end, x + half), min(low, y + below)), shade)
    draw.line((30, 4, 30, low, end, low, *((end, 4, 30, 4) if rng.random() < 0.5 else ())), 230)
    ink = np.array(image)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        write(ink, str(rng.integers(1, 999)), 4, 8 + int(share * (low - 8)), font)
        write(ink, str(rng.integers(1, 999)), 30 + int(share * (wide - 54)), high - 16, font)
    return ink


def photo(rng: Rng, wide: int, high: int) -> Ink:
    """Draws smooth light and dark with some things in front and a grain."""
    coarse = rng.integers(0, 256, size=rng.integers(2, 8, size=2), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((wide, high), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for x, y, a, b in rng.uniform(0.05, 0.6, size=(rng.integers(6), 4)) * (wide, high, wide, high):
        shape = pick(rng, (draw.ellipse, draw.ellipse, draw.rectangle))
        shape((x, y, x + a, y + b), int(rng.integers(40, 225)))
    smooth: Ink = np.asarray(image).clip(40, 225)
    return smooth + rng.integers(0, 30, size=(high, wide), dtype=np.uint8)


def diagram(rng: Rng, wide: int, high: int) -> Ink:
    """Draws rows of named boxes with lines between neighbours and arrows to the right."""
    rows, columns = max(1, high // int(rng.integers(50, 90))), max(2, wide // int(rng.integers(90, 140)))
    image, shade, names = Image.new("L", (wide, high)), int(pick(rng, (0, 30, 60))), []
    draw = ImageDraw.Draw(image)
    for row, column in np.ndindex(rows, columns):
        x, y = column * wide // columns, row * high // rows
        right, low = x + wide // columns - 24, y + high // rows - 14
        middle, centre = (y + low) // 2, (x + right) // 2
        draw.rectangle((x, y, right, low), shade, 220)
        if column < columns - 1:
            draw.line((right, middle, right + 22, middle), 220)
            draw.polygon((right + 23, middle, right + 18, middle - 3, right + 18, middle + 3), 220)
        if row < rows - 1 and rng.random() < 0.6:
            draw.line((centre, low, centre, low + 14), 220)
        names.append((set_text(prose(rng, 2, Font(9), stops=0), right - x - 8, 11), x + 5, middle - 10))
    ink = np.array(image)
    for name, x, y in names:
        paste(ink, name, x, y)
    return ink


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
    image = np.take(draw_palette(rng), page.ink, axis=0)
    return image, np.array(page.labels, np.int64), np.array(page.boxes, np.float64).reshape(-1, 4)


def _add_page(data: Coco, page: Drawn) -> str:
    """Adds a page to a COCO data set and returns its file name."""
    image, labels, boxes = page
    index, (height, width) = len(data["images"]), image.shape[:2]
    name = f"{index:06d}.png"
    data["images"].append({"id": index, "file_name": name, "width": width, "height": height})
    for label, box in zip(labels.tolist(), boxes.tolist(), strict=True):
        entry = {"id": len(data["annotations"]) + 1, "image_id": index, "category_id": label + 1}
        data["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return name


def coco_dict(seed: int, pages: int) -> Coco:
    """Returns the first `pages` pages of `seed` as a COCO data set; the id of an image is its index."""
    data: Coco = {"images": [], "annotations": [], "categories": CATEGORIES}
    for index in range(pages):
        _add_page(data, draw_page(seed, index))
    return data


def write_folder(out: Path, seed: int, pages: int) -> None:
    """Writes the pages of `coco_dict` to `out`/annotations.json and, lossless, `out`/images/NNNNNN.png."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    data: Coco = {"images": [], "annotations": [], "categories": CATEGORIES}
    for index in tqdm(range(pages), "drawing", unit="page", disable=None):
        page = draw_page(seed, index)
        Image.fromarray(page[0]).save(out / "images" / _add_page(data, page))
    (out / "annotations.json").write_text(json.dumps(data))


def main() -> None:
    """Writes a folder of pages from the command line."""
    parser = argparse.ArgumentParser(description="Draw document pages with exact boxes, as a COCO data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder for images/ and annotations.json")
    parser.add_argument("--pages", type=int, required=True, help="how many pages to draw")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pages (default: 0)")
    args = parser.parse_args()
    if args.pages < 1:
        parser.error(f"--pages must be at least 1, not {args.pages}")
    write_folder(args.out, args.seed, args.pages)


if __name__ == "__main__":
    main()
