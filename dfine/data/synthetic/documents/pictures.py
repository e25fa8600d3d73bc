"""Pictures of the drawn documents: photographs, charts, diagrams, maps, panels and logos, as RGB arrays."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dfine.data.synthetic.documents.text import Font, Voice, face, number, phrase
from dfine.data.synthetic.ink import Rng, pick

Colour = tuple[int, int, int]
Picture = npt.NDArray[np.uint8]  # (height, width, 3)
Draw = ImageDraw.ImageDraw

PALETTES = (  # of charts and diagrams
    ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)),
    ((68, 114, 196), (237, 125, 49), (165, 165, 165), (255, 192, 0), (91, 155, 213), (112, 173, 71)),
    ((0, 0, 0), (90, 90, 90), (150, 150, 150), (200, 200, 200), (60, 60, 60), (120, 120, 120)),
    ((0, 0, 255), (255, 0, 0), (0, 160, 0), (255, 0, 255), (0, 180, 180), (0, 0, 0)),
    ((10, 60, 110), (60, 130, 180), (140, 190, 220), (190, 210, 230), (230, 140, 60), (90, 90, 100)),
    ((120, 20, 40), (200, 80, 60), (230, 160, 90), (240, 210, 160), (90, 110, 90), (40, 60, 60)),
)


def vivid(rng: Rng) -> Colour:
    """Draws a colour that stands out on white."""
    hue, saturation, value = int(rng.integers(180)), int(rng.integers(110, 256)), int(rng.integers(60, 200))
    r, g, b = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return r, g, b


def pale(rng: Rng, strength: float = 0.15) -> Colour:
    """Draws a light tint."""
    r, g, b = (int(255 - strength * (255 - c)) for c in vivid(rng))
    return r, g, b


def noise(rng: Rng, wide: int, high: int, coarse: int, channels: int = 1) -> npt.NDArray[np.float32]:
    """Draws smooth noise from 0 to 1 with structures of about a `coarse`-th of the picture."""
    small = rng.random((coarse + 1, max(2, coarse * wide // max(1, high) + 1), channels)).astype(np.float32)
    large = cv2.resize(small, (wide, high), interpolation=cv2.INTER_CUBIC)
    return np.asarray(large, np.float32).reshape(high, wide, channels)


def photo(rng: Rng, wide: int, high: int) -> Picture:
    """Draws something like a photograph: light and colour at several scales, things in front, a grain."""
    low, top = (
        np.array(vivid(rng), np.float32) * rng.uniform(0.1, 0.8),
        np.array(pale(rng, rng.uniform(0.1, 0.9)), np.float32),
    )
    light = 0.6 * noise(rng, wide, high, int(rng.integers(1, 4))) + 0.3 * noise(
        rng, wide, high, int(rng.integers(4, 12))
    )
    light += 0.15 * noise(rng, wide, high, 30)
    if rng.random() < 0.5:  # a sky
        light += np.linspace(0.5, -0.4, high, dtype=np.float32)[:, None, None]
    tint = noise(rng, wide, high, 2, 3) * rng.uniform(20, 120)
    image = np.clip(low + (top - low) * light + tint - 40, 0, 255).astype(np.uint8)
    texture = np.clip(tint + 160 * (noise(rng, wide, high, 60) - 0.3), 0, 255).astype(np.uint8)
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
        image = cv2.GaussianBlur(image, (0, 0), pick(rng, (0.6, 1.0, 2.0, 4.0)))
    grain = rng.normal(0, rng.uniform(1, 9), (high, wide, 1)).astype(np.float32)
    shade = image + grain + 25 * (noise(rng, wide, high, 40) - 0.5)
    image = np.clip(shade, 0, 255).astype(np.uint8)
    return image if rng.random() < 0.8 else np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, 2)


def micrograph(rng: Rng, wide: int, high: int) -> Picture:
    """Draws bright spots, cells or bands on a dark ground, or tissue on a light one."""
    field, colour = (
        np.zeros((high, wide), np.float32),
        np.array(pick(rng, ((60, 255, 90), (255, 60, 60), (80, 110, 255), (255, 255, 255)))),
    )
    for _ in range(int(rng.integers(8, 90))):
        x, y, r = int(rng.integers(wide)), int(rng.integers(high)), max(1, int(rng.uniform(0.01, 0.09) * wide))
        cv2.ellipse(
            field,
            (x, y),
            (r, max(1, int(r * rng.uniform(0.4, 1)))),
            rng.uniform(0, 180),
            0,
            360,
            rng.uniform(0.3, 1),
            pick(rng, (-1, -1, 1)),
        )
    field = cv2.GaussianBlur(field, (0, 0), rng.uniform(0.6, 3))[:, :, None] + 0.2 * noise(rng, wide, high, 20)
    if rng.random() < 0.35:  # stained tissue, or a gel
        ground, ink = np.array(pick(rng, ((240, 215, 230), (225, 225, 225), (235, 225, 205)))), np.array(vivid(rng))
        return np.clip(ground + (ink - ground) * (0.8 * field + 0.3 * noise(rng, wide, high, 50)), 0, 255).astype(
            np.uint8
        )
    return np.clip(field * colour, 0, 255).astype(np.uint8)


def _label(draw: Draw, text: str, x: float, y: float, font: Font, fill: Any, anchor: str = "mm") -> None:
    draw.text((x, y), text, fill, face(font), anchor=anchor)


def chart(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws a chart with axes, labels, and often a legend, a title and a frame."""
    image = Image.new("RGB", (wide, high), paper)
    draw, palette, font = ImageDraw.Draw(image), pick(rng, PALETTES), Font(family, max(7.0, min(wide / 32, 11.0)))
    ink: Any = (0, 0, 0) if sum(paper) > 380 else (255, 255, 255)
    ink = pick(rng, (ink, ink, (110, 110, 110)))
    look = pick(rng, ["line", "line", "line", "scatter", "bar", "bar", "stack", "flat", "pie", "box", "heat", "area"])
    size, series = round(font.size), int(rng.integers(1, 6))
    left, right, top, low = 4 * size, wide - size, size, high - 3 * size
    if rng.random() < 0.35:
        _label(draw, phrase(rng, voice, 2, 5), wide / 2, size, font._replace(size=1.2 * font.size, bold=True), ink)
        top += 2 * size
    legend = pick(rng, ["none", "none", "right", "below", "inside"])
    names = [phrase(rng, voice, 1, 2)[:14] for _ in range(series)]
    if legend == "right" and wide > 220:
        right -= 8 * size
    elif legend == "below":
        low -= 2 * size
    across, up = max(20, right - left), max(20, low - top)
    right, low = left + across, top + up
    if look == "pie":
        shares = np.r_[0, np.cumsum(rng.dirichlet(np.ones(int(rng.integers(3, 8)))))] * 360
        r = min(across, up) / 2 - 2
        cx, cy = left + across / 2, top + up / 2
        squash = pick(rng, (1.0, 1.0, 0.6))
        for i, (a, b) in enumerate(pairwise(shares)):
            draw.pieslice((cx - r, cy - r * squash, cx + r, cy + r * squash), a, b + 1, palette[i % 6], paper)
            angle = np.radians((a + b) / 2)
            _label(
                draw,
                f"{(b - a) / 3.6:.0f}%",
                cx + 1.12 * r * np.cos(angle),
                cy + 1.1 * r * squash * np.sin(angle),
                font,
                ink,
            )
        if rng.random() < 0.3:
            draw.ellipse((cx - r / 2, cy - r / 2 * squash, cx + r / 2, cy + r / 2 * squash), paper)
    else:
        for share in np.linspace(0, 1, int(rng.integers(3, 7))) if rng.random() < 0.4 else ():
            draw.line((left, top + share * up, right, top + share * up), (200, 200, 200))
        count = int(rng.integers(3, 9)) if look in ("bar", "stack", "flat", "box") else int(rng.integers(5, 60))
        slot = across / count
        if look == "heat":
            cells = (
                rng.random((int(rng.integers(4, 30)), int(rng.integers(4, 40)))) ** pick(rng, (1, 2)) * 255
            ).astype(np.uint8)
            blown = cv2.resize(
                cells,
                (int(across), int(up)),
                interpolation=pick(rng, (cv2.INTER_NEAREST, cv2.INTER_NEAREST, cv2.INTER_CUBIC)),
            )
            heat = cv2.applyColorMap(
                blown, pick(rng, (cv2.COLORMAP_JET, cv2.COLORMAP_VIRIDIS, cv2.COLORMAP_HOT, cv2.COLORMAP_BONE))
            )
            image.paste(Image.fromarray(heat), (int(left), int(top)))
        base = np.zeros(count)
        for i in range(series if look not in ("heat", "flat") else look == "flat"):
            colour: Any = palette[i % 6]
            walk = (
                np.cumsum(rng.normal(size=count))
                if rng.random() < 0.6
                else np.exp(-np.linspace(0, rng.uniform(1, 5), count)) + rng.normal(0, 0.03, count)
            )
            ys = 0.08 + 0.8 * (walk - walk.min()) / (np.ptp(walk) + 1e-9) * rng.uniform(0.4, 1)
            xs = left + slot * (np.arange(count) + 0.5)
            points = list(zip(xs.tolist(), (low - ys * up).tolist(), strict=True))
            if look in ("line", "area"):
                if look == "area":
                    draw.polygon([(xs[0], low), *points, (xs[-1], low)], colour)
                draw.line(points, colour, width=pick(rng, (1, 1, 2, 3)))
                if rng.random() < 0.3:
                    for x, y in points:
                        draw.rectangle((x - 2, y - 2, x + 2, y + 2), colour)
            elif look == "scatter":
                r = pick(rng, (1, 2, 3))
                for x, y in zip(
                    rng.normal(0.5, 0.2, 40).clip(0, 1) * across + left,
                    low - rng.normal(0.5, 0.2, 40).clip(0, 1) * up,
                    strict=True,
                ):
                    draw.ellipse((x - r, y - r, x + r, y + r), colour)
            elif look == "flat":
                for j, y in enumerate(ys.tolist()):
                    at = top + (j + 0.5) * up / count
                    draw.rectangle((left, at - 0.3 * up / count, left + y * across, at + 0.3 * up / count), palette[0])
            elif look == "box":
                for x, y in points:
                    x, h = x - slot / 2 + (i + 0.5) * slot / series, rng.uniform(0.04, 0.15) * up
                    draw.line((x, max(top, y - 2 * h), x, min(low, y + 2 * h)), ink)
                    draw.rectangle(
                        (x - 0.3 * slot / series, max(top, y - h), x + 0.3 * slot / series, min(low, y + h)),
                        colour,
                        ink,
                    )
            else:
                ys = ys / (series if look == "stack" else 1)
                part = 0.7 * slot / (1 if look == "stack" else series)
                for j, y in enumerate(ys.tolist()):
                    x = left + slot * (j + 0.15) + (0 if look == "stack" else i * part)
                    draw.rectangle(
                        (x, low - (base[j] + y) * up, x + max(0, part - 1), low - base[j] * up),
                        colour,
                        pick(rng, (None, ink)),
                    )
                    if look == "bar" and series < 3:
                        draw.line((x + part / 2, low - y * up - size / 2, x + part / 2, low - y * up + size / 2), ink)
                base = base + ys * (look == "stack")
        draw.line((left, top, left, low, right, low), ink)
        if rng.random() < 0.4:
            draw.rectangle((left, top, right, low), None, ink)
        for share in np.linspace(0, 1, int(rng.integers(3, 7))):
            _label(draw, number(rng)[:6], left - 4, low - share * up, font, ink, "rm")
        for share in np.linspace(0.1, 0.9, int(rng.integers(2, max(3, across // (5 * size)) + 1))):
            text = number(rng)[:5] if rng.random() < 0.6 else phrase(rng, voice, 1, 1)[:8]
            _label(draw, text, left + share * across, low + 0.8 * size, font, ink)
        if rng.random() < 0.6:
            _label(draw, phrase(rng, voice, 1, 4), left + across / 2, low + 2.1 * size, font, ink)
    if legend != "none":
        for i, name in enumerate(names):
            x, y = {
                "right": (right + size, top + (1 + 1.5 * i) * size),
                "inside": (right - 9 * size, top + (1 + 1.5 * i) * size),
            }.get(legend, (left + i * across / series, high - size))
            draw.rectangle((x, y - 3, x + 6, y + 3), palette[i % 6])
            _label(draw, name, x + 10, y, font, ink, "lm")
    if rng.random() < 0.12:
        draw.rectangle((0, 0, wide - 1, high - 1), None, (150, 150, 150))
    return np.array(image)


def diagram(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws named boxes joined by arrows, in rows or as a tree."""
    image, palette, size = Image.new("RGB", (wide, high), paper), pick(rng, PALETTES), rng.uniform(7.5, 11)
    draw, font = ImageDraw.Draw(image), Font(family, size)
    filled, line, dark = rng.random() < 0.6, pick(rng, ((0, 0, 0), palette[0], (90, 90, 90))), sum(palette[0]) < 330
    rows, columns = max(1, int(high / rng.uniform(45, 90))), max(1, int(wide / rng.uniform(80, 150)))
    step_x, step_y, look = wide / columns, high / rows, pick(rng, ("rectangle", "rectangle", "round", "ellipse"))
    for row in range(rows):
        for column in range(columns):
            if rng.random() < 0.15 and rows * columns > 2:
                continue
            x, y = column * step_x + 2, row * step_y + 2
            box = (x, y, x + step_x * 0.72, y + step_y * 0.62)
            fill: Any = palette[(row if rng.random() < 0.8 else column) % 6] if filled else None
            if look == "ellipse":
                draw.ellipse(box, fill, line)
            else:
                draw.rounded_rectangle(box, 0 if look == "rectangle" else 6, fill, line)
            centre, middle, ink = (
                (box[0] + box[2]) / 2,
                (box[1] + box[3]) / 2,
                (255, 255, 255) if filled and dark else (0, 0, 0),
            )
            fits = max(3, int(step_x * 0.7 / (0.55 * size)))
            for k in range(2 if step_y > 45 and rng.random() < 0.6 else 1):
                _label(draw, phrase(rng, voice, 1, 3)[:fits], centre, middle + (k - 0.4) * size * 1.2, font, ink)
            if column < columns - 1 and rng.random() < 0.8:
                tip = (column + 1) * step_x
                draw.line((box[2], middle, tip, middle), line)
                draw.polygon((tip, middle, tip - 5, middle - 3, tip - 5, middle + 3), line)
            if row < rows - 1 and rng.random() < 0.5:
                draw.line((centre, box[3], centre, (row + 1) * step_y), line)
    return np.array(image)


def sketch(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws thin outlines with reference numbers, as patents, manuals and chemistry have them."""
    image = Image.new("RGB", (wide, high), paper)
    draw, ink, font = ImageDraw.Draw(image), (20, 20, 20), Font(family, rng.uniform(8, 12))
    hexagons = rng.random() < 0.4
    for _ in range(int(rng.integers(3, 14))):
        x, y = rng.uniform(0.15, 0.85, 2) * (wide, high)
        a, b = rng.uniform(0.04, 0.3, 2) * (wide, high)
        weight = pick(rng, (1, 1, 2))
        if hexagons:
            r = min(wide, high) * 0.1
            angles = np.radians(np.arange(0, 361, 60) + 30)
            draw.line([(x + r * np.cos(t), y + r * np.sin(t)) for t in angles], ink, weight)
            draw.line((x, y + r, x + r, y + 2 * r), ink, weight)
            _label(draw, pick(rng, ["OH", "CH3", "N", "R1", "O", "NH2"]), x + r, y + 2 * r + 5, font, ink)
            continue
        pick(rng, (draw.ellipse, draw.rectangle, draw.rectangle))(
            (x - a / 2, y - b / 2, x + a / 2, y + b / 2), None, ink, weight
        )
        end = (x + pick(rng, (-1, 1)) * 0.6 * a, y - 0.6 * b)
        draw.line((x, y, *end), ink)
        _label(draw, f"{rng.integers(1, 200)}", *end, font, ink, "ms")
    return np.array(image)


def chart_map(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws regions of different tints with borders, roads and names."""
    height = noise(rng, wide, high, int(rng.integers(3, 8)))[:, :, 0] + 0.2 * noise(rng, wide, high, 20)[:, :, 0]
    tints = np.array([pale(rng, rng.uniform(0.2, 0.7)) for _ in range(6)], np.uint8)
    levels = np.clip(height * 6, 0, 5).astype(int)
    picture = tints[levels]
    edge = (np.diff(levels, axis=0, prepend=0) != 0) | (np.diff(levels, axis=1, prepend=0) != 0)
    if rng.random() < 0.5:  # an island
        picture[levels == levels[0, 0]] = paper
    picture[edge] = (110, 110, 110)
    image = Image.fromarray(picture)
    draw, font = ImageDraw.Draw(image), Font(family, rng.uniform(7, 10))
    for _ in range(int(rng.integers(2, 10))):
        x, y = rng.uniform(0.1, 0.85, 2) * (wide, high)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), (200, 30, 30))
        _label(draw, phrase(rng, voice, 1, 1)[:10], x + 5, y, font, (0, 0, 0), "lm")
        draw.line((x, y, *(rng.uniform(0, 1, 2) * (wide, high))), (200, 120, 60))
    return np.array(image)


def screen(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws a window of a program: a bar, fields, buttons, lines of text."""
    back = pick(rng, ((255, 255, 255), (240, 240, 240), (20, 24, 32), (250, 250, 245)))
    image = Image.new("RGB", (wide, high), back)
    draw, font, bar = ImageDraw.Draw(image), Font(family, rng.uniform(7, 10)), vivid(rng)
    ink = (0, 0, 0) if sum(back) > 400 else (220, 220, 220)
    draw.rectangle((0, 0, wide - 1, high - 1), None, (120, 120, 120))
    if rng.random() < 0.7:
        draw.rectangle((0, 0, wide - 1, 14), bar)
        _label(draw, phrase(rng, voice, 2, 4), 6, 8, font, (255, 255, 255), "lm")
    y = 24.0
    while y < high - 12:
        x = 8 + pick(rng, (0, 0, 12, 24))
        _label(draw, phrase(rng, voice, 1, max(1, wide // 70)), x, y, font, ink, "lm")
        if rng.random() < 0.2:
            draw.rectangle((wide * 0.6, y - 5, wide * 0.9, y + 5), pick(rng, (None, (225, 230, 240))), (130, 130, 130))
        y += font.size * rng.uniform(1.2, 2)
    return np.array(image)


def logo(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws a sign in one or two colours, mostly with a name beside or below it."""
    image = Image.new("RGB", (wide, high), paper)
    draw, colour, other = ImageDraw.Draw(image), vivid(rng), vivid(rng)
    side = min(high, wide) - 1
    look = rng.random()
    if look < 0.25:
        draw.ellipse((0, 0, side, side), colour)
        draw.ellipse((0.3 * side, 0.3 * side, 0.8 * side, 0.8 * side), other)
    elif look < 0.5:
        for i in range(3):
            draw.polygon(
                (
                    i * side / 3,
                    side,
                    (i + 1) * side / 3,
                    side,
                    (i + 1.5) * side / 3,
                    0.2 * side * i,
                    (i + 0.5) * side / 3,
                    0.2 * side * i,
                ),
                pick(rng, (colour, other)),
            )
    elif look < 0.75:
        draw.rounded_rectangle((0, 0, side, side), side / 6, colour)
        _label(
            draw, phrase(rng, voice, 1, 1)[0], side / 2, side / 2, Font(family, 0.7 * side, bold=True), (255, 255, 255)
        )
    else:
        draw.polygon((side / 2, 0, side, side, 0, side), colour)
        draw.line((0, side / 2, side, side / 2), other, 3)
    if wide > 1.4 * side:
        size = min(0.55 * side, (wide - side) / 4.5)
        draw.text(
            (1.1 * side, side / 2),
            phrase(rng, voice, 1, 1, pick(rng, ("upper", "first")))[:8],
            pick(rng, (colour, (0, 0, 0) if sum(paper) > 380 else (255, 255, 255))),
            face(Font(family, size, bold=True)),
            anchor="lm",
        )
    return np.array(image)


def panels(rng: Rng, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws several pictures in rows, mostly with letters, as papers do."""
    picture = np.full((high, wide, 3), paper, np.uint8)
    rows, columns = max(1, min(int(rng.integers(1, 4)), high // 70)), max(1, min(int(rng.integers(2, 5)), wide // 80))
    gap, mixed, dark = pick(rng, (2, 6, 12)), rng.random() < 0.4, rng.random() < 0.5
    step_x, step_y = wide // columns, high // rows
    image = None
    for i in range(rows * columns):
        w, h = step_x - gap, step_y - gap
        as_photo = rng.random() < 0.5 if mixed else dark
        part = (
            pick(rng, (micrograph, micrograph, photo))(rng, w, h)
            if as_photo
            else chart(rng, w, h, paper, voice, family)
        )
        x, y = i % columns * step_x, i // columns * step_y
        picture[y : y + h, x : x + w] = part
    image = Image.fromarray(picture)
    draw, font, case = (
        ImageDraw.Draw(image),
        Font(family, 11.0, bold=True),
        pick(rng, ("ABCDEFGHIJKLM", "abcdefghijklm", " " * 13)),
    )
    for i in range(rows * columns):
        x, y = i % columns * step_x + 2, i // columns * step_y + 1
        shade = float(np.asarray(image.getpixel((x + 4, min(high - 1, y + 6)))).mean())
        _label(draw, case[i], x, y, font, (255, 255, 255) if shade < 128 else (0, 0, 0), "la")
    return np.array(image)


DRAWN: dict[str, Callable[[Rng, int, int, Colour, Voice, str], Picture]] = {
    "chart": chart,
    "diagram": diagram,
    "sketch": sketch,
    "map": chart_map,
    "screen": screen,
    "logo": logo,
    "panels": panels,
}


def picture(rng: Rng, look: str, wide: int, high: int, paper: Colour, voice: Voice, family: str) -> Picture:
    """Draws a picture of a kind: photo, micrograph or one of `DRAWN`."""
    if look == "photo":
        return photo(rng, wide, high)
    if look == "micrograph":
        return micrograph(rng, wide, high)
    return DRAWN[look](rng, wide, high, paper, voice, family)
