"""Pictures of the drawn documents: photographs, charts, diagrams, maps, panels and logos, as RGB arrays."""

from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dfine.data.synthetic.documents.text import LOOKS, Font, Voice, face, number, phrase
from dfine.data.synthetic.ink import Rng, pick

Colour = tuple[int, int, int]
Picture = npt.NDArray[np.uint8]  # (height, width, 3)

Box = tuple[int, int, int, int]  # left, top, right, low

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
# Of charts and diagrams.
PALETTES: list[list[Colour]] = [[(r, g, b) for r, g, b in palette] for palette in LOOKS["palettes"]]


def vivid(rng: Rng) -> Colour:
    """Draws a colour that stands out on white."""
    hue, saturation, value = int(rng.integers(180)), int(rng.integers(110, 256)), int(rng.integers(60, 200))
    r, g, b = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return r, g, b


def pale(rng: Rng, strength: float = 0.15) -> Colour:
    """Draws a light tint."""
    r, g, b = (int(255 - strength * (255 - c)) for c in vivid(rng))
    return r, g, b


def letters_on(ground: Colour, dark: int = 430) -> Colour:
    """The colour of letters on a ground: white if it is dark, its channels less than `dark` in all; else black."""
    return WHITE if sum(ground) < dark else BLACK


def as_picture(values: npt.NDArray[np.floating]) -> Picture:
    """Cuts values off at 0 and at 255."""
    return np.clip(values, 0, 255).astype(np.uint8)


def noise(rng: Rng, wide: int, high: int, coarse: int, channels: int = 1) -> npt.NDArray[np.float32]:
    """Draws smooth noise from 0 to 1 with structures of about a `coarse`-th of the picture."""
    small = rng.random((coarse + 1, max(2, coarse * wide // max(1, high) + 1), channels)).astype(np.float32)
    large = cv2.resize(small, (wide, high), interpolation=cv2.INTER_CUBIC)
    return np.asarray(large, np.float32).reshape(high, wide, channels)


def photo(rng: Rng, wide: int, high: int) -> Picture:
    """Draws something like a photograph: light and colour at several scales, things in front, a grain."""
    low = np.array(vivid(rng), np.float32) * rng.uniform(0.1, 0.8)
    top = np.array(pale(rng, rng.uniform(0.1, 0.9)), np.float32)
    light = 0.6 * noise(rng, wide, high, int(rng.integers(1, 4)))
    light += 0.3 * noise(rng, wide, high, int(rng.integers(4, 12)))
    light += 0.15 * noise(rng, wide, high, 30)
    if rng.random() < 0.5:  # a sky
        light += np.linspace(0.5, -0.4, high, dtype=np.float32)[:, None, None]
    tint = noise(rng, wide, high, 2, 3) * rng.uniform(20, 120)
    image = as_picture(low + (top - low) * light + tint - 40)
    texture = as_picture(tint + 160 * (noise(rng, wide, high, 60) - 0.3))
    for _ in range(pick(rng, (0, 4, 10, 25))):
        scale = rng.uniform(0.05, 0.6)
        x, y, a, b = (rng.uniform(-0.1, 1, 4) * (wide, high, scale * wide, scale * high)).astype(int).tolist()
        colour, look = tuple(int(c) for c in rng.integers(0, 256, 3)), rng.random()
        if look < 0.4:
            cv2.ellipse(image, (x, y), (abs(a) + 2, abs(b) + 2), rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
        elif look < 0.7:
            points = np.array([x, y]) + rng.integers(-max(4, abs(a)), max(5, abs(a)), (5, 2))
            cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)
        elif look < 0.85:
            cv2.rectangle(image, (x, y), (x + abs(a), y + abs(b)), colour, -1)
        else:
            cut = (slice(max(0, y), max(0, y) + abs(b) + 1), slice(max(0, x), max(0, x) + abs(a) + 1))
            image[cut] = texture[cut]
    if rng.random() < 0.6:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), pick(rng, (0.6, 1.0, 2.0, 4.0))), np.uint8)
    grain = rng.normal(0, rng.uniform(1, 9), (high, wide, 1)).astype(np.float32)
    image = as_picture(image + grain + 25 * (noise(rng, wide, high, 40) - 0.5))
    return image if rng.random() < 0.8 else np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, 2)


def micrograph(rng: Rng, wide: int, high: int) -> Picture:
    """Draws bright spots, cells or bands on a dark ground, or tissue on a light one."""
    field = np.zeros((high, wide), np.float32)
    colour = np.array(pick(rng, ((60, 255, 90), (255, 60, 60), (80, 110, 255), WHITE)))
    for _ in range(int(rng.integers(8, 90))):
        x, y, r = int(rng.integers(wide)), int(rng.integers(high)), max(1, int(rng.uniform(0.01, 0.09) * wide))
        axes, turn = (r, max(1, int(r * rng.uniform(0.4, 1)))), rng.uniform(0, 180)
        cv2.ellipse(field, (x, y), axes, turn, 0, 360, rng.uniform(0.3, 1), pick(rng, (-1, -1, 1)))
    field = cv2.GaussianBlur(field, (0, 0), rng.uniform(0.6, 3))[:, :, None] + 0.2 * noise(rng, wide, high, 20)
    if rng.random() < 0.35:  # stained tissue, or a gel
        ground = np.array(pick(rng, ((240, 215, 230), (225, 225, 225), (235, 225, 205))))
        ink = np.array(vivid(rng))
        return as_picture(ground + (ink - ground) * (0.8 * field + 0.3 * noise(rng, wide, high, 50)))
    return as_picture(field * colour)


class Sheet:
    """What a picture is drawn on; `font` and `ink` are those of its words."""

    def __init__(self, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> None:
        self.wide, self.high, self.paper, self.voice = wide, high, paper, voice
        self.image = Image.new("RGB", (wide, high), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.font, self.ink = Font(family, 11.0), BLACK

    def write(self, text: str, x: float, y: float, anchor: str = "mm", **cut: Any) -> None:
        """Writes words around (x, y), or where Pillow's `anchor` says."""
        self.draw.text((x, y), text, self.ink, face(self.font._replace(**cut)), anchor=anchor)


def chart(rng: Rng, sheet: Sheet) -> None:
    """Draws a chart with axes, labels, and often a legend, a title and a frame."""
    wide, high, palette = sheet.wide, sheet.high, pick(rng, PALETTES)
    font = sheet.font = sheet.font._replace(size=max(7.0, min(wide / 32, 11.0)))
    ink = letters_on(sheet.paper, 381)
    sheet.ink = pick(rng, (ink, ink, (110, 110, 110)))
    look, size, series = pick(rng, LOOKS["charts"]), round(font.size), int(rng.integers(1, 6))
    left, right, top, low = 4 * size, wide - size, size, high - 3 * size
    if rng.random() < 0.35:
        sheet.write(phrase(rng, sheet.voice, 2, 5), wide / 2, size, size=1.2 * font.size, bold=True)
        top += 2 * size
    legend = pick(rng, ("none", "none", "right", "below", "inside"))
    names = [phrase(rng, sheet.voice, 1, 2)[:14] for _ in range(series)]
    if legend == "right" and wide > 220:
        right -= 8 * size
    elif legend == "below":
        low -= 2 * size
    right, low = left + max(20, right - left), top + max(20, low - top)
    box = (left, top, right, low)
    if look == "pie":
        _pie(rng, sheet, box, palette)
    else:
        for share in np.linspace(0, 1, int(rng.integers(3, 7))) if rng.random() < 0.4 else ():
            y = top + share * (low - top)
            sheet.draw.line((left, y, right, y), (200, 200, 200))
        count = int(rng.integers(3, 9) if look in ("bar", "stack", "flat", "box") else rng.integers(5, 60))
        if look == "heat":
            _heat(rng, sheet, box)
        else:
            _series(rng, sheet, box, look, palette[: 1 if look == "flat" else series], count)
        _axes(rng, sheet, box)
    for i, name in enumerate(names if legend != "none" else ()):
        x, y = left + i * (right - left) / series, float(high - size)
        if legend != "below":
            x, y = right + (size if legend == "right" else -9 * size), top + (1 + 1.5 * i) * size
        sheet.draw.rectangle((x, y - 3, x + 6, y + 3), palette[i])
        sheet.write(name, x + 10, y, "lm")
    if rng.random() < 0.12:
        sheet.draw.rectangle((0, 0, wide - 1, high - 1), None, (150, 150, 150))


def _pie(rng: Rng, sheet: Sheet, box: Box, palette: list[Colour]) -> None:
    """Draws slices with their shares, at times seen from the side or with a hole."""
    left, top, right, low = box
    shares = np.r_[0, np.cumsum(rng.dirichlet(np.ones(int(rng.integers(3, 8)))))] * 360
    r, x, y = min(right - left, low - top) / 2 - 2, (left + right) / 2, (top + low) / 2
    squash = pick(rng, (1.0, 1.0, 0.6))
    for i, (start, end) in enumerate(pairwise(shares)):
        around = (x - r, y - r * squash, x + r, y + r * squash)
        sheet.draw.pieslice(around, start, end + 1, palette[i % 6], sheet.paper)
        turn = np.radians((start + end) / 2)
        sheet.write(f"{(end - start) / 3.6:.0f}%", x + 1.12 * r * np.cos(turn), y + 1.1 * r * squash * np.sin(turn))
    if rng.random() < 0.3:
        sheet.draw.ellipse((x - r / 2, y - r / 2 * squash, x + r / 2, y + r / 2 * squash), sheet.paper)


def _heat(rng: Rng, sheet: Sheet, box: Box) -> None:
    """Draws cells in the colours of heat, sharp or smooth."""
    left, top, right, low = box
    shape = int(rng.integers(4, 30)), int(rng.integers(4, 40))
    cells = (rng.random(shape) ** pick(rng, (1, 2)) * 255).astype(np.uint8)
    between = pick(rng, (cv2.INTER_NEAREST, cv2.INTER_NEAREST, cv2.INTER_CUBIC))
    colours = pick(rng, (cv2.COLORMAP_JET, cv2.COLORMAP_VIRIDIS, cv2.COLORMAP_HOT, cv2.COLORMAP_BONE))
    heat = cv2.applyColorMap(cv2.resize(cells, (right - left, low - top), interpolation=between), colours)
    sheet.image.paste(Image.fromarray(heat), (left, top))


def _series(rng: Rng, sheet: Sheet, box: Box, look: str, palette: list[Colour], count: int) -> None:
    """Draws curves, areas, dots, boxes with whiskers, or bars: upright, stacked or flat."""
    draw, (left, top, right, low), series, base = sheet.draw, box, len(palette), np.zeros(count)
    wide, high, slot = right - left, low - top, (right - left) / count
    for i, colour in enumerate(palette):
        if rng.random() < 0.6:
            walk = np.cumsum(rng.normal(size=count))
        else:
            walk = np.exp(-np.linspace(0, rng.uniform(1, 5), count)) + rng.normal(0, 0.03, count)
        values = 0.08 + 0.8 * (walk - walk.min()) / (np.ptp(walk) + 1e-9) * rng.uniform(0.4, 1)
        xs, ys = left + slot * (np.arange(count) + 0.5), low - values * high
        points = list(zip(xs.tolist(), ys.tolist(), strict=True))
        if look in ("line", "area"):
            if look == "area":
                draw.polygon([(xs[0], low), *points, (xs[-1], low)], colour)
            draw.line(points, colour, width=pick(rng, (1, 1, 2, 3)))
            for x, y in points if rng.random() < 0.3 else ():
                draw.rectangle((x - 2, y - 2, x + 2, y + 2), colour)
        elif look == "scatter":
            r = pick(rng, (1, 2, 3))
            across, up = (rng.normal(0.5, 0.2, 40).clip(0, 1) for _ in range(2))
            for x, y in zip(across * wide + left, low - up * high, strict=True):
                draw.ellipse((x - r, y - r, x + r, y + r), colour)
        elif look == "flat":
            half = 0.3 * high / count
            for j, value in enumerate(values.tolist()):
                y = top + (j + 0.5) * high / count
                draw.rectangle((left, y - half, left + value * wide, y + half), colour)
        elif look == "box":
            half = 0.3 * slot / series
            for x, y in points:
                x, h = x - slot / 2 + (i + 0.5) * slot / series, rng.uniform(0.04, 0.15) * high
                draw.line((x, max(top, y - 2 * h), x, min(low, y + 2 * h)), sheet.ink)
                draw.rectangle((x - half, max(top, y - h), x + half, min(low, y + h)), colour, sheet.ink)
        else:
            beside = 1 if look == "stack" else series  # so many share a slot
            values, part = values / (series if look == "stack" else 1), 0.7 * slot / beside
            for j, value in enumerate(values.tolist()):
                x = left + slot * (j + 0.15) + (i % beside) * part
                bar = (x, low - (base[j] + value) * high, x + max(0, part - 1), low - base[j] * high)
                draw.rectangle(bar, colour, pick(rng, (None, sheet.ink)))
                if look == "bar" and series < 3:
                    x, y, reach = x + part / 2, low - value * high, round(sheet.font.size) / 2
                    draw.line((x, y - reach, x, y + reach), sheet.ink)
            base = base + values * (look == "stack")


def _axes(rng: Rng, sheet: Sheet, box: Box) -> None:
    """Draws axes with numbers, or names below, and often what they mean."""
    size, (left, top, right, low) = round(sheet.font.size), box
    sheet.draw.line((left, top, left, low, right, low), sheet.ink)
    if rng.random() < 0.4:
        sheet.draw.rectangle(box, None, sheet.ink)
    for share in np.linspace(0, 1, int(rng.integers(3, 7))):
        sheet.write(number(rng)[:6], left - 4, low - share * (low - top), "rm")
    for share in np.linspace(0.1, 0.9, int(rng.integers(2, max(3, (right - left) // (5 * size)) + 1))):
        text = number(rng)[:5] if rng.random() < 0.6 else phrase(rng, sheet.voice, 1, 1)[:8]
        sheet.write(text, left + share * (right - left), low + 0.8 * size)
    if rng.random() < 0.6:
        sheet.write(phrase(rng, sheet.voice, 1, 4), left + (right - left) / 2, low + 2.1 * size)


def diagram(rng: Rng, sheet: Sheet) -> None:
    """Draws named boxes joined by arrows, in rows or as a tree."""
    draw, palette, size = sheet.draw, pick(rng, PALETTES), rng.uniform(7.5, 11)
    filled, line = rng.random() < 0.6, pick(rng, (BLACK, palette[0], (90, 90, 90)))
    sheet.font, sheet.ink = sheet.font._replace(size=size), letters_on(palette[0] if filled else WHITE, 330)
    rows = max(1, int(sheet.high / rng.uniform(45, 90)))
    columns = max(1, int(sheet.wide / rng.uniform(80, 150)))
    step_x, step_y = sheet.wide / columns, sheet.high / rows
    look, fits = pick(rng, ("rectangle", "rectangle", "round", "ellipse")), max(3, int(step_x * 0.7 / (0.55 * size)))
    for row, column in np.ndindex(rows, columns):
        if rng.random() < 0.15 and rows * columns > 2:
            continue
        x, y = column * step_x + 2, row * step_y + 2
        right, low = x + step_x * 0.72, y + step_y * 0.62
        fill: Any = palette[(row if rng.random() < 0.8 else column) % 6] if filled else None
        if look == "ellipse":
            draw.ellipse((x, y, right, low), fill, line)
        else:
            draw.rounded_rectangle((x, y, right, low), 0 if look == "rectangle" else 6, fill, line)
        centre, middle = (x + right) / 2, (y + low) / 2
        for k in range(2 if step_y > 45 and rng.random() < 0.6 else 1):
            sheet.write(phrase(rng, sheet.voice, 1, 3)[:fits], centre, middle + (k - 0.4) * size * 1.2)
        if column < columns - 1 and rng.random() < 0.8:
            tip = (column + 1) * step_x
            draw.line((right, middle, tip, middle), line)
            draw.polygon((tip, middle, tip - 5, middle - 3, tip - 5, middle + 3), line)
        if row < rows - 1 and rng.random() < 0.5:
            draw.line((centre, low, centre, (row + 1) * step_y), line)


def sketch(rng: Rng, sheet: Sheet) -> None:
    """Draws thin outlines with reference numbers, as patents and manuals have them, or rings of chemistry."""
    draw, ink, size = sheet.draw, (20, 20, 20), (sheet.wide, sheet.high)
    sheet.font, sheet.ink = sheet.font._replace(size=rng.uniform(8, 12)), ink
    hexagons, r = rng.random() < 0.4, min(size) * 0.1
    for _ in range(int(rng.integers(3, 14))):
        (x, y), (a, b) = rng.uniform(0.15, 0.85, 2) * size, rng.uniform(0.04, 0.3, 2) * size
        weight = pick(rng, (1, 1, 2))
        if hexagons:
            angles = np.radians(np.arange(0, 361, 60) + 30)
            draw.line([(x + r * np.cos(t), y + r * np.sin(t)) for t in angles], ink, weight)
            draw.line((x, y + r, x + r, y + 2 * r), ink, weight)
            sheet.write(pick(rng, ("OH", "CH3", "N", "R1", "O", "NH2")), x + r, y + 2 * r + 5)
            continue
        shape = pick(rng, (draw.ellipse, draw.rectangle, draw.rectangle))
        shape((x - a / 2, y - b / 2, x + a / 2, y + b / 2), None, ink, weight)
        end = (x + pick(rng, (-1, 1)) * 0.6 * a, y - 0.6 * b)
        draw.line((x, y, *end), ink)
        sheet.write(f"{rng.integers(1, 200)}", *end, "ms")


def chart_map(rng: Rng, sheet: Sheet) -> None:
    """Draws regions of different tints with borders, roads and names."""
    wide, high, draw = sheet.wide, sheet.high, sheet.draw
    height = noise(rng, wide, high, int(rng.integers(3, 8)))[:, :, 0] + 0.2 * noise(rng, wide, high, 20)[:, :, 0]
    tints = np.array([pale(rng, rng.uniform(0.2, 0.7)) for _ in range(6)], np.uint8)
    levels = np.clip(height * 6, 0, 5).astype(int)
    regions = tints[levels]
    if rng.random() < 0.5:  # an island
        regions[levels == levels[0, 0]] = sheet.paper
    regions[(np.diff(levels, axis=0, prepend=0) != 0) | (np.diff(levels, axis=1, prepend=0) != 0)] = (110, 110, 110)
    sheet.image.paste(Image.fromarray(regions))
    sheet.font = sheet.font._replace(size=rng.uniform(7, 10))
    for _ in range(int(rng.integers(2, 10))):
        x, y = rng.uniform(0.1, 0.85, 2) * (wide, high)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), (200, 30, 30))
        sheet.write(phrase(rng, sheet.voice, 1, 1)[:10], x + 5, y, "lm")
        draw.line((x, y, *(rng.uniform(0, 1, 2) * (wide, high))), (200, 120, 60))


def screen(rng: Rng, sheet: Sheet) -> None:
    """Draws a window of a program: a bar, fields, buttons, lines of text."""
    draw, wide, back = sheet.draw, sheet.wide, pick(rng, (WHITE, (240, 240, 240), (20, 24, 32), (250, 250, 245)))
    sheet.font, bar = sheet.font._replace(size=rng.uniform(7, 10)), vivid(rng)
    draw.rectangle((0, 0, wide - 1, sheet.high - 1), back, (120, 120, 120))
    if rng.random() < 0.7:
        draw.rectangle((0, 0, wide - 1, 14), bar)
        sheet.ink = WHITE
        sheet.write(phrase(rng, sheet.voice, 2, 4), 6, 8, "lm")
    sheet.ink = BLACK if sum(back) > 400 else (220, 220, 220)
    y = 24.0
    while y < sheet.high - 12:
        x = 8 + pick(rng, (0, 0, 12, 24))
        sheet.write(phrase(rng, sheet.voice, 1, max(1, wide // 70)), x, y, "lm")
        if rng.random() < 0.2:
            draw.rectangle((wide * 0.6, y - 5, wide * 0.9, y + 5), pick(rng, (None, (225, 230, 240))), (130, 130, 130))
        y += sheet.font.size * rng.uniform(1.2, 2)


def logo(rng: Rng, sheet: Sheet) -> None:
    """Draws a sign in one or two colours, mostly with a name beside it."""
    draw, colour, other, side = sheet.draw, vivid(rng), vivid(rng), min(sheet.high, sheet.wide) - 1
    look, sheet.ink = rng.random(), WHITE
    if look < 0.25:
        draw.ellipse((0, 0, side, side), colour)
        draw.ellipse((0.3 * side, 0.3 * side, 0.8 * side, 0.8 * side), other)
    elif look < 0.5:
        for i in range(3):
            (a, b, c, d), top = ((i + part) * side / 3 for part in (0, 1, 1.5, 0.5)), 0.2 * side * i
            draw.polygon((a, side, b, side, c, top, d, top), pick(rng, (colour, other)))
    elif look < 0.75:
        draw.rounded_rectangle((0, 0, side, side), side / 6, colour)
        sheet.write(phrase(rng, sheet.voice, 1, 1)[0], side / 2, side / 2, size=0.7 * side, bold=True)
    else:
        draw.polygon((side / 2, 0, side, side, 0, side), colour)
        draw.line((0, side / 2, side, side / 2), other, 3)
    if sheet.wide > 1.4 * side:
        name = phrase(rng, sheet.voice, 1, 1, pick(rng, ("upper", "first")))[:8]
        sheet.ink = pick(rng, (colour, letters_on(sheet.paper, 381)))
        size = min(0.55 * side, (sheet.wide - side) / 4.5)
        sheet.write(name, 1.1 * side, side / 2, "lm", size=size, bold=True)


def panels(rng: Rng, sheet: Sheet) -> None:
    """Draws several pictures in rows, mostly with letters, as papers do."""
    wide, high, image = sheet.wide, sheet.high, sheet.image
    rows, columns = max(1, min(int(rng.integers(1, 4)), high // 70)), max(1, min(int(rng.integers(2, 5)), wide // 80))
    gap, mixed, dark = pick(rng, (2, 6, 12)), rng.random() < 0.4, rng.random() < 0.5
    step_x, step_y = wide // columns, high // rows
    corners = [(column * step_x, row * step_y) for row, column in np.ndindex(rows, columns)]
    for corner in corners:
        as_photo = rng.random() < 0.5 if mixed else dark
        look = pick(rng, ("micrograph", "micrograph", "photo")) if as_photo else "chart"
        part = picture(rng, look, step_x - gap, step_y - gap, sheet.paper, sheet.voice, sheet.font.family)
        image.paste(Image.fromarray(part), corner)
    letters = pick(rng, ("ABCDEFGHIJKLM", "abcdefghijklm", " " * 13))
    for letter, (x, y) in zip(letters, corners, strict=False):
        shade = float(np.asarray(image.getpixel((x + 6, min(high - 1, y + 7)))).mean())
        sheet.ink = WHITE if shade < 128 else BLACK
        sheet.write(letter, x + 2, y + 1, "la", bold=True)


DRAWN = dict(chart=chart, diagram=diagram, sketch=sketch, map=chart_map, screen=screen, logo=logo, panels=panels)


def picture(rng: Rng, look: str, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws a picture of a kind: photo, micrograph or one of `DRAWN`."""
    if look in ("photo", "micrograph"):
        return (photo if look == "photo" else micrograph)(rng, wide, high)
    sheet = Sheet(wide, high, paper, voice, family)
    DRAWN[look](rng, sheet)
    return np.array(sheet.image)
