"""Blocks of the drawn pages: what a writer puts next into a column of `width` pixels with `room` rows left."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from dfine.data.synthetic.ink import (
    NAMES,
    NUMBERS,
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
    visible,
    word_ink,
    write,
)


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
