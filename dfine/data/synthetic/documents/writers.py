"""What stands on the drawn documents: each writer draws what comes next into a column, as labelled patches."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dfine.data.synthetic.documents.pictures import Colour, Picture, picture, vivid
from dfine.data.synthetic.documents.text import Font, Voice, families, number, phrase, prose, set_text, word
from dfine.data.synthetic.ink import FAINT, Ink, Rng, paste, pick, visible


class Style(NamedTuple):
    """The typography of a page; lengths in pixels."""

    voice: Voice
    font: Font
    head: Font
    mono: Font
    pitch: float  # from one baseline to the next
    align: str
    indent: int  # of a paragraph's first line
    gap: int  # between paragraphs
    numbered: bool
    ink: Colour
    accent: Colour  # of headings, bars and marks
    paper: Colour
    small: Font  # of captions and notes
    look: dict[str, str]  # how headings, lists, captions and tables look on this page


class Patch(NamedTuple):
    """Something to put on the page at (x, y): ink of one colour, or an opaque picture. No label, no box."""

    label: str
    ink: Ink | None
    colour: Colour | Picture
    x: int
    y: int

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


def picture_patch(label: str, image: Picture, paper: Colour, x: int = 0, y: int = 0) -> Patch:
    """Crops an opaque picture to what differs from the paper."""
    seen = (np.abs(image.astype(np.int16) - np.array(paper, np.int16)).max(axis=2) > 12).astype(np.uint8) * 255
    if not seen.any():
        seen[:] = 255
    rows, columns = visible(seen)
    return Patch(label, None, image[rows, columns], x + columns.start, y + rows.start)


def moved(group: Group, x: int, y: int) -> list[Patch]:
    """The patches of a group, shifted."""
    return [patch._replace(x=patch.x + x, y=patch.y + y) for patch in group.patches]


def below(groups: Sequence[Group]) -> Group:
    """Stacks groups with their gaps."""
    patches: list[Patch] = []
    y = 0
    for i, group in enumerate(groups):
        y += group.gap if i else 0
        patches += moved(group, 0, y)
        y += group.high
    return Group(patches, y, groups[0].gap)


def words_for(font: Font, width: float, lines: float) -> float:
    """About how many words fill so many lines."""
    return max(1.0, lines * width / (3.1 * font.size))


def text(
    rng: Rng, s: Style, width: int, lines: float, label: str = "Text", font: Font | None = None, **how: object
) -> Group:
    """Sets prose of about so many lines."""
    font = font or s.font
    pitch = round(s.pitch * font.size / s.font.size)
    options: dict[str, object] = {"align": s.align, "colour": s.ink, "x": 0, **how}
    colour, x = options.pop("colour"), options.pop("x")
    assert isinstance(x, int)
    ink = set_text(prose(rng, s.voice, words_for(font, width - x, lines), font), width - x, pitch, **options)  # type: ignore[arg-type]
    return Group([text_patch(label, ink, colour, x)], ink.shape[0], s.gap)  # type: ignore[arg-type]


def paragraph(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a paragraph, cut where the column ends as if it went on in the next."""
    most = int(room // s.pitch)
    if most < 1:
        return None
    lengths = ((0.3, 2), (2, 7), (3, 9), (6, 16), (10, 34), (5, 12))
    length = rng.uniform(*pick(rng, lengths[1:] if s.look["pictures"] == "paper" and rng.random() < 0.7 else lengths))
    inks = prose(rng, s.voice, words_for(s.font, width, length), s.font)
    if (s.look["lead"] == "bold" and rng.random() < 0.3) or rng.random() < 0.03:
        cut = s.font._replace(bold=rng.random() < 0.6, italic=rng.random() < 0.5)
        inks = [word(w, cut) for w in (phrase(rng, s.voice, 1, 4) + pick(rng, (".", ":", " –"))).split()] + inks
    label = "Text"
    if s.look["lead"] == "clauses" and rng.random() < 0.6:
        label, inks = "List-item", [word(f"({rng.integers(1, 12)})", s.font), *inks]
    ink = set_text(inks, width, round(s.pitch), s.align, s.indent, most=most)
    return Group([text_patch(label, ink, s.ink if rng.random() < 0.97 else s.accent)], ink.shape[0], s.gap)


def heading(rng: Rng, s: Style, width: int, room: int, level: int | None = None) -> Group | None:
    """Draws a section header, unless too few lines of text would fit below it."""
    if room < 5 * s.pitch:
        return None
    level = int(rng.integers(3)) if level is None else level
    look, font = (
        s.look["heading"],
        s.head._replace(size=max(s.font.size, s.head.size - level * (s.head.size - s.font.size) / 2.5)),
    )
    if level == 2 and look != "bar":
        font = font._replace(italic=rng.random() < 0.5, bold=rng.random() < 0.7)
    label = phrase(
        rng, s.voice, 1, 6, "upper" if look == "upper" and level < 2 else pick(rng, ("first", "first", "title"))
    )
    if s.numbered:
        part = ".".join(str(rng.integers(1, 9)) for _ in range(level + 1))
        label = pick(rng, (f"{part} ", f"{part}. ", f"{part}  ", f"{pick(rng, ('I', 'II', 'IV', 'V'))}. ")) + label
    elif rng.random() < 0.06:
        label = (
            pick(rng, ("§ {} ", "Article {} ", "Step {}: ", "Chapter {}. ", "({}) ", "SEC. {}. ")).format(
                rng.integers(1, 30)
            )
            + label
        )
    pitch = round(1.25 * font.size)
    bar = look in ("bar", "tint") and level == 0
    pad, fits = (round(0.4 * font.size), max(40, width)) if bar else (0, width)
    align = "center" if look == "centre" and level < 2 else "left"
    colour = s.accent if look in ("colour", "tint", "rule", "upper") or (level == 1 and rng.random() < 0.2) else s.ink
    inks = [word(w, font) for w in label.split()]
    ink = set_text(inks, fits - 2 * pad, pitch, align)
    patches = []
    if bar:
        back: Colour = s.accent if look == "bar" else _mixed(s.accent, s.paper, 0.85)
        colour = ((255, 255, 255) if sum(back) < 460 else (0, 0, 0)) if look == "bar" else colour
        patches.append(Patch("", None, np.full((ink.shape[0] + pad, width, 3), back, np.uint8), 0, 0))
    patches.append(text_patch("Section-header", ink, colour, pad, pad // 2))
    high = ink.shape[0] + pad
    if look == "rule" and level == 0:
        patches.append(
            Patch("", None, np.full((pick(rng, (1, 1, 2, 3)), width, 3), colour, np.uint8), 0, pick(rng, (0, high)))
        )
        high += 4
    before = round(s.pitch * pick(rng, (0.4, 0.7, 1.0, 1.5))) + s.gap // 2
    return Group(patches, high + (round(0.4 * s.pitch) if bar or rng.random() < 0.3 else 0), before)


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round(a + share * (b - a)) for a, b in zip(colour, other, strict=True))
    return r, g, b


def mark_ink(rng: Rng, kind: str, place: int, font: Font) -> Ink:
    """Draws the mark of a list item into a line of its font."""
    if kind in ["dot", "square", "ring", "dash", "arrow", "tick"]:
        size = max(3, round(font.size * {"dot": 0.36, "square": 0.4, "ring": 0.4}.get(kind, 0.55)))
        ink = np.zeros((round(1.6 * font.size), size), np.uint8)
        middle = round(0.82 * font.size)
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
        top = middle - size // 2
        ink[top : top + size] = shape * np.uint8(255)
        return ink
    letters = "abcdefghijklmnopqrstuvwxyz"
    romans = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"]
    return word(
        kind.format(
            n=place, a=letters[(place - 1) % 26], i=romans[(place - 1) % 10], A=letters[(place - 1) % 26].upper()
        ),
        font,
    )


# fmt: off
MARKS = (
    "dot", "dot", "dot", "dot", "square", "ring", "dash", "–", "arrow", "tick", "{n}.", "{n}.", "{n})", "({n})",
    "({a})", "{a})", "{a}.", "({i})", "{A}.", "[{n}]", "{n}",
)
# fmt: on


def items(rng: Rng, s: Style, width: int, room: int, nest: bool = True) -> Group | None:
    """Draws a list, each item with its mark a block; at times a few of a second level below one."""
    kind, second = s.look["marks"] if rng.random() < 0.6 else pick(rng, MARKS), pick(rng, MARKS)
    left = round(s.font.size * pick(rng, (0, 0, 1, 2, 3)))
    hang = round(
        s.font.size * float(pick(rng, (1.2, 1.6, 2.0, 2.5)) if "{" not in kind else pick(rng, (1.8, 2.2, 3.0)))
    )
    gap = pick(rng, (0, 0, round(0.3 * s.pitch), s.gap, s.gap))
    length, short, colour = (
        pick(rng, (0.5, 0.9, 1.6, 3.0)),
        rng.random() < (0.1 if s.look["pictures"] == "paper" else 0.35),
        pick(rng, (s.ink, s.ink, s.accent)),
    )
    wrap = hang if rng.random() < 0.85 else 0
    groups: list[Group] = []
    used, start, place = 0, pick(rng, (1, 1, 1, int(rng.integers(1, 20)))), 0
    for _ in range(pick(rng, (1, 2, 3, 3, 4, 5, 6, 9))):
        inner = nest and bool(groups) and rng.random() < 0.25
        x, marks = left + hang * inner, second if inner else kind
        place += not inner
        wide = width - x
        size = words_for(s.font, wide, length * rng.uniform(0.3, 1.7))
        ink = set_text(
            prose(rng, s.voice, min(size, 6) if short else size, s.font), wide, round(s.pitch), s.align, hang, wrap
        ).copy()
        mark = mark_ink(rng, marks, start + place if not inner else int(rng.integers(1, 6)), s.font)[: ink.shape[0]]
        paste(ink, mark[:, : max(2, hang - 3)], 0, 0)
        if used + gap + ink.shape[0] > room:
            break
        used += gap + ink.shape[0]
        groups.append(
            Group(
                [text_patch("List-item", ink, s.ink if "{" in kind else colour if short else s.ink, x)],
                ink.shape[0],
                gap,
            )
        )
    if not groups:
        return None
    stacked = below(groups)
    return stacked._replace(gap=max(s.gap, gap), high=stacked.high + s.gap // 2)


def references(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws entries of a bibliography, each a list item."""
    font = s.small._replace(italic=False)
    kind, gap = pick(rng, ("[{}]", "{}.", "{}", "")), pick(rng, (0, 0, 2, 4))
    hang, groups, used = round(font.size * (2.4 if kind else 1.2)), [], 0
    pitch, first, count = round(1.25 * font.size), int(rng.integers(1, 60)), int(rng.integers(3, 40))
    for i in range(count):
        inks = prose(rng, s.voice, words_for(font, width - hang, rng.uniform(1, 3.5)), font)
        inks[len(inks) // 2 :: 5] = [
            word(pick(rng, s.voice.rare), font._replace(italic=True)) for _ in inks[len(inks) // 2 :: 5]
        ]
        ink = set_text(inks, width, pitch, s.align, hang if kind else 0, hang).copy()
        if kind:
            paste(ink, word(kind.format(first + i), font), 0, 0)
        used += ink.shape[0] + gap
        if used > room:
            break
        groups.append(Group([text_patch("List-item", ink, s.ink)], ink.shape[0], gap))
    return below(groups) if groups else None


def notes(rng: Rng, s: Style, width: int, count: int) -> Group:
    """Draws footnotes, mostly with raised marks and a rule above."""
    font, groups = s.small._replace(size=max(6.0, 0.92 * s.small.size), italic=False), []
    kind, first, pitch = (
        pick(rng, ("raised", "raised", "plain", "star")),
        int(rng.integers(1, 40)),
        round(1.22 * font.size),
    )
    for i in range(count):
        label = {"star": "*" * (i + 1)}.get(kind, str(first + i))
        tag = (
            word(label, font._replace(size=0.7 * font.size), 0.35 * font.size, font.size)
            if kind == "raised"
            else word(label, font)
        )
        ink = set_text(
            [tag, *prose(rng, s.voice, words_for(font, width, rng.uniform(0.4, 3.2)), font)], width, pitch, s.align
        )
        groups.append(Group([text_patch("Footnote", ink, s.ink)], ink.shape[0], pick(rng, (0, 0, 2))))
    if rng.random() < 0.7:
        rule = np.full((1, int(width * pick(rng, (0.25, 0.4, 1.0))), 3), s.ink, np.uint8)
        groups.insert(0, Group([Patch("", None, rule, 0, 0)], 4))
    return below(groups)


def caption(rng: Rng, s: Style, width: int, name: str) -> Group:
    """Draws the caption of a picture or a table."""
    font, lead = s.small, s.small._replace(bold=s.look["caption"] != "plain", italic=s.small.italic)
    inks = []
    if rng.random() < 0.85:
        shown = {"upper": name.upper(), "short": name[:3] + "."}.get(s.look["name"], name)
        inks = [
            word(w, lead)
            for w in (
                shown
                + " "
                + pick(rng, ("{}", "{}.{}", "{}", "A{}")).format(rng.integers(1, 20), rng.integers(1, 9))
                + pick(rng, (".", ":", "", " –"))
            ).split()
        ]
    length = pick(rng, (0.4, 0.8, 1.5, 3.0, 6.0))
    inks += prose(rng, s.voice, words_for(font, width, length * rng.uniform(0.6, 1.3)), font)
    pitch = round(1.25 * font.size)
    short = sum(ink.shape[1] + 3 for ink in inks) < width
    align = pick(rng, ("left", "center", "center")) if short else pick(rng, (s.align, s.align, "center"))
    ink = set_text(inks, width, pitch, align)
    return Group([text_patch("Caption", ink, s.accent if s.look["caption"] == "colour" else s.ink)], ink.shape[0], 0)


PICTURES = {  # how likely each picture is
    "paper": {"chart": 5, "panels": 4, "micrograph": 1.5, "diagram": 1.5, "photo": 0.7, "map": 0.5, "sketch": 0.7},
    "report": {"chart": 5, "photo": 3, "diagram": 2, "map": 1, "screen": 0.7, "panels": 0.4, "logo": 0.3},
    "manual": {"screen": 3, "sketch": 3, "diagram": 3, "photo": 1.5, "chart": 0.6, "logo": 0.4},
    "colour": {"photo": 7, "chart": 1.2, "diagram": 0.8, "map": 0.6, "logo": 0.6},
}


def draw_picture(rng: Rng, s: Style, wide: int, high: int) -> Patch:
    """Draws a picture as they are on this kind of page."""
    chances = PICTURES[s.look["pictures"]]
    look = str(rng.choice(list(chances), p=np.array(list(chances.values())) / sum(chances.values())))
    image = picture(
        rng, look, max(24, wide), max(24, high), s.paper, s.voice, pick(rng, (s.font.family, s.head.family))
    )
    return picture_patch("Picture", image, s.paper)


def figure(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a picture, mostly with a caption below, above or beside it."""
    wide = round(width * pick(rng, (1.0, 1.0, 1.0, 0.9, 0.75, 0.6)))
    high = round(wide * rng.uniform(0.3, 1.1))
    high = min(high, round(0.85 * room))
    place = pick(rng, ["below", "below", "below", "below", "above", "none", "beside"])
    if high < 45:
        return None
    gap = round(s.pitch * rng.uniform(0.5, 1.2))
    if place == "beside" and width > 260:
        wide = round(width * rng.uniform(0.4, 0.66))
        side = caption(rng, s, width - wide - 12, "Figure")
        shot = draw_picture(rng, s, wide, max(min(high, wide), side.high))
        flip = rng.random() < 0.4
        patches = [shot._replace(x=shot.x + (width - wide) * flip)]
        patches += moved(
            side, 0 if flip else wide + 12, pick(rng, (0, shot.size[0] - side.high)) if shot.size[0] > side.high else 0
        )
        return Group(patches, max(shot.y + shot.size[0], side.high), gap)
    shot = draw_picture(rng, s, wide, high)
    centred = Group([shot._replace(x=shot.x + (width - wide) // 2, y=0)], shot.size[0])
    if place == "none":
        return centred._replace(gap=gap)
    note = caption(rng, s, width if rng.random() < 0.7 else wide, "Figure")
    space = round(s.pitch * pick(rng, (0.2, 0.4, 0.8)))
    order = (
        [note._replace(gap=gap), centred._replace(gap=space)]
        if place == "above"
        else [centred._replace(gap=gap), note._replace(gap=space)]
    )
    group = below(order)
    return group._replace(high=group.high + gap) if group.high <= room else None


def table_picture(rng: Rng, s: Style, width: int, room: int) -> Picture:
    """Draws a table that fits: kinds of columns, wrapped cells, heads of several rows, rules, stripes, totals."""
    font = s.small._replace(italic=False, size=s.small.size * pick(rng, (1.0, 1.0, 0.9, 1.1)))
    pitch, pad = round(1.25 * font.size), pick(rng, (1, 2, 3, 5, 8))
    look = s.look["table"] if rng.random() < 0.6 else pick(rng, TABLES)
    most = max(2, min(11, width // round(4.5 * font.size)))
    wordy = rng.random() < 0.35
    columns = min(most, int(rng.integers(2, 5 if wordy else 10)))
    kinds = [
        pick(rng, ("prose", "prose", "name", "short"))
        if wordy
        else pick(rng, ["number", "number", "number", "short", "mark"])
        for _ in range(columns)
    ]
    kinds[0] = pick(rng, ["name", "name", "name", "short", "number"])
    weights = np.array([{"prose": 3.0, "name": 2.2, "short": 1.2, "mark": 0.7}.get(kind, 1.0) for kind in kinds])
    edges = np.r_[0, np.cumsum(weights / weights.sum() * width)].astype(int)
    rows, heads = pick(rng, (rng.integers(2, 7), rng.integers(5, 16), rng.integers(10, 45))), pick(rng, (1, 1, 1, 2, 0))
    forms = [
        pick(rng, ("{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "{:.1f}%", "{:.3f}", "{:.1f} ± {:.1f}", "{:,.0f}"))
        for _ in kinds
    ]
    scale = [10 ** rng.uniform(0.3, 4.5) for _ in kinds]
    aligns = [
        pick(rng, ("left", "left", "center"))
        if kind in ("prose", "name", "short")
        else pick(rng, ("right", "center", "center"))
        for kind in kinds
    ]
    aligns[0] = "left" if kinds[0] == "name" else aligns[0]
    money, groups_of, total = rng.random() < 0.15, rng.random() < 0.25, rng.random() < 0.3
    empty = pick(rng, (0, 0, 0.08, 0.3))
    line: Colour = pick(rng, (s.ink, s.ink, (150, 150, 150), s.accent))
    head_fill: Colour | None = {
        "headbar": s.accent,
        "shade": _mixed(s.accent, s.paper, 0.8),
        "stripes": pick(rng, (None, s.accent)),
    }.get(look)
    head_ink: Colour = (255, 255, 255) if head_fill and sum(head_fill) < 430 else s.ink
    tint = _mixed(s.accent, s.paper, rng.uniform(0.82, 0.93))
    image = np.full((room + 2, width, 3), s.paper, np.uint8)
    y, y_rules, head_low = 1, [0], 0
    for row in range(heads + rows):
        is_head, is_last = row < heads, row == heads + rows - 1
        title = groups_of and not is_head and rng.random() < 0.15
        bold = (is_head and s.look["caption"] != "plain") or (is_last and total) or title
        cut = font._replace(bold=bold)
        cells: list[tuple[Ink, int, str]] = []
        spans = is_head and heads == 2 and row == 0
        for i, (kind, form) in enumerate(zip(kinds, forms, strict=True)):
            left, right, align = int(edges[i]), int(edges[i + 1]), aligns[i]
            if (title and i) or rng.random() < empty * (i > 0 and not is_head):
                continue
            if spans:
                if i % 2 == 0 and i:
                    continue
                right, align = int(edges[min(columns, i + 2 if i else 1)]), "center" if i else "left"
            if is_head or title:
                content = phrase(rng, s.voice, 1, 2 + 2 * title) if i or title or rng.random() < 0.6 else ""
            elif kind == "prose":
                content = phrase(rng, s.voice, 2, pick(rng, (4, 10, 25, 60)))
            elif kind == "name":
                content = phrase(rng, s.voice, 1, pick(rng, (2, 4, 7)))
            elif kind == "short":
                content = phrase(rng, s.voice, 1, 1) if rng.random() < 0.6 else number(rng)
            elif kind == "mark":
                content = pick(rng, ["–", "x", "+", "yes", "no", "n/a", "*"])
            else:
                value = scale[i] * float(rng.lognormal(0, 0.5))
                content = form.format(value, value / 9)
                content = "$ " + content if money and row in (heads, heads + rows - 1) else content
            if not content:
                continue
            room_x = right - left - 2 * min(pad, 4) - 1
            cells.append(
                (
                    set_text(
                        [word(w, cut)[:, : max(4, room_x)] for w in content.split()],
                        max(8, room_x),
                        pitch,
                        align,
                        most=8,
                    ),
                    left,
                    align,
                )
            )
        high = max([pitch, *(cell.shape[0] for cell, *_ in cells)]) + 2 * pad
        if y + high > room:
            break
        tinted = (look == "stripes" and row % 2) or (title and look == "shade")
        fill = head_fill if is_head else tint if tinted else None
        if fill:
            image[y : y + high, :] = fill
        for cell, left, _ in cells:
            x = left + min(pad, 4)
            blend(image, cell, head_ink if is_head else s.ink, x, y + pad)
        y += high
        y_rules.append(y - 1)
        head_low = len(y_rules) - 1 if is_head else head_low
    image = image[: y + 1]
    horizontal = {
        "grid": y_rules,
        "rows": y_rules,
        "book": [0, y_rules[head_low], y],
        "box": [0, y_rules[head_low], y],
        "shade": [y_rules[head_low], y],
        "headbar": [y],
        "open": [y_rules[head_low]],
    }.get(look, [])
    for at in horizontal:
        image[min(at, y)] = line
    if look == "book" and rng.random() < 0.4:
        image[:1] = line
        image[min(1, y)] = line
    if look in ("grid", "box"):
        for x in edges if look == "grid" else (0, width):
            image[:, min(int(x), width - 1)] = line
    return image


# fmt: off
TABLES = (
    "grid", "grid", "book", "book", "book", "rows", "rows", "stripes", "headbar", "shade", "box", "open", "none",
    "none",
)
# fmt: on


def blend(image: Picture, ink: Ink, colour: Colour, x: int, y: int) -> None:
    """Puts ink of a colour on a picture; what sticks out right or below is lost."""
    part = image[y : y + ink.shape[0], x : x + ink.shape[1]]
    ink = ink[: part.shape[0], : part.shape[1]]
    rows = np.flatnonzero(ink.any(axis=1))
    if not len(rows):
        return
    part, ink = part[rows[0] : rows[-1] + 1], ink[rows[0] : rows[-1] + 1]
    share = ink[:, :, None].astype(np.uint16)
    part[:] = ((255 - share) * part + share * np.array(colour, np.uint16) + 127) // 255


def tabular(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a table, mostly with a caption above or below it, at times with notes below."""
    if room < 6 * s.pitch:
        return None
    wide = round(width * pick(rng, (1.0, 1.0, 1.0, 0.85, 0.65)))
    gap, note = round(s.pitch * rng.uniform(0.5, 1.3)), caption(rng, s, width if rng.random() < 0.7 else wide, "Table")
    place = pick(rng, ["above", "above", "above", "below", "none", "none"])
    free = room - gap - (note.high + 14 if place != "none" else 0)
    if free < 4 * s.pitch:
        return None
    maker = pick(rng, (table_picture,) * 12 + (form_picture,)) if s.look["pictures"] != "paper" else table_picture
    patch = picture_patch("Table", maker(rng, s, wide, int(free)), s.paper)
    body = Group(
        [patch._replace(x=patch.x + (width - wide) // 2 * (s.look["heading"] == "centre" or rng.random() < 0.4), y=0)],
        patch.size[0],
        gap,
    )
    space = round(s.pitch * pick(rng, (0.2, 0.4, 0.7)))
    order = {
        "above": [note._replace(gap=gap), body._replace(gap=space)],
        "below": [body, note._replace(gap=space)],
    }.get(place, [body])
    if rng.random() < 0.3:
        small = s._replace(small=s.small._replace(size=max(6.0, 0.9 * s.small.size)))
        under = notes(rng, small, wide, int(rng.integers(1, 4)))
        under = under._replace(patches=[p for p in under.patches if p.label])
        if below([*order, under]).high < room:
            order.append(under._replace(gap=3))
    group = below(order)
    return group._replace(high=group.high + gap // 2) if group.high <= room else None


def form_picture(rng: Rng, s: Style, width: int, room: int) -> Picture:
    """Draws a form: a grid of boxes with small names, some filled in, some with squares to tick."""
    font, fill = s.small._replace(size=max(6.5, 0.8 * s.small.size), italic=False), rng.random()
    image, y, line = np.full((room + 2, width, 3), s.paper, np.uint8), 0, pick(rng, (s.ink, (120, 120, 120), s.accent))
    for _ in range(int(rng.integers(3, 14))):
        high = round(font.size * rng.uniform(2, 4.5))
        if y + high > room:
            break
        cells = int(rng.integers(1, 5))
        edges = np.r_[0, np.sort(rng.uniform(0.15, 0.85, cells - 1)) * width, width - 1].astype(int)
        if rng.random() < 0.12:
            image[y : y + high] = _mixed(s.accent, s.paper, 0.8)
        for left, right in pairwise(edges):
            blend(
                image,
                word(phrase(rng, s.voice, 1, 3), font)[:, : max(2, right - left - 6)],
                s.ink,
                int(left) + 4,
                y + 1,
            )
            if rng.random() < 0.7 * fill:
                blend(
                    image,
                    word(phrase(rng, s.voice, 1, 2), s.font)[:, : max(2, right - left - 10)],
                    s.ink,
                    int(left) + 8,
                    y + round(1.3 * font.size),
                )
            elif rng.random() < 0.3:
                for x in range(int(left) + 6, int(right) - 50, 60):
                    image[y + high - 10 : y + high - 2, x : x + 8] = s.ink
                    image[y + high - 9 : y + high - 3, x + 1 : x + 7] = s.paper
                    blend(
                        image,
                        word(pick(rng, ("yes", "no", "other")), font),
                        s.ink,
                        x + 12,
                        y + high - round(1.5 * font.size),
                    )
            image[y : y + high, int(left)] = line
        image[y : y + high, -1] = line
        image[y] = line
        y += high
        image[min(y, room)] = line
    return image[: y + 1]


def contents(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a table of contents: names, leaders and page numbers."""
    leaders, numbered, spread = (
        pick(rng, (".", ". ", "", " .")),
        rng.random() < 0.6,
        s.pitch * pick(rng, (1.0, 1.3, 1.7)),
    )
    rows, place = int(rng.integers(6, 45)), 1
    rows = min(rows, int(room / spread))
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
    return Group([text_patch("Table", ink, s.ink)], ink.shape[0], s.gap)


# fmt: off
MATH = (
    "α", "β", "γ", "λ", "μ", "σ", "φ", "ω", "∂", "Δ", "Ω", "x", "y", "z", "f", "p", "q", "n", "k", "u", "v", "H", "N",
    "P", "A", "T", "E", "g", "t",
)
# fmt: on


def formula(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a displayed formula of one to three lines, mostly with its number, which belongs to its box."""
    size = s.font.size * rng.uniform(1.0, 1.2)
    plain = Font("STIX", size) if "STIX" in families() else s.font
    italic, rows = plain._replace(italic=True), pick(rng, (1, 1, 1, 2, 3))
    step = round(3.4 * size)
    if step * rows > room:
        return None
    ink = np.zeros((step * rows, width), np.uint8)
    start, goal = round(width * rng.uniform(0.02, 0.3)), width * rng.uniform(0.35, 0.85)
    for row in range(rows):
        axis, x = row * step + step // 2, start + row * round(size)
        for k in range(30):
            x = _term(rng, ink, x, axis, plain, italic)
            if x > goal:
                break
            sign = pick(rng, "=+−=+≤·") if k else "="
            paste(ink, word(sign, plain), x + 3, axis - round(0.85 * size))
            x += round(1.1 * size) + 3
    if rng.random() < 0.65:
        tag = word(f"({rng.integers(1, 40)})", s.font)
        paste(ink, tag, width - tag.shape[1], step * rows // 2 - round(0.85 * size))
    return Group([text_patch("Formula", ink, s.ink)], ink.shape[0], round(s.pitch * 0.2))


def _term(rng: Rng, ink: Ink, x: int, axis: int, plain: Font, italic: Font) -> int:
    """Writes a fraction, a sum, a root, a bracket or a variable with indices, and returns the next x."""
    size, look, small = plain.size, rng.random(), italic._replace(size=0.7 * plain.size)

    def put(content: str, x: int, y: float, font: Font) -> int:
        drawn = word(content, font)
        paste(ink, drawn, x, max(0, round(y - 0.85 * font.size)))
        return x + int(drawn.shape[1]) + 1

    def product() -> str:
        return "".join(pick(rng, MATH if plain.family == "STIX" else MATH[11:]) for _ in range(int(rng.integers(1, 5))))

    if look < 0.25:
        above, under = product(), product()
        wide = max(word(above, italic).shape[1], word(under, italic).shape[1]) + 4
        ink[axis : axis + 1, x : x + wide] = 255
        put(above, x + (wide - word(above, italic).shape[1]) // 2, axis - 0.75 * size, italic)
        put(under, x + (wide - word(under, italic).shape[1]) // 2, axis + 0.85 * size, italic)
        return x + wide + 2
    if look < 0.42:
        end = put(
            pick(rng, ("∑", "∑", "∫", "∏") if plain.family == "STIX" else "S"), x, axis, plain._replace(size=1.7 * size)
        )
        put("i=1", x, axis + 1.3 * size, small)
        put(pick(rng, ("N", "n", "K")), x + 2, axis - 1.2 * size, small)
        return put(product(), end + 2, axis, italic)
    if look < 0.55:
        end = put(product(), put(pick(rng, "([|"), x, axis, plain), axis, italic)
        return put(pick(rng, ")]|"), end, axis, plain)
    if look < 0.62:
        end = put(pick(rng, ["exp", "log", "sin", "max", "Pr", "min"]), x, axis, plain)
        return put(f"({product()})", end, axis, italic)
    end = put(product()[0], x, axis, italic)
    put(pick(rng, ["2", "i", "n", "*", "k"]), end, axis - 0.45 * size, small)
    return (
        put(pick(rng, ["i", "ij", "0", "max", "t"]), end, axis + 0.35 * size, small)
        if rng.random() < 0.6
        else end + round(0.5 * size)
    )


def code(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws lines of a program, on a tint or in a frame at times."""
    pitch, lines = round(1.3 * s.mono.size), int(rng.integers(3, 22))
    lines = min(lines, (room - 10) // pitch)
    if lines < 2:
        return None
    ink, level = np.zeros((lines * pitch + pitch // 2, width - 12), np.uint8), 0
    for row in range(lines):
        level = max(0, level + int(rng.integers(-1, 2)))
        text_line = "  " * level + pick(
            rng,
            ("{} = {}({})", "if {} > {}:", "return {}.{}", "# {} {} {}", "{}({}, {})", "for {} in {}:", "{{ {}; }}"),
        )
        drawn = word(text_line.format(*(pick(rng, s.voice.rare) for _ in range(3))), s.mono)
        paste(ink, drawn, round(level * 1.2 * s.mono.size), row * pitch)
    patches = [text_patch("Text", ink, s.ink, 6, 4)]
    if rng.random() < 0.5:
        back = np.full((ink.shape[0] + 8, width, 3), _mixed(s.ink, s.paper, rng.uniform(0.86, 0.95)), np.uint8)
        patches.insert(0, Patch("", None, back, 0, 0))
    return Group(patches, ink.shape[0] + 8, s.gap)


def quote(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a quotation: inset, large, in colour or between rules."""
    large = rng.random() < 0.5
    font = (
        s.head._replace(size=s.font.size * 1.5, bold=False, italic=True)
        if large
        else s.font._replace(size=0.95 * s.font.size)
    )
    inset = round(width * rng.uniform(0.04, 0.14))
    group = text(
        rng,
        s,
        width - inset,
        rng.uniform(2, 6),
        font=font,
        x=inset,
        align="left" if large else s.align,
        colour=s.accent if large else s.ink,
    )
    if group.high > room:
        return None
    gap = round(0.8 * s.pitch)
    patches = list(group.patches)
    if rng.random() < 0.4:
        rule = (
            np.full((group.high, 3, 3), s.accent, np.uint8)
            if rng.random() < 0.5
            else np.full((1, width, 3), s.accent, np.uint8)
        )
        patches.append(Patch("", None, rule, max(0, inset - 8), 0))
    return Group(patches, group.high + gap, gap)


def on_ground(s: Style, ground: Colour) -> Style:
    """The style of text on a ground of another colour: white on a dark one."""
    ink: Colour = (255, 255, 255) if sum(ground) < 380 else (20, 20, 20)
    far = abs(sum(ground) - sum(s.accent)) > 200
    look = {**s.look, "heading": "colour"}
    return s._replace(paper=ground, ink=ink, accent=s.accent if far else ink, align="left", look=look)


def aside(rng: Rng, s: Style, width: int, room: int) -> Group | None:
    """Draws a tinted, framed or inverted box with a heading and text or a list in it."""
    if room < 12 * s.pitch or width < 110:
        return None
    inverted, pad = rng.random() < 0.25, round(s.font.size)
    back = s.accent if inverted else _mixed(s.accent, s.paper, rng.uniform(0.78, 0.94))
    inner = on_ground(s, back)
    parts, left = [], min(room, round(s.pitch * rng.uniform(10, 26))) - 2 * pad
    for writer in (
        heading,
        *rng.permutation(np.array([paragraph, paragraph, paragraph, items], object))[: int(rng.integers(1, 4))],
    ):
        part = writer(rng, inner, width - 2 * pad, left)
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
    gap = round(0.8 * s.pitch)
    return Group([Patch("", None, ground, 0, 0), *moved(body, pad, pad)], ground.shape[0] + gap, gap)


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
        groups.append(Group([text_patch("Text", ink, s.ink)], ink.shape[0], gap))
    group = below(groups)
    return group._replace(gap=s.gap) if group.high <= room else None


def accent(rng: Rng, colourful: float) -> Colour:
    """Draws the colour of headings: black on sober pages."""
    return vivid(rng) if rng.random() < colourful else pick(rng, ((0, 0, 0), (0, 0, 0), (40, 40, 40), (90, 90, 90)))


def runs(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Weights as probabilities."""
    weights = np.asarray(values, np.float64)
    return weights / weights.sum()
