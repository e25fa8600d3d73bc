"""What stands on the drawn documents: each writer draws what comes next into a column, as labelled patches."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dfine.data.synthetic.documents import text
from dfine.data.synthetic.documents.pictures import WHITE, Colour, Picture, letters_on, picture
from dfine.data.synthetic.documents.text import LOOKS, Font, number, phrase, prose, raised, set_text, word, words
from dfine.data.synthetic.ink import FAINT, Ink, Rng, paste, pick, visible


class Style(NamedTuple):
    """The typography of a page; lengths in pixels."""

    voice: text.Voice
    font: Font
    head: Font
    mono: Font
    small: Font  # of captions and notes
    pitch: float  # from one baseline to the next
    align: str
    indent: int  # of a paragraph's first line
    gap: int  # between paragraphs
    numbered: bool
    ink: Colour
    accent: Colour  # of headings, bars and marks
    paper: Colour
    look: dict[str, str]  # how headings, lists, captions and tables look on this page


class Patch(NamedTuple):
    """Something to put on the page at (x, y): ink of one colour, or an opaque picture. No label, no box."""

    label: str
    ink: Ink | None
    colour: Colour | Picture
    x: int = 0
    y: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        shape = self.ink.shape if self.ink is not None else np.shape(self.colour)
        return int(shape[0]), int(shape[1])


class Group(NamedTuple):
    """Patches that stay together; `high` rows of the column, and `gap` rows to what is above."""

    patches: list[Patch]
    high: int
    gap: int = 0


def text_patch(label: str, ink: Ink, colour: Colour, x: int = 0, y: int = 0) -> Patch:
    """Crops ink that was drawn with its top left corner at (x, y)."""
    if ink.max(initial=0) < FAINT:
        return Patch("", ink[:1, :1], colour, x, y)
    rows, columns = visible(ink)
    return Patch(label, ink[rows, columns], colour, x + columns.start, y + rows.start)


def picture_patch(label: str, image: Picture, paper: Colour) -> Patch:
    """Crops an opaque picture to what differs from the paper."""
    seen = (np.abs(image.astype(np.int16) - np.array(paper, np.int16)).max(axis=2) > 12).astype(np.uint8) * 255
    if not seen.any():
        seen[:] = 255
    rows, columns = visible(seen)
    return Patch(label, None, image[rows, columns], columns.start, rows.start)


def plate(wide: int, high: int, colour: Colour, x: int = 0, y: int = 0) -> Patch:
    """A rule, a bar or a ground: a rectangle without a label."""
    return Patch("", None, np.full((high, wide, 3), colour, np.uint8), x, y)


def text_group(label: str, ink: Ink, colour: Colour, gap: int = 0, x: int = 0) -> Group:
    """A group of one text."""
    return Group([text_patch(label, ink, colour, x)], ink.shape[0], gap)


def moved(group: Group, x: int, y: int) -> list[Patch]:
    """The patches of a group, shifted."""
    return [patch._replace(x=patch.x + x, y=patch.y + y) for patch in group.patches]


def below(groups: Sequence[Group]) -> Group:
    """Stacks groups with their gaps."""
    patches, y = [], -groups[0].gap
    for group in groups:
        patches += moved(group, 0, y + group.gap)
        y += group.gap + group.high
    return Group(patches, y, groups[0].gap)


def blend(image: Picture, ink: Ink, colour: Colour, x: int, y: int) -> None:
    """Puts ink of a colour on a picture; what sticks out right or below is lost."""
    part = image[y : y + ink.shape[0], x : x + ink.shape[1]]
    ink = ink[: part.shape[0], : part.shape[1]]
    share = ink[:, :, None].astype(np.uint16)
    part[:] = ((255 - share) * part + share * np.array(colour, np.uint16) + 127) // 255


def mixed(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with a share of another one."""
    r, g, b = (round(a + share * (b - a)) for a, b in zip(colour, other, strict=True))
    return r, g, b


def on_ground(s: Style, ground: Colour) -> Style:
    """The style of text on a ground of another colour: white on a dark one."""
    ink: Colour = WHITE if sum(ground) < 380 else (20, 20, 20)
    far = abs(sum(ground) - sum(s.accent)) > 200
    look = {**s.look, "heading": "colour"}
    return s._replace(paper=ground, ink=ink, accent=s.accent if far else ink, align="left", look=look)


def runs(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Weights as probabilities."""
    weights = np.asarray(values, np.float64)
    return weights / weights.sum()


def some_prose(rng: Rng, s: Style, font: Font, width: float, lines: float, most: float = inf) -> list[Ink]:
    """Returns prose for about so many lines, of at most so many words."""
    return prose(rng, s.voice, min(most, max(1.0, lines * width / (3.1 * font.size))), font)


def set_prose(
    rng: Rng, s: Style, width: int, lines: float, font: Font, label: str = "Text", align: str = "", x: int = 0
) -> Group:
    """Sets prose of about so many lines, from x on."""
    inks = some_prose(rng, s, font, width - x, lines)
    ink = set_text(inks, width - x, round(s.pitch * font.size / s.font.size), align or s.align)
    return text_group(label, ink, s.ink, s.gap, x)


def paragraph(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a paragraph, cut where the column ends as if it went on in the next."""
    most = int(room // s.pitch)
    if most < 1:
        return None
    lengths = ((0.3, 2), (2, 7), (3, 9), (6, 16), (10, 34), (5, 12))
    length = rng.uniform(*pick(rng, lengths[1:] if s.look["pictures"] == "paper" and rng.random() < 0.7 else lengths))
    inks = some_prose(rng, s, s.font, width, length)
    if (s.look["lead"] == "bold" and rng.random() < 0.3) or rng.random() < 0.03:
        cut = s.font._replace(bold=rng.random() < 0.6, italic=rng.random() < 0.5)
        inks = words(phrase(rng, s.voice, 1, 4) + pick(rng, (".", ":", " –")), cut) + inks
    label = "Text"
    if s.look["lead"] == "clauses" and rng.random() < 0.6:
        label, inks = "List-item", [word(f"({rng.integers(1, 12)})", s.font), *inks]
    ink = set_text(inks, width, round(s.pitch), s.align, s.indent, most=most)
    return text_group(label, ink, s.ink if rng.random() < 0.97 else s.accent, s.gap)


def heading(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a section header, unless too few lines of text would fit below it."""
    if room < 5 * s.pitch:
        return None
    level, look = int(rng.integers(3)), s.look["heading"]
    font = s.head._replace(size=max(s.font.size, s.head.size - level * (s.head.size - s.font.size) / 2.5))
    if level == 2 and look != "bar":
        font = font._replace(italic=rng.random() < 0.5, bold=rng.random() < 0.7)
    case = "upper" if look == "upper" and level < 2 else pick(rng, ("first", "first", "title"))
    name = phrase(rng, s.voice, 1, 6, case)
    if s.numbered:
        part, roman = ".".join(str(rng.integers(1, 9)) for _ in range(level + 1)), pick(rng, ("I", "II", "IV", "V"))
        name = pick(rng, (f"{part} ", f"{part}. ", f"{part}  ", f"{roman}. ")) + name
    elif rng.random() < 0.06:
        name = pick(rng, LOOKS["sections"]).format(rng.integers(1, 30)) + name
    barred = look in ("bar", "tint") and level == 0
    pad = round(0.4 * font.size) if barred else 0
    fits = (max(40, width) if barred else width) - 2 * pad
    align = "center" if look == "centre" and level < 2 else "left"
    accented = look in ("colour", "tint", "rule", "upper") or (level == 1 and rng.random() < 0.2)
    colour = s.accent if accented else s.ink
    ink = set_text(words(name, font), fits, round(1.25 * font.size), align)
    patches, high = [], ink.shape[0] + pad
    if barred:
        patches.append(plate(width, high, s.accent if look == "bar" else mixed(s.accent, s.paper, 0.85)))
        colour = letters_on(s.accent, 460) if look == "bar" else colour
    patches.append(text_patch("Section-header", ink, colour, pad, pad // 2))
    if look == "rule" and level == 0:
        patches.append(plate(width, pick(rng, (1, 1, 2, 3)), colour, 0, pick(rng, (0, high))))
        high += 4
    before = round(s.pitch * pick(rng, (0.4, 0.7, 1.0, 1.5))) + s.gap // 2
    return Group(patches, high + (round(0.4 * s.pitch) if barred or rng.random() < 0.3 else 0), before)


def mark_ink(kind: str, place: int, font: Font) -> Ink:
    """Draws the mark of a list item into a line of its font."""
    sizes = {"dot": 0.36, "square": 0.4, "ring": 0.4, "dash": 0.55, "arrow": 0.55, "tick": 0.55}
    if kind not in sizes:
        letter, roman = "abcdefghijklmnopqrstuvwxyz"[(place - 1) % 26], ROMANS[(place - 1) % 10]
        return word(kind.format(n=place, a=letter, A=letter.upper(), i=roman), font)
    size = max(3, round(font.size * sizes[kind]))
    ink = np.zeros((round(1.6 * font.size), size), np.uint8)
    ys, xs = np.mgrid[:size, :size] - (size - 1) / 2
    r = np.hypot(ys, xs)
    shape = {
        "dot": r <= size / 2,
        "square": r >= 0,
        "ring": abs(r - size / 2 + 0.7) <= 0.7,
        "dash": abs(ys) < 0.8,
        "arrow": (abs(ys) + xs < size / 5) & (xs > -size / 2),
        "tick": abs(abs(xs + size / 5) - size / 3 - ys) < 1,
    }[kind]
    top = round(0.82 * font.size) - size // 2
    ink[top : top + size] = shape * np.uint8(255)
    return ink


ROMANS = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")


def items(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a list, each item with its mark a block; at times a few of a second level below one."""
    kind = s.look["marks"] if rng.random() < 0.6 else pick(rng, LOOKS["look"]["marks"])
    second, left = pick(rng, LOOKS["look"]["marks"]), round(s.font.size * pick(rng, (0, 0, 1, 2, 3)))
    counted = "{" in kind
    hang = round(s.font.size * float(pick(rng, (1.8, 2.2, 3.0)) if counted else pick(rng, (1.2, 1.6, 2.0, 2.5))))
    gap, length = pick(rng, (0, 0, round(0.3 * s.pitch), s.gap, s.gap)), pick(rng, (0.5, 0.9, 1.6, 3.0))
    short = rng.random() < (0.1 if s.look["pictures"] == "paper" else 0.35)
    colour = pick(rng, (s.ink, s.ink, s.accent))
    colour = colour if short and not counted else s.ink
    wrap = hang if rng.random() < 0.85 else 0
    groups: list[Group] = []
    used, place = 0, pick(rng, (1, 1, 1, int(rng.integers(1, 20))))
    for _ in range(pick(rng, (1, 2, 3, 3, 4, 5, 6, 9))):
        inner = bool(groups) and rng.random() < 0.25
        x = left + hang * inner
        place += not inner
        inks = some_prose(rng, s, s.font, width - x, length * rng.uniform(0.3, 1.7), 6 if short else inf)
        ink = set_text(inks, width - x, round(s.pitch), s.align, hang, wrap).copy()
        mark = mark_ink(second if inner else kind, int(rng.integers(1, 6)) if inner else place, s.font)
        paste(ink, mark[: ink.shape[0], : max(2, hang - 3)], 0, 0)
        used += gap + ink.shape[0]
        if used > room:
            break
        groups.append(text_group("List-item", ink, colour, gap, x))
    if not groups:
        return None
    stacked = below(groups)
    return stacked._replace(gap=max(s.gap, gap), high=stacked.high + s.gap // 2)


def references(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws entries of a bibliography, each a list item."""
    font = s.small._replace(italic=False)
    kind, gap = pick(rng, ("[{}]", "{}.", "{}", "")), pick(rng, (0, 0, 2, 4))
    hang, groups, used = round(font.size * (2.4 if kind else 1.2)), [], 0
    first, count = int(rng.integers(1, 60)), int(rng.integers(3, 40))
    for i in range(first, first + count):
        inks = some_prose(rng, s, font, width - hang, rng.uniform(1, 3.5))
        for k in range(len(inks) // 2, len(inks), 5):
            inks[k] = word(pick(rng, s.voice.rare), font._replace(italic=True))
        ink = set_text(inks, width, round(1.25 * font.size), s.align, hang if kind else 0, hang).copy()
        if kind:
            paste(ink, word(kind.format(i), font), 0, 0)
        used += ink.shape[0] + gap
        if used > room:
            break
        groups.append(text_group("List-item", ink, s.ink, gap))
    return below(groups) if groups else None


def notes(rng: Rng, s: Style, width: int, count: int) -> Group:
    """Draws footnotes, mostly with raised marks and a rule above."""
    font, groups = s.small._replace(size=max(6.0, 0.92 * s.small.size), italic=False), []
    kind, first = pick(rng, ("raised", "raised", "plain", "star")), int(rng.integers(1, 40))
    for i in range(count):
        mark = "*" * (i + 1) if kind == "star" else str(first + i)
        tag = raised(mark, font, 0.7, 0.35) if kind == "raised" else word(mark, font)
        inks = [tag, *some_prose(rng, s, font, width, rng.uniform(0.4, 3.2))]
        ink = set_text(inks, width, round(1.22 * font.size), s.align)
        groups.append(text_group("Footnote", ink, s.ink, pick(rng, (0, 0, 2))))
    if rng.random() < 0.7:
        groups.insert(0, Group([plate(int(width * pick(rng, (0.25, 0.4, 1.0))), 1, s.ink)], 4))
    return below(groups)


def caption(rng: Rng, s: Style, width: int, name: str) -> Group:
    """Draws the caption of a picture or a table."""
    font, inks = s.small, []
    if rng.random() < 0.85:
        shown = {"upper": name.upper(), "short": name[:3] + "."}.get(s.look["name"], name)
        form = pick(rng, ("{} {}", "{} {}.{}", "{} {}", "{} A{}"))
        shown = form.format(shown, rng.integers(1, 20), rng.integers(1, 9)) + pick(rng, (".", ":", "", " –"))
        inks = words(shown, font._replace(bold=s.look["caption"] != "plain"))
    length = pick(rng, (0.4, 0.8, 1.5, 3.0, 6.0))
    inks += some_prose(rng, s, font, width, length * rng.uniform(0.6, 1.3))
    short = sum(ink.shape[1] + 3 for ink in inks) < width
    align = pick(rng, ("left", "center", "center") if short else (s.align, s.align, "center"))
    ink = set_text(inks, width, round(1.25 * font.size), align)
    return text_group("Caption", ink, s.accent if s.look["caption"] == "colour" else s.ink)


def draw_picture(rng: Rng, s: Style, wide: int, high: int) -> Patch:
    """Draws a picture as they are on this kind of page."""
    chances: dict[str, float] = LOOKS["pictures"][s.look["pictures"]]
    look = str(rng.choice(list(chances), p=runs(list(chances.values()))))
    family = pick(rng, (s.font.family, s.head.family))
    image = picture(rng, look, max(24, wide), max(24, high), s.paper, s.voice, family)
    return picture_patch("Picture", image, s.paper)


def figure(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a picture, mostly with a caption below, above or beside it."""
    wide = round(width * pick(rng, (1.0, 1.0, 1.0, 0.9, 0.75, 0.6)))
    high = min(round(wide * rng.uniform(0.3, 1.1)), round(0.85 * room))
    place = pick(rng, ("below", "below", "below", "below", "above", "none", "beside"))
    if high < 45:
        return None
    gap = round(s.pitch * rng.uniform(0.5, 1.2))
    if place == "beside" and width > 260:
        wide = round(width * rng.uniform(0.4, 0.66))
        note = caption(rng, s, width - wide - 12, "Figure")
        shot = draw_picture(rng, s, wide, max(min(high, wide), note.high))
        x, note_x = (width - wide, 0) if rng.random() < 0.4 else (0, wide + 12)
        free = shot.size[0] - note.high
        patches = [shot._replace(x=shot.x + x), *moved(note, note_x, pick(rng, (0, free)) if free > 0 else 0)]
        return Group(patches, max(shot.y + shot.size[0], note.high), gap)
    shot = draw_picture(rng, s, wide, high)
    body = Group([shot._replace(x=shot.x + (width - wide) // 2, y=0)], shot.size[0], gap)
    if place == "none":
        return body
    note = caption(rng, s, width if rng.random() < 0.7 else wide, "Figure")
    space = round(s.pitch * pick(rng, (0.2, 0.4, 0.8)))
    group = below(with_caption(body, note, place, space))
    return group._replace(high=group.high + gap) if group.high <= room else None


def with_caption(body: Group, note: Group, place: str, space: int) -> list[Group]:
    """A picture or a table with its caption above or below it, if anywhere."""
    if place == "none":
        return [body]
    if place == "above":
        return [note._replace(gap=body.gap), body._replace(gap=space)]
    return [body, note._replace(gap=space)]


def tabular(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a table, mostly with a caption above or below it, at times with notes below."""
    if room < 6 * s.pitch:
        return None
    wide = round(width * pick(rng, (1.0, 1.0, 1.0, 0.85, 0.65)))
    gap, note = round(s.pitch * rng.uniform(0.5, 1.3)), caption(rng, s, width if rng.random() < 0.7 else wide, "Table")
    place = pick(rng, ("above", "above", "above", "below", "none", "none"))
    free = room - gap - (note.high + 14 if place != "none" else 0)
    if free < 4 * s.pitch:
        return None
    form = s.look["pictures"] != "paper" and pick(rng, (False,) * 12 + (True,))
    patch = picture_patch("Table", (form_picture if form else table_picture)(rng, s, wide, int(free)), s.paper)
    centred = s.look["heading"] == "centre" or rng.random() < 0.4
    body = Group([patch._replace(x=patch.x + (width - wide) // 2 * centred, y=0)], patch.size[0], gap)
    order = with_caption(body, note, place, round(s.pitch * pick(rng, (0.2, 0.4, 0.7))))
    if rng.random() < 0.3:
        small = s._replace(small=s.small._replace(size=max(6.0, 0.9 * s.small.size)))
        under = notes(rng, small, wide, int(rng.integers(1, 4)))
        under = under._replace(patches=[p for p in under.patches if p.label])
        if below([*order, under]).high < room:
            order.append(under._replace(gap=3))
    group = below(order)
    return group._replace(high=group.high + gap // 2) if group.high <= room else None


class Column(NamedTuple):
    """A column of a table: what its cells hold, where it lies, and how its numbers look and how large they are."""

    kind: str
    left: int
    right: int
    align: str
    form: str
    scale: float


def draw_columns(rng: Rng, font: Font, width: int) -> tuple[list[Column], int, int]:
    """Draws the columns of a table, the number of its rows and that of its heads."""
    most = max(2, min(11, width // round(4.5 * font.size)))
    wordy = rng.random() < 0.35
    count = min(most, int(rng.integers(2, 5 if wordy else 10)))
    usual = ("prose", "prose", "name", "short") if wordy else ("number", "number", "number", "short", "mark")
    kinds = [pick(rng, usual) for _ in range(count)]
    kinds[0] = pick(rng, ("name", "name", "name", "short", "number"))
    weights = [{"prose": 3.0, "name": 2.2, "short": 1.2, "mark": 0.7}.get(kind, 1.0) for kind in kinds]
    edges = np.r_[0, np.cumsum(runs(weights) * width)].astype(int).tolist()
    rows = int(pick(rng, (rng.integers(2, 7), rng.integers(5, 16), rng.integers(10, 45))))
    heads = pick(rng, (1, 1, 1, 2, 0))
    forms = [pick(rng, LOOKS["cells"]) for _ in kinds]
    scales = [10 ** rng.uniform(0.3, 4.5) for _ in kinds]
    wide, narrow = ("left", "left", "center"), ("right", "center", "center")
    aligns = [pick(rng, narrow if kind in ("number", "mark") else wide) for kind in kinds]
    aligns[0] = "left" if kinds[0] == "name" else aligns[0]
    return [Column(*of) for of in zip(kinds, edges[:-1], edges[1:], aligns, forms, scales, strict=True)], rows, heads


def cell_text(rng: Rng, s: Style, column: Column, money: bool) -> str:
    """Makes up what stands in a cell of a column."""
    if column.kind == "prose":
        return phrase(rng, s.voice, 2, pick(rng, (4, 10, 25, 60)))
    if column.kind == "name":
        return phrase(rng, s.voice, 1, pick(rng, (2, 4, 7)))
    if column.kind == "short":
        return phrase(rng, s.voice, 1, 1) if rng.random() < 0.6 else number(rng)
    if column.kind == "mark":
        return pick(rng, ("–", "x", "+", "yes", "no", "n/a", "*"))
    value = column.scale * float(rng.lognormal(0, 0.5))
    return "$ " * money + column.form.format(value, value / 9)


def table_picture(rng: Rng, s: Style, width: int, room: int) -> Picture:
    """Draws a table that fits: kinds of columns, wrapped cells, heads of several rows, rules, stripes, totals."""
    font = s.small._replace(italic=False, size=s.small.size * pick(rng, (1.0, 1.0, 0.9, 1.1)))
    pitch, pad = round(1.25 * font.size), pick(rng, (1, 2, 3, 5, 8))
    look = s.look["table"] if rng.random() < 0.6 else pick(rng, LOOKS["look"]["table"])
    columns, rows, heads = draw_columns(rng, font, width)
    rows += heads
    money, grouped, total = rng.random() < 0.15, rng.random() < 0.25, rng.random() < 0.3
    empty, line = pick(rng, (0, 0, 0.08, 0.3)), pick(rng, (s.ink, s.ink, (150, 150, 150), s.accent))
    fills = {"headbar": s.accent, "shade": mixed(s.accent, s.paper, 0.8), "stripes": pick(rng, (None, s.accent))}
    head_fill, tint = fills.get(look), mixed(s.accent, s.paper, rng.uniform(0.82, 0.93))
    head_ink = WHITE if head_fill and sum(head_fill) < 430 else s.ink
    image = np.full((room + 2, width, 3), s.paper, np.uint8)
    y, rules, head_rule = 1, [0], 0
    for row in range(rows):
        is_head, pair = row < heads, heads == 2 and row == 0  # the upper of two heads stands over pairs of columns
        title = grouped and not is_head and rng.random() < 0.15
        bold = title or (s.look["caption"] != "plain" if is_head else total and row == rows - 1)
        cells: list[tuple[Ink, int]] = []
        for i, column in enumerate(columns):
            if (title and i) or rng.random() < empty * (i > 0 and not is_head) or (pair and i and i % 2 == 0):
                continue
            if pair and i:
                column = column._replace(right=columns[min(i + 1, len(columns) - 1)].right, align="center")
            elif pair:
                column = column._replace(align="left")
            if not (is_head or title):
                content = cell_text(rng, s, column, money and row in (heads, rows - 1))
            else:
                content = phrase(rng, s.voice, 1, 2 + 2 * title) if i or title or rng.random() < 0.6 else ""
            if content:
                fits = column.right - column.left - 2 * min(pad, 4) - 1
                inks = [ink[:, : max(4, fits)] for ink in words(content, font._replace(bold=bold))]
                cells.append((set_text(inks, max(8, fits), pitch, column.align, most=8), column.left + min(pad, 4)))
        high = max([pitch, *(cell.shape[0] for cell, _ in cells)]) + 2 * pad
        if y + high > room:
            break
        tinted = (look == "stripes" and row % 2) or (title and look == "shade")
        if fill := head_fill if is_head else tint if tinted else None:
            image[y : y + high] = fill
        for cell, x in cells:
            blend(image, cell, head_ink if is_head else s.ink, x, y + pad)
        y += high
        rules.append(y - 1)
        head_rule = y - 1 if is_head else head_rule
    image = image[: y + 1]
    across = {"grid": rules, "rows": rules, "shade": [head_rule, y], "headbar": [y], "open": [head_rule]}
    image[across.get(look, [0, head_rule, y] if look in ("book", "box") else [])] = line
    if look == "book" and rng.random() < 0.4:
        image[:2] = line
    if look in ("grid", "box"):
        image[:, [0, width - 1, *(column.left for column in columns if look == "grid")]] = line
    return image


def form_picture(rng: Rng, s: Style, width: int, room: int) -> Picture:
    """Draws a form: a grid of boxes with small names, some filled in, some with squares to tick."""
    font, filled = s.small._replace(size=max(6.5, 0.8 * s.small.size), italic=False), 0.7 * rng.random()
    image, y, line = np.full((room + 2, width, 3), s.paper, np.uint8), 0, pick(rng, (s.ink, (120, 120, 120), s.accent))

    def write(name: str, font: Font, x: int, y: int, wide: int = width) -> None:
        blend(image, word(name, font)[:, : max(2, wide)], s.ink, x, y)

    for _ in range(int(rng.integers(3, 14))):
        high = round(font.size * rng.uniform(2, 4.5))
        if y + high > room:
            break
        cells = int(rng.integers(1, 5))
        edges = np.r_[0, np.sort(rng.uniform(0.15, 0.85, cells - 1)) * width, width - 1].astype(int).tolist()
        low = y + high
        if rng.random() < 0.12:
            image[y:low] = mixed(s.accent, s.paper, 0.8)
        for left, right in pairwise(edges):
            write(phrase(rng, s.voice, 1, 3), font, left + 4, y + 1, right - left - 6)
            if rng.random() < filled:
                write(phrase(rng, s.voice, 1, 2), s.font, left + 8, y + round(1.3 * font.size), right - left - 10)
            elif rng.random() < 0.3:
                for x in range(left + 6, right - 50, 60):
                    image[low - 10 : low - 2, x : x + 8] = s.ink
                    image[low - 9 : low - 3, x + 1 : x + 7] = s.paper
                    write(pick(rng, ("yes", "no", "other")), font, x + 12, low - round(1.5 * font.size))
            image[y:low, left] = line
        image[y:low, -1] = line
        image[[y, min(low, room)]] = line
        y = low
    return image[: y + 1]


def contents(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a table of contents: names, leaders and page numbers."""
    leaders, numbered = pick(rng, (".", ". ", "", " .")), rng.random() < 0.6
    spread, place = s.pitch * pick(rng, (1.0, 1.3, 1.7)), 1
    rows = min(int(rng.integers(6, 45)), int(room / spread))
    if rows < 4:
        return None
    ink = np.zeros((round(rows * spread + s.pitch), width), np.uint8)
    for row in range(rows):
        level, place, y = pick(rng, (0, 0, 1, 1, 2)), place + int(rng.integers(0, 9)), round(row * spread)
        font = s.font._replace(bold=level == 0 and s.look["caption"] != "plain")
        name = word((f"{row + 1}. " if numbered else "") + phrase(rng, s.voice, 1, 7), font)[:, : round(0.8 * width)]
        page, x = word(str(place), font), round(level * 1.5 * s.font.size)
        paste(ink, name, x, y)
        paste(ink, page, width - page.shape[1], y)
        free = width - page.shape[1] - x - name.shape[1] - 12
        if leaders and free > 10:
            dots = word(leaders * 200, font._replace(bold=False))[:, -free:]
            paste(ink, dots, x + name.shape[1] + 6, y)
    return text_group("Table", ink, s.ink, s.gap)


def formula(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a displayed formula of one to three lines, mostly with its number, which belongs to its box."""
    size = s.font.size * rng.uniform(1.0, 1.2)
    plain = Font("STIX", size) if "STIX" in text.families() else s.font
    rows, step = pick(rng, (1, 1, 1, 2, 3)), round(3.4 * size)
    if step * rows > room:
        return None
    ink = np.zeros((step * rows, width), np.uint8)
    start, goal = round(width * rng.uniform(0.02, 0.3)), width * rng.uniform(0.35, 0.85)
    for row in range(rows):
        axis, x = row * step + step // 2, start + row * round(size)
        for k in range(30):
            x = _term(rng, ink, x, axis, plain)
            if x > goal:
                break
            sign = pick(rng, "=+−=+≤·") if k else "="
            paste(ink, word(sign, plain), x + 3, axis - round(0.85 * size))
            x += round(1.1 * size) + 3
    if rng.random() < 0.65:
        tag = word(f"({rng.integers(1, 40)})", s.font)
        paste(ink, tag, width - tag.shape[1], step * rows // 2 - round(0.85 * size))
    return text_group("Formula", ink, s.ink, round(s.pitch * 0.2))


def _term(rng: Rng, ink: Ink, x: int, axis: int, plain: Font) -> int:
    """Writes a fraction, a sum, a root, a bracket or a variable with indices, and returns the next x."""
    size, look, rich = plain.size, rng.random(), plain.family == "STIX"
    italic = plain._replace(italic=True)
    small = italic._replace(size=0.7 * size)

    def put(content: str, x: int, rise: float, font: Font) -> int:
        drawn = word(content, font)
        paste(ink, drawn, x, max(0, round(axis - rise * size - 0.85 * font.size)))
        return x + int(drawn.shape[1]) + 1

    def product() -> str:
        return "".join(pick(rng, LOOKS["math"][0 if rich else 11 :]) for _ in range(int(rng.integers(1, 5))))

    if look < 0.25:
        above, under = product(), product()
        wides = [word(part, italic).shape[1] for part in (above, under)]
        wide = max(wides) + 4
        ink[axis, x : x + wide] = 255
        put(above, x + (wide - wides[0]) // 2, 0.75, italic)
        put(under, x + (wide - wides[1]) // 2, -0.85, italic)
        return x + wide + 2
    if look < 0.42:
        end = put(pick(rng, "∑∑∫∏" if rich else "S"), x, 0, plain._replace(size=1.7 * size))
        put("i=1", x, -1.3, small)
        put(pick(rng, "NnK"), x + 2, 1.2, small)
        return put(product(), end + 2, 0, italic)
    if look < 0.55:
        end = put(product(), put(pick(rng, "([|"), x, 0, plain), 0, italic)
        return put(pick(rng, ")]|"), end, 0, plain)
    if look < 0.62:
        end = put(pick(rng, ("exp", "log", "sin", "max", "Pr", "min")), x, 0, plain)
        return put(f"({product()})", end, 0, italic)
    end = put(product()[0], x, 0, italic)
    put(pick(rng, "2in*k"), end, 0.45, small)
    if rng.random() < 0.6:
        return put(pick(rng, ("i", "ij", "0", "max", "t")), end, -0.35, small)
    return end + round(0.5 * size)


def code(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws lines of a program, at times on a tint."""
    pitch = round(1.3 * s.mono.size)
    lines, level = min(int(rng.integers(3, 22)), (room - 10) // pitch), 0
    if lines < 2:
        return None
    ink = np.zeros((lines * pitch + pitch // 2, width - 12), np.uint8)
    for row in range(lines):
        level = max(0, level + int(rng.integers(-1, 2)))
        form = "  " * level + pick(rng, LOOKS["code"])
        drawn = word(form.format(*(pick(rng, s.voice.rare) for _ in range(3))), s.mono)
        paste(ink, drawn, round(level * 1.2 * s.mono.size), row * pitch)
    patches, high = [text_patch("Text", ink, s.ink, 6, 4)], ink.shape[0] + 8
    if rng.random() < 0.5:
        patches.insert(0, plate(width, high, mixed(s.ink, s.paper, rng.uniform(0.86, 0.95))))
    return Group(patches, high, s.gap)


def quote(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a quotation: inset, large, in colour or between rules."""
    font, own = s.font._replace(size=0.95 * s.font.size), s
    if rng.random() < 0.5:
        font, own = (
            s.head._replace(size=s.font.size * 1.5, bold=False, italic=True),
            s._replace(ink=s.accent, align="left"),
        )
    inset, gap = round(width * rng.uniform(0.04, 0.14)), round(0.8 * s.pitch)
    group = set_prose(rng, own, width - inset, rng.uniform(2, 6), font, x=inset)
    if group.high > room:
        return None
    if rng.random() < 0.4:
        wide, high = (3, group.high) if rng.random() < 0.5 else (width, 1)
        group.patches.append(plate(wide, high, s.accent, max(0, inset - 8)))
    return group._replace(high=group.high + gap, gap=gap)


def aside(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a tinted, framed or inverted box with a heading and text or a list in it."""
    if room < 12 * s.pitch or width < 110:
        return None
    inverted, pad, gap = rng.random() < 0.25, round(s.font.size), round(0.8 * s.pitch)
    back = s.accent if inverted else mixed(s.accent, s.paper, rng.uniform(0.78, 0.94))
    parts, left = [], min(room, round(s.pitch * rng.uniform(10, 26))) - 2 * pad
    others = rng.permutation(np.array([paragraph, paragraph, paragraph, items], object))
    for writer in (heading, *others[: int(rng.integers(1, 4))]):
        part = writer(rng, on_ground(s, back), width - 2 * pad, left)
        if part and part.high + part.gap <= left:
            parts.append(part)
            left -= part.high + part.gap
    if not parts:
        return None
    body = below(parts)
    ground = np.full((body.high + 2 * pad, width, 3), back, np.uint8)
    if not inverted and rng.random() < 0.4:
        ground[[0, -1]] = s.accent
        ground[:, [0, -1]] = s.accent
        if rng.random() < 0.5:
            ground[1:-1, 1:-1] = s.paper
    return Group([Patch("", None, ground), *moved(body, pad, pad)], ground.shape[0] + gap, gap)


def fields(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws lines of names and values, or names and rules to write on, each a text."""
    count, gap, tab = int(rng.integers(2, 8)), pick(rng, (0, 2, 5, 9)), round(width * rng.uniform(0.2, 0.45))
    blank, groups = rng.random() < 0.4, []
    for _ in range(count):
        name = word(phrase(rng, s.voice, 1, 3) + ":", s.font._replace(bold=rng.random() < 0.5))[:, : tab - 4]
        ink = np.zeros((name.shape[0], width), np.uint8)
        paste(ink, name, 0, 0)
        if blank:
            ink[round(1.3 * s.font.size), name.shape[1] + 4 : round(width * 0.9)] = 200
        else:
            paste(ink, word(pick(rng, (phrase(rng, s.voice, 1, 5), number(rng))), s.font), tab, 0)
        groups.append(text_group("Text", ink, s.ink, gap))
    group = below(groups)
    return group._replace(gap=s.gap) if group.high <= room else None


# What fills a column, in the order of the weights of the kinds of pages.
# fmt: off
WRITERS: dict[str, Callable[[Rng, Style, int, int], Group | None]] = {
    "text": paragraph, "heading": heading, "list": items, "figure": figure, "table": tabular, "formula": formula,
    "references": references, "contents": contents, "code": code, "quote": quote, "aside": aside, "fields": fields,
}
# fmt: on
