"""Ink of the drawn pages: arrays of darkness, words in Pillow's built-in face, and lines of text."""

from collections.abc import Sequence
from functools import cache, lru_cache
from math import ceil
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

# fmt: off
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


def break_lines(
    inks: Sequence[Ink], width: int, space: int, first: int, rest: int, most: int
) -> tuple[list[list[Ink]], bool]:
    """Breaks words into `most` lines of `width` pixels, and tells whether words are left over.

    `first` and `rest` are the indents of the first and of the other lines.
    """
    lines: list[list[Ink]] = [[]]
    room = width - first
    for ink in inks:
        if lines[-1] and ink.shape[1] > room:
            if len(lines) == most:
                return lines, True
            lines.append([])
            room = width - rest
        lines[-1].append(ink)
        room -= ink.shape[1] + space
    return lines, False


def set_text(
    inks: Sequence[Ink], width: int = 0, pitch: int = 0, align: str = "left", indent: int = 0, most: int = 99
) -> Ink:
    """Sets words in lines of `width` pixels (0: one line), `pitch` apart, and keeps `most` of them."""
    space = max(2, round(0.27 * inks[-1].shape[0]))
    width = width or sum(ink.shape[1] + space for ink in inks)
    lines, cut = break_lines(inks, width, space, indent, 0, most)
    canvas = np.zeros((pitch * (len(lines) - 1) + max(ink.shape[0] for ink in inks), width), np.uint8)
    for row, line in enumerate(lines):
        start = 0 if row else indent
        slack = width - start - sum(ink.shape[1] for ink in line) - space * (len(line) - 1)
        step = slack / max(1, len(line) - 1) if align == "justify" and (cut or line is not lines[-1]) else 0.0
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
