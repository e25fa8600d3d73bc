"""Drawn documents with exact boxes: papers, reports, accounts, manuals, laws, magazines, slides, forms and more.

A page is a function of (seed, index) and of the installed typefaces alone. Boxes are tight to the visible ink.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dfine.data.synthetic.documents import writers
from dfine.data.synthetic.documents.pictures import Colour, Picture, noise, pale, photo, vivid
from dfine.data.synthetic.documents.text import (
    CYRILLIC,
    DISPLAY,
    MONO,
    SANS,
    SCRIPTS,
    SERIF,
    Font,
    draw_voice,
    number,
    phrase,
    pick_family,
    set_text,
    word,
)
from dfine.data.synthetic.documents.writers import (
    Group,
    Patch,
    Style,
    below,
    blend,
    moved,
    picture_patch,
    text,
    text_patch,
)
from dfine.data.synthetic.ink import Rng, pick
from dfine.data.synthetic.pages import CLASSES, Drawn

WRITERS: dict[str, Callable[[Rng, Style, int, int], Group | None]] = {
    "text": writers.paragraph,
    "heading": writers.heading,
    "list": writers.items,
    "figure": writers.figure,
    "table": writers.tabular,
    "formula": writers.formula,
    "references": writers.references,
    "contents": writers.contents,
    "code": writers.code,
    "quote": writers.quote,
    "aside": writers.aside,
    "fields": writers.fields,
}


class Kind(NamedTuple):
    """A kind of page: its share of all; then chances of things, and the weights of `WRITERS`."""

    share: float
    columns: tuple[int, ...]  # each equally likely
    size: str
    pictures: str
    serif: float
    colourful: float
    title: float
    header: float
    footer: float
    notes: float
    weights: tuple[float, ...]


def _kind(share: str, columns: str, size: str, pictures: str, *numbers: str) -> Kind:
    chances = [float(number) for number in numbers]
    serif, colourful, title, header, footer, notes, *weights = chances
    counts = tuple(map(int, columns))
    return Kind(float(share), counts, size, pictures, serif, colourful, title, header, footer, notes, tuple(weights))


# The columns as in `Kind`, then the weights in the order of `WRITERS`.
TABLE = """
kind     all cols  size  pictures serif hue title head foot notes text h   list fig tab math refs toc code quote box key
paper    .1  1222  page  paper    .7    .25 1     .75  .6   .3    9    3.4 .25  .7  .3  .5   0    0   0    0     0   0
article  .22 12222 page  paper    .75   .15 0     .85  .5   .12   9    2.8 .25  1.1 .8  .8   0    0   0    .1    0   0
maths    .05 112   page  paper    .95   .05 .1    .6   .6   .2    8    2.2 .3   .7  .3  7    0    0   .1   .2    0   0
sources  .05 1222  page  paper    .7    .15 0     .8   .6   .03   2    1.5 .1   .3  .3  0    6    0   0    0     0   0
report   .17 1112  page  report   .3    .6  .15   .6   .8   .25   7    4.5 .9   1.1 1.1 0    0    .05 0    .2    .4  .1
accounts .1  112   page  report   .4    .5  .1    .7   .8   .3    4.5  4   .4   .3  4   0    0    .05 0    0     .1  .1
manual   .08 112   page  manual   .2    .6  .1    .6   .8   .1    4.5  5   1.5  1.8 .9  0    0    .1  1.2  0     .6  .2
law      .06 1112  page  manual   .6    .1  .1    .7   .7   .25   6    3.5 2.4  0   .3  0    0    0   0    .3    0   0
book     .04 1     book  report   .9    .1  .2    .7   .6   .2    10   1.4 .4   .4  .1  0    0    .1  0    .5    0   0
magazine .07 2334  page  colour   .55   .8  .5    .5   .7   .03   9    3   .25  1.8 .2  0    0    0   0    .8    .7  0
brochure .06 1223  odd   colour   .25   .95 .6    .3   .5   .02   5    4.5 1.5  2.5 .4  0    0    0   0    .5    1.2 .4
letter   .03 1     page  report   .5    .3  .1    .1   .4   .02   7    .3  .6   0   .15 0    0    0   0    0     0   1
form     .04 112   page  report   .25   .5  .7    .3   .6   .1    2    3.5 .6   0   3   0    0    0   0    0     .2  3
contents .02 112   page  report   .4    .4  .5    .5   .7   .02   .6   .8  0    0   0   0    0    6   0    0     0   0
slide    .06 112   slide colour   .1    .9  0     .15  .6   .02   2    .3  3.5  3   .7  .2   0    0   .2   .2    .4  0
cover    .03 1     odd   colour   .35   .9  1     .1   .4   0     1    .5  .2   .5  0   0    0    0   0    0     0   .5
poster   .03 234   odd   report   .2    .9  1     .1   .2   0     4    4.5 1.2  3   .7  .3   .3   0   0    0     1   0
patent   .02 2     page  manual   .95   0   0     1    .1   0     9    1.8 .6   .8  .2  .3   0    0   0    0     0   .3
"""
KINDS = {name: _kind(*row) for name, *row in map(str.split, TABLE.strip().splitlines()[1:])}


@dataclass
class Page:
    """The picture of a page, and the label and the xyxy box of each thing on it so far."""

    image: Picture
    labels: list[int] = field(default_factory=list)
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)

    def put(self, patches: Sequence[Patch], x: int, y: int) -> None:
        """Puts patches on the page; what sticks out is cut off, and what is all outside is left out."""
        high, wide = self.image.shape[:2]
        for label, ink, colour, dx, dy in patches:
            shape = ink.shape if ink is not None else np.shape(colour)
            left, top = x + dx, y + dy
            x0, y0, x1, y1 = max(0, left), max(0, top), min(wide, left + shape[1]), min(high, top + shape[0])
            if x1 <= x0 or y1 <= y0:
                continue
            rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            if ink is None:
                self.image[y0:y1, x0:x1] = np.asarray(colour)[rows, columns]
            else:
                assert isinstance(colour, tuple)
                blend(self.image, ink[rows, columns], colour, x0, y0)
            if label:
                self.labels.append(CLASSES.index(label))
                self.boxes.append((x0, y0, x1, y1))

    def line(self, x0: int, y: int, x1: int, colour: Colour, thick: int = 1) -> None:
        self.image[y : y + thick, x0:x1] = colour


def draw_style(rng: Rng, kind: str, scale: float) -> Style:
    """Draws the typography of a page; `scale` is pixels a point."""
    of = KINDS[kind]
    columns, serif, colourful, pictures = of.columns, of.serif, of.colourful, of.pictures
    voice = draw_voice(rng)
    if voice.language in SCRIPTS:
        family = other = SCRIPTS[voice.language][0]
    elif voice.language == "Russian":
        family, other = pick_family(rng, CYRILLIC), pick_family(rng, CYRILLIC)
    else:
        family = pick_family(rng, SERIF if rng.random() < serif else SANS)
        other = family if rng.random() < 0.5 else pick_family(rng, DISPLAY if rng.random() < colourful / 2 else SANS)
    points = {
        "slide": rng.uniform(11, 19),
        "poster": rng.uniform(7, 11),
        "magazine": rng.uniform(7.5, 10),
        "brochure": rng.uniform(7.5, 12),
        "cover": rng.uniform(10, 15),
        "law": rng.uniform(8, 11.5),
    }
    size = points.get(kind, rng.uniform(8, 10.5) if max(columns) > 1 and rng.random() < 0.7 else rng.uniform(9, 12))
    size = max(7.5, round(2 * size * scale) / 2)
    pitch = size * float(rng.uniform(1.12, 1.35) if rng.random() < 0.75 else rng.uniform(1.3, 1.9))
    indented = rng.random() < (0.75 if pictures == "paper" or kind in ("book", "magazine") else 0.15)
    back: Colour = (255, 255, 255)
    if rng.random() < 0.12 * (0.3 + colourful):
        back = pale(rng, 0.12)
    dark = kind in ("slide", "brochure", "cover", "poster") and rng.random() < 0.2
    if dark:
        r, g, b = vivid(rng)
        back = (r // 3, g // 3, b // 3)
    ink: Colour = (245, 245, 245) if dark else pick(rng, ((0, 0, 0), (0, 0, 0), (35, 31, 32), (60, 60, 65)))
    tone = pale(rng, 0.5) if dark else writers.accent(rng, colourful)
    look = {
        "heading": pick(
            rng,
            ["plain", "plain", "plain", "centre", "upper", "colour", "colour", "bar", "tint", "rule"]
            if colourful > 0.3
            else ["plain", "plain", "plain", "centre", "upper"],
        ),
        "marks": pick(rng, writers.MARKS),
        "caption": pick(rng, ("bold", "bold", "plain", "colour" if colourful > 0.3 else "plain")),
        "name": pick(rng, ("plain", "plain", "upper", "short")),
        "table": pick(rng, writers.TABLES),
        "lead": pick(rng, ("none", "none", "none", "bold")) if kind != "law" else pick(rng, ("none", "clauses")),
        "pictures": pictures,
    }
    return Style(
        voice=voice,
        font=Font(family, size),
        head=Font(other, size * rng.uniform(1.0, 1.6), bold=rng.random() < 0.8),
        mono=Font(pick_family(rng, MONO), 0.92 * size),
        pitch=pitch,
        align=pick(
            rng,
            ("justify", "justify", "justify", "left")
            if pictures == "paper" or kind in ("law", "book")
            else ("justify", "left", "left"),
        ),
        indent=round(size * rng.uniform(1, 2)) if indented else 0,
        gap=pick(rng, (0, 0, 0, 1, 2)) if indented else round(pitch * pick(rng, (0.15, 0.3, 0.5, 0.5, 0.8, 1.0))),
        numbered=rng.random() < 0.4,
        ink=ink,
        accent=tone,
        paper=back,
        small=Font(
            family if rng.random() < 0.75 else other,
            max(7.0, round(2 * size * rng.uniform(0.8, 1.0)) / 2),
            italic=rng.random() < 0.15,
        ),
        look=look,
    )


def fill(
    page: Page,
    rng: Rng,
    s: Style,
    weights: npt.NDArray[np.float64],
    x: int,
    y: int,
    width: int,
    bottom: int,
    first: str = "",
) -> int:
    """Fills a column from y to the bottom, and returns where it ends."""
    names, last, top = list(WRITERS), "heading", True
    failures = 0
    while failures < 4 and y < bottom:
        chances = weights.copy()
        if last != "text":
            chances[names.index(last)] *= 0.1 if last == "heading" else 0
        name = first or str(rng.choice(names, p=writers.runs(chances)))
        first = ""
        group = WRITERS[name](
            rng,
            s if not top or name != "text" else s._replace(indent=s.indent * int(rng.random() < 0.4)),
            width,
            bottom - y - (0 if top else s.gap),
        )
        gap = 0 if top or group is None else max(group.gap, 0)
        if name == "text" and group is not None and last == "heading":
            gap = min(gap, round(0.4 * s.pitch))
        if group is None or y + gap + group.high > bottom + 2:
            failures += 1
            continue
        page.put(group.patches, x, y + gap)
        y += gap + group.high
        last, top, failures = name, False, 0
    return y


def furniture(page: Page, rng: Rng, s: Style, label: str, side: int, y: int, kind: str) -> None:
    """Puts running heads and page numbers into the upper or the lower margin, with rules and bars at times."""
    width = page.image.shape[1]
    font = s.small._replace(
        size=max(6.5, s.font.size * rng.uniform(0.7, 0.95)), italic=rng.random() < 0.25, bold=rng.random() < 0.15
    )
    colour = pick(rng, (s.ink, s.ink, (120, 120, 120), s.accent))
    inks = []
    if rng.random() < 0.07:
        high = round(font.size * 2)
        back = s.accent
        page.image[max(0, y - high // 3) : y + high] = back
        colour = (255, 255, 255) if sum(back) < 430 else (0, 0, 0)
    folio = pick(
        rng, ("{}", "{}", "{}", "- {} -", "Page {}", "{} of 120", "{} / 64", "Page {} of 9", "| {}", "S. {}")
    ).format(rng.integers(1, 400))
    running = phrase(rng, s.voice, 2, 8, pick(rng, ("first", "title", "upper")))
    if kind in ("paper", "article", "maths", "sources") and rng.random() < 0.5:
        running = pick(rng, ("{} et al. {} {}:{}", "{}, {} {} ({})", "{} {}, no. {} (2{:03d})")).format(
            phrase(rng, s.voice, 1, 2, "title"),
            phrase(rng, s.voice, 1, 3, "title"),
            rng.integers(1, 90),
            int(rng.integers(0, 26)),
        )
    other = pick(
        rng,
        (
            phrase(rng, s.voice, 1, 3, "title"),
            f"www.{pick(rng, s.voice.rare)}.org",
            f"{rng.integers(1, 29)}/{rng.integers(1, 13)}/20{rng.integers(10, 26)}",
            f"10.{rng.integers(1000, 9999)}/{rng.integers(10000)}",
        ),
    )
    looks = [
        {1: folio},
        {2: folio},
        {0: folio},
        {0: running, 2: folio},
        {0: folio, 2: running},
        {1: running},
        {0: running, 2: other},
        {0: running},
        {2: running},
        {0: other, 1: running, 2: folio},
        {0: other, 1: folio, 2: running},
    ]
    chosen = pick(rng, looks[:5] if label == "Page-footer" and rng.random() < 0.6 else looks)
    half = (width - 2 * side) // len(chosen) - 8
    for place, content in chosen.items():
        ink = set_text(
            [word(w, font) for w in content.split()],
            half if len(chosen) > 1 else width - 2 * side,
            round(1.2 * font.size),
            ("left", "center", "right")[place],
            most=2,
        )
        x = {0: side, 1: side + (width - 2 * side - ink.shape[1]) // 2, 2: width - side - ink.shape[1]}[place]
        inks.append(text_patch(label, ink, colour, x, y))
    inks = [patch for patch in inks if patch.label]
    end = max([y, *(patch.y + patch.size[0] for patch in inks)])
    page.put(
        [
            p
            for i, p in enumerate(inks)
            if all(p.x >= q.x + q.size[1] + 3 or q.x >= p.x + p.size[1] + 3 for q in inks[:i])
        ],
        0,
        0,
    )
    if rng.random() < 0.35:
        at = end + 4 if label == "Page-header" else y - 5
        page.line(side, at, width - side, pick(rng, (s.ink, s.accent, (170, 170, 170))), pick(rng, (1, 1, 1, 2, 3)))


def title_block(rng: Rng, s: Style, width: int, kind: str) -> Group:
    """Draws a title and what belongs to it: authors, affiliations, an abstract, a subtitle, a date."""
    big = {"cover": 2.8, "poster": 3.0, "magazine": 2.6, "brochure": 2.4}.get(kind, 1.75) * rng.uniform(0.75, 1.4)
    font = s.head._replace(size=min(big * s.font.size, width / 7), bold=rng.random() < 0.75)
    align = pick(rng, ("left", "left", "center"))
    case = pick(rng, ("first", "title", "title", "upper"))
    words = phrase(rng, s.voice, 1, 6 if kind in ("cover", "magazine", "brochure", "form") else 16, case).split()
    ink = set_text([word(w, font) for w in words], width, round(font.size * rng.uniform(1.05, 1.25)), align, most=5)
    groups = [Group([text_patch("Title", ink, pick(rng, (s.ink, s.accent)))], ink.shape[0])]
    space = round(s.pitch * rng.uniform(0.5, 1.5))
    if kind == "paper":
        names = ", ".join(
            phrase(rng, s.voice, 2, 3, "title") + pick(rng, ("", "*", "1", "1,2", " and"))
            for _ in range(int(rng.integers(1, 9)))
        )
        bold = s.font._replace(bold=rng.random() < 0.4, size=1.05 * s.font.size)
        authors = set_text([word(w, bold) for w in names.split()], width, round(1.3 * bold.size), align)
        groups.append(Group([text_patch("Text", authors, s.ink)], authors.shape[0], space))
        for _ in range(int(rng.integers(0, 4))):
            place = s.small._replace(italic=rng.random() < 0.5)
            groups.append(
                text(rng, s, width, rng.uniform(0.4, 1.8), font=place, align=align)._replace(
                    gap=pick(rng, (1, 4, space // 2))
                )
            )
        if rng.random() < 0.8:
            inset = pick(rng, (0, 0, round(0.08 * width)))
            if rng.random() < 0.6:
                name = pick(rng, ("Abstract", "ABSTRACT", "Summary", "A B S T R A C T", "Zusammenfassung", "Résumé"))
                cut = s.font._replace(bold=rng.random() < 0.8)
                head = set_text([word(name, cut)], width - inset, round(1.3 * cut.size), pick(rng, ("left", "center")))
                groups.append(Group([text_patch("Section-header", head, s.accent, inset // 2)], head.shape[0], space))
            parts = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
            for _ in range(parts):
                abstract = text(rng, s, width - inset, rng.uniform(5, 14) / parts + 1, font=s.small)
                groups.append(Group(moved(abstract, inset // 2, 0), abstract.high, pick(rng, (3, space // 2))))
            if rng.random() < 0.5:
                groups.append(text(rng, s, width - inset, rng.uniform(0.4, 1.4), font=s.small)._replace(gap=space // 2))
    elif rng.random() < 0.5:
        sub = s.head._replace(size=max(s.font.size, 0.5 * font.size), bold=False, italic=rng.random() < 0.3)
        groups.append(
            text(
                rng,
                s,
                width,
                rng.uniform(0.3, 1.6),
                font=sub,
                align=align,
                label=pick(rng, ("Text", "Text", "Section-header")),
            )._replace(gap=space)
        )
    group = below(groups)
    return group._replace(high=group.high + 2 * space)


def logo_at(page: Page, rng: Rng, s: Style, x: int, y: int, wide: int, high: int) -> None:
    page.put(
        [picture_patch("Picture", writers.picture(rng, "logo", wide, high, s.paper, s.voice, s.head.family), s.paper)],
        x,
        y,
    )


def cover(page: Page, rng: Rng, s: Style) -> None:
    """Fills a page with a large title, mostly over or beside a picture or a block of colour."""
    high, wide = page.image.shape[:2]
    side, look = round(0.09 * wide), pick(rng, ("over", "half", "colour", "plain"))
    y = round(high * rng.uniform(0.1, 0.5))
    if look == "over":
        page.image[:] = (photo(rng, wide, high) * rng.uniform(0.25, 0.6)).astype(np.uint8)
        s = s._replace(ink=(255, 255, 255), accent=(255, 255, 255))
    elif look == "colour":
        page.image[:] = s.accent if sum(s.accent) < 400 else (30, 50, 90)
        s = s._replace(ink=(255, 255, 255), accent=(255, 255, 255), paper=tuple(int(c) for c in page.image[0, 0]))  # type: ignore[arg-type]
    elif look == "half":
        at, tall = pick(rng, ((0, 0.45), (0.5, 0.5), (0.25, 0.4)))
        inset = pick(rng, (0, 0, side))
        shot = photo(rng, wide - 2 * inset, round(tall * high))
        page.put([Patch("Picture", None, shot, inset, round(at * high))], 0, 0)
        y = round(high * (0.5 if at == 0 else 0.08 if at == 0.5 else 0.7))
    group = title_block(rng, s, wide - 2 * side, "cover")
    page.put(group.patches, side, y)
    y += group.high
    for _ in range(int(rng.integers(0, 4))):
        y += round(s.pitch * rng.uniform(0.2, 2))
        line = text(rng, s, wide - 2 * side, rng.uniform(0.2, 1.4), align="left")
        limit = high * (0.48 if look == "half" and y < 0.5 * high else 0.92)
        if y + line.high < limit:
            page.put(line.patches, side, y)
            y += line.high
    if look != "over" and rng.random() < 0.6 and (look != "half" or y < 0.4 * high):
        size = round(0.07 * high)
        logo_at(
            page,
            rng,
            s,
            side if rng.random() < 0.5 else wide - side - 3 * size,
            round(0.93 * high) - size if look != "half" else round(0.02 * high),
            3 * size,
            size,
        )


def letter_head(page: Page, rng: Rng, s: Style, side: int, y: int, width: int) -> int:
    """Draws a sign, the sender, the date and the address of a letter or an invoice, and returns where they end."""
    size = round(4 * s.font.size)
    if rng.random() < 0.7:
        logo_at(page, rng, s, side if rng.random() < 0.6 else side + width - 3 * size, y, 3 * size, size)
        y += size + round(s.pitch)
    for _ in range(int(rng.integers(1, 4))):
        block = s.font._replace(bold=rng.random() < 0.15)
        lines = [
            word(phrase(rng, s.voice, 1, 4, "title") if rng.random() < 0.7 else number(rng), block)
            for _ in range(int(rng.integers(1, 6)))
        ]
        wide = max(line.shape[1] for line in lines)
        ink = np.zeros((round(len(lines) * s.pitch + s.font.size), wide), np.uint8)
        for row, line in enumerate(lines):
            ink[round(row * s.pitch) : round(row * s.pitch) + line.shape[0], : line.shape[1]] |= line
        x = pick(rng, (0, 0, max(0, width - wide)))
        page.put([text_patch("Text", ink, s.ink)], side + x, y)
        y += ink.shape[0] + round(s.pitch * rng.uniform(0.3, 1.5))
    return y


def _start(rng: Rng) -> tuple[str, int, int, int]:
    """Draws the kind of a page, its size before it is turned, and the quarter turns."""
    names = list(KINDS)
    kind = str(rng.choice(names, p=writers.runs([row.share for row in KINDS.values()])))
    look, short, ratio = KINDS[kind].size, int(rng.integers(590, 760)), pick(rng, (11 / 8.5, 2**0.5))
    if look == "slide":
        return kind, round(short * pick(rng, (4 / 3, 16 / 9, 16 / 9))), short, 0
    if look == "book":
        return kind, short, round(short * rng.uniform(1.3, 1.65)), 0
    if look == "odd" and rng.random() < 0.4:
        wide = rng.random() < 0.5
        long = round(short * rng.uniform(1.0, 1.6))
        return kind, long if wide else short, short if wide else long, 0
    if rng.random() < 0.05:
        return kind, round(short * ratio), short, pick(rng, (0, 0, 1, 3))
    return kind, short, round(short * ratio), 0


def page_size(seed: int, index: int) -> tuple[int, int]:
    """Returns the (width, height) of a page in pixels, without drawing it."""
    _, wide, high, turns = _start(np.random.default_rng([seed, index, 1]))
    return (high, wide) if turns % 2 else (wide, high)


def draw_page(seed: int, index: int) -> Drawn:
    """Draws page `index` of `seed`.

    Returns the image (H, W, 3) in RGB, the labels (T,) as positions in `CLASSES`, and the boxes (T, 4): x and
    y of the top left corner, width and height in pixels. They are tight to the ink.
    """
    rng = np.random.default_rng([seed, index, 1])
    kind, wide, high, turns = _start(rng)
    s = draw_style(rng, kind, min(wide, high) / (400 if kind == "slide" else 595))
    page = Page(np.full((high, wide, 3), s.paper, np.uint8))
    if kind == "cover":
        cover(page, rng, s)
    else:
        compose(page, rng, s, kind)
    boxes = np.array(page.boxes, np.float64).reshape(-1, 4)
    image = page.image
    if rng.random() < {"letter": 0.4, "form": 0.3, "patent": 0.7, "slide": 0.02, "brochure": 0.02}.get(kind, 0.1):
        image, boxes = scan(rng, image, boxes)
    for _ in range(turns):  # a quarter turn to the left
        image = np.ascontiguousarray(np.rot90(image))
        boxes = np.stack([boxes[:, 1], image.shape[0] - boxes[:, 2], boxes[:, 3], image.shape[0] - boxes[:, 0]], 1)
    return image, np.array(page.labels, np.int64), np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def compose(page: Page, rng: Rng, s: Style, kind: str) -> None:
    """Fills a page: margins, running lines, a title, things across the page, and columns."""
    of = KINDS[kind]
    colourful, chances = of.colourful, of.weights
    high, wide = page.image.shape[:2]
    weights = np.array(chances, np.float64) * rng.gamma(2.0, 0.5, len(chances))
    weights[0] = max(weights[0], 0.5 * chances[0] + 0.2)
    side, top, low = (round(size * rng.uniform(0.05, 0.12)) for size in (wide, high, high))
    if kind == "slide":
        side, top = round(wide * rng.uniform(0.04, 0.09)), round(high * rng.uniform(0.05, 0.1))
    bottom = high - low
    if colourful > 0.8 and rng.random() < 0.15:  # a ground that fades
        fade = (
            np.linspace(0, 1, high)[:, None, None] * (np.array(pale(rng, 0.25)) - np.array(s.paper))
            if sum(s.paper) > 600
            else 0
        )
        page.image[:] = (page.image + fade).astype(np.uint8)
    if rng.random() < of.header:
        furniture(page, rng, s, "Page-header", side, max(4, round(top * rng.uniform(0.3, 0.6))), kind)
        top += round(1.3 * s.font.size)
    if rng.random() < of.footer:
        furniture(
            page,
            rng,
            s,
            "Page-footer",
            side,
            min(high - round(2 * s.font.size), bottom + round(low * rng.uniform(0.25, 0.6))),
            kind,
        )
    if kind in ("paper", "article", "maths") and rng.random() < 0.04:  # a stamp along the margin
        stamp = text_patch(
            "Page-header",
            word(
                f"arXiv:{rng.integers(1000, 2600)}.{rng.integers(10000, 99999)}v1  [cs.{phrase(rng, s.voice, 1, 1)}]",
                s.font._replace(size=1.3 * s.font.size),
            ),
            (120, 120, 120),
        )
        assert stamp.ink is not None
        page.put([stamp._replace(ink=np.rot90(stamp.ink), x=max(4, side // 3), y=high // 4)], 0, 0)
    left, right = side, wide - side
    if (
        kind in ("report", "brochure", "magazine", "manual") and rng.random() < 0.2 * (0.4 + colourful) and wide > 500
    ):  # a side bar
        bar, on_left = round(wide * rng.uniform(0.22, 0.33)), rng.random() < 0.5
        tint = pick(rng, (s.accent, pale(rng, 0.3)))
        x = 0 if on_left else wide - bar
        page.put([Patch("", None, np.full((high, bar, 3), tint, np.uint8), x, 0)], 0, 0)
        kept = [i for i, box in enumerate(page.boxes) if box[2] < x or box[0] > x + bar]
        page.labels, page.boxes = [page.labels[i] for i in kept], [page.boxes[i] for i in kept]
        inner = writers.on_ground(s, tint)._replace(font=s.font._replace(size=max(7.0, 0.9 * s.font.size)))
        fill(
            page,
            rng,
            inner,
            np.array([5.0, 3, 2, 1, 0, 0, 0, 0, 0, 0.5, 0, 1]),
            x + 12,
            top,
            bar - 24,
            round(bottom * rng.uniform(0.4, 1)),
        )
        left, right = (bar + 16, right) if on_left else (left, x - 16)
    elif kind in ["law", "book", "manual", "report", "paper"] and rng.random() < (
        0.4 if kind == "law" else 0.12
    ):  # notes in the margin
        band = round(wide * rng.uniform(0.12, 0.25))
        on_left, y = rng.random() < 0.6, top
        note = s.small._replace(size=max(6.5, 0.9 * s.small.size), bold=rng.random() < 0.3)
        while y < bottom and rng.random() < 0.85:
            y += round(high * rng.uniform(0.0, 0.15))
            group = text(
                rng, s, band - 12, rng.uniform(0.5, 5), font=note, align="left", colour=pick(rng, (s.ink, s.accent))
            )
            if y + group.high < bottom:
                page.put(group.patches, left if on_left else right - band + 12, y)
            y += group.high + round(2 * s.pitch)
        left, right = (left + band, right) if on_left else (left, right - band)
    width = right - left
    first = ""
    if kind == "slide":
        font = s.head._replace(size=s.font.size * rng.uniform(1.3, 1.9))
        ink = set_text(
            [word(w, font) for w in phrase(rng, s.voice, 1, 7).split()],
            width,
            round(1.2 * font.size),
            pick(rng, ("left", "left", "center")),
            most=2,
        )
        patch = text_patch("Section-header", ink, s.accent, left, top)
        if rng.random() < 0.25:
            page.image[: top + ink.shape[0] + 6] = s.accent
            patch = patch._replace(colour=(255, 255, 255) if sum(s.accent) < 430 else (0, 0, 0))
            kept = [i for i, box in enumerate(page.boxes) if box[1] > top + ink.shape[0] + 6]
            page.labels, page.boxes = [page.labels[i] for i in kept], [page.boxes[i] for i in kept]
        page.put([patch], 0, 0)
        top += ink.shape[0] + round(s.pitch)
        first = pick(rng, ("list", "list", "figure", ""))
        bottom = round(top + (bottom - top) * rng.uniform(0.5, 1))
    elif kind == "letter" or (kind == "form" and rng.random() < 0.3):
        top = letter_head(page, rng, s, left, top, width)
    if rng.random() < of.title:
        title = title_block(rng, s, width, kind)
        if title.high < 0.6 * (bottom - top):
            page.put(title.patches, left, top)
            top += title.high
    if rng.random() < of.notes:
        foot = writers.notes(rng, s, width if rng.random() < 0.6 else width // 2 - 10, int(rng.integers(1, 5)))
        if foot.high < 0.3 * (bottom - top):
            bottom -= foot.high
            page.put(foot.patches, left, bottom)
            bottom -= round(s.pitch)
    columns = pick(rng, of.columns)
    columns = max(1, min(columns, round(width / (9 * s.font.size))))
    gutter = round(s.font.size * rng.uniform(1.2, 3))
    if columns > 1 and rng.random() < 0.45:  # a picture or a table across the columns, above or below them
        across = (writers.figure if rng.random() < 0.6 or kind == "magazine" else writers.tabular)(
            rng, s, width, round((bottom - top) * rng.uniform(0.3, 0.75))
        )
        if across:
            if rng.random() < 0.7:
                page.put(across.patches, left, top)
                top += across.high + round(s.pitch * rng.uniform(0.5, 1.5))
            else:
                bottom -= across.high
                page.put(across.patches, left, bottom)
                bottom -= round(s.pitch)
    if rng.random() < (0.12 if columns == 1 else 0.08):  # the last page of something
        bottom = round(top + (bottom - top) * rng.uniform(0.15, 0.8))
    shares = np.full(columns, 1 / columns)
    if columns == 2 and colourful > 0.4 and rng.random() < 0.25:
        shares = np.array(pick(rng, ((0.35, 0.65), (0.62, 0.38), (0.3, 0.7))))
    x, rule = left, columns > 1 and rng.random() < 0.08
    for number_of, share in enumerate(shares):
        column = round((width - gutter * (columns - 1)) * share)
        ends = bottom if rng.random() < 0.8 else round(top + (bottom - top) * rng.uniform(0.5, 1))
        fill(page, rng, s, weights, x, top, column, ends, first if number_of == 0 else "")
        x += column + gutter
        if rule and number_of < columns - 1:
            page.image[top:bottom, x - gutter // 2] = (150, 150, 150)


def scan(rng: Rng, image: Picture, boxes: npt.NDArray[np.float64]) -> tuple[Picture, npt.NDArray[np.float64]]:
    """Makes a page look scanned: skew, which boxes follow, paper, shadows, the back page, blur and noise."""
    high, wide = image.shape[:2]
    if rng.random() < 0.7:
        turn = cv2.getRotationMatrix2D((wide / 2, high / 2), float(rng.normal(0, 0.5)), 1)
        edge = tuple(int(c) for c in image[2, 2])
        image = np.asarray(
            cv2.warpAffine(image, turn, (wide, high), flags=cv2.INTER_LINEAR, borderValue=edge), np.uint8
        )
        x0, y0, x1, y1 = boxes.T
        # A box's ink seldom fills its corners: the middles of its edges turn, and tell where it ends.
        points = np.stack([(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)], 1)
        moved_to = np.einsum("ij,jkn->ikn", turn[:, :2], points) + turn[:, 2][:, None, None]
        lean = np.abs(turn[0, 1])
        reach_x, reach_y = lean * (y1 - y0) / 2 * 0.8, lean * (x1 - x0) / 2 * 0.8
        boxes = np.stack(
            [moved_to[0, 0] - reach_x, moved_to[1, 2] - reach_y, moved_to[0, 1] + reach_x, moved_to[1, 3] + reach_y], 1
        )
        boxes = boxes.clip(0, (wide, high, wide, high))
    work: Any = image.astype(np.float32)
    if rng.random() < 0.6:
        work = np.repeat(work.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.2:  # the other side shines through
        work -= (255 - work[:, ::-1]) * rng.uniform(0.03, 0.12)
    paper = np.array(
        pick(rng, ((255, 255, 255), (250, 246, 232), (240, 238, 230), (232, 232, 232), (245, 230, 200))), np.float32
    )
    work *= paper / 255
    work *= 1 - rng.uniform(0, 0.15) * noise(rng, wide, high, 2)
    if rng.random() < 0.15:
        band = int(rng.integers(2, 16))
        work[:, :band] *= np.linspace(0.2, 1, band)[None, :, None]
    if rng.random() < 0.5:
        work = cv2.GaussianBlur(work, (0, 0), rng.uniform(0.3, 0.9))
    if rng.random() < 0.15:  # a copy in black and white
        work = 255 / (1 + np.exp(-(work - 150) / 12))
    grain = rng.normal(0, rng.uniform(1, 10), (high, wide, 1)).astype(np.float32)
    return np.clip(work + grain, 0, 255).astype(np.uint8), boxes
