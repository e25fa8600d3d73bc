"""Drawn documents with exact boxes: papers, reports, accounts, manuals, laws, magazines, slides, forms and more.

A page is a function of (seed, index) and of the installed typefaces alone. Boxes are tight to the visible ink.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dfine.data.synthetic.documents import pictures, text, writers
from dfine.data.synthetic.documents.pictures import BLACK, WHITE, Box, Colour, Picture, letters_on, pale
from dfine.data.synthetic.documents.text import LOOKS, Font, number, phrase, set_text, word, words
from dfine.data.synthetic.documents.writers import Group, Patch, Style, below, runs, set_prose, text_group, text_patch
from dfine.data.synthetic.ink import Rng, pick
from dfine.data.synthetic.pages import CLASSES, Drawn

Floats = npt.NDArray[np.float64]


class Kind(NamedTuple):
    """A kind of page: its share of all; then chances of things, and the weights of `WRITERS`."""

    share: float
    columns: list[int]  # each equally likely
    size: str
    pictures: str
    serif: float
    colourful: float
    title: float
    header: float
    footer: float
    notes: float
    weights: list[float]


def _kind(share: str, columns: str, size: str, pictures: str, *others: str) -> Kind:
    """Reads a row of the table in looks.yaml."""
    numbers = [float(each) for each in others]
    return Kind._make([float(share), [*map(int, columns)], size, pictures, *numbers[:6], numbers[6:]])


KINDS = {name: _kind(*row) for name, *row in map(str.split, LOOKS["kinds"].splitlines()[1:])}


@dataclass
class Page:
    """The picture of a page, the label and the xyxy box of each thing on it so far, and the part inside the margins."""

    image: Picture
    kind: str
    labels: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def put(self, patches: Sequence[Patch], x: int = 0, y: int = 0) -> None:
        """Puts patches on the page; what sticks out is cut off, and what is all outside is left out."""
        high, wide = self.image.shape[:2]
        for patch in patches:
            left, top, ink, colour = x + patch.x, y + patch.y, patch.ink, patch.colour
            box = (max(0, left), max(0, top), min(wide, left + patch.size[1]), min(high, top + patch.size[0]))
            x0, y0, x1, y1 = box
            if x1 <= x0 or y1 <= y0:
                continue
            rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
            if ink is None:
                self.image[y0:y1, x0:x1] = np.asarray(colour)[rows, columns]
            else:
                assert isinstance(colour, tuple)
                writers.blend(self.image, ink[rows, columns], colour, x0, y0)
            if patch.label:
                self.labels.append(CLASSES.index(patch.label))
                self.boxes.append(box)

    def ground(self, x0: int, x1: int, low: int, colour: Colour) -> None:
        """Paints a ground from the top of the page down to `low`, and forgets what it hides."""
        self.image[:low, x0:x1] = colour
        kept = [i for i, box in enumerate(self.boxes) if box[2] < x0 or box[0] > x1 or box[1] > low]
        self.labels, self.boxes = [self.labels[i] for i in kept], [self.boxes[i] for i in kept]


def draw_families(rng: Rng, language: str, serif: float, colourful: float) -> tuple[str, str]:
    """Draws the families of the text and of the headings."""
    if family := text.LANGUAGES[language].get("family"):
        return family, family
    if language == "Russian":
        return text.pick_family(rng, "cyrillic"), text.pick_family(rng, "cyrillic")
    family = text.pick_family(rng, "serif" if rng.random() < serif else "sans")
    if rng.random() < 0.5:
        return family, family
    return family, text.pick_family(rng, "display" if rng.random() < colourful / 2 else "sans")


def draw_style(rng: Rng, kind: str, scale: float) -> Style:
    """Draws the typography of a page; `scale` is pixels a point."""
    of = KINDS[kind]
    voice = text.draw_voice(rng)
    family, other = draw_families(rng, voice.language, of.serif, of.colourful)
    points = {name: rng.uniform(*span) for name, span in LOOKS["points"].items()}
    usual = rng.uniform(8, 10.5) if max(of.columns) > 1 and rng.random() < 0.7 else rng.uniform(9, 12)
    size = max(7.5, round(2 * points.get(kind, usual) * scale) / 2)
    pitch = size * float(rng.uniform(1.12, 1.35) if rng.random() < 0.75 else rng.uniform(1.3, 1.9))
    indented = rng.random() < (0.75 if of.pictures == "paper" or kind in ("book", "magazine") else 0.15)
    paper = pale(rng, 0.12) if rng.random() < 0.12 * (0.3 + of.colourful) else WHITE
    if kind in ("slide", "brochure", "cover", "poster") and rng.random() < 0.2:
        r, g, b = pictures.vivid(rng)
        paper, ink, accent = (r // 3, g // 3, b // 3), (245, 245, 245), pale(rng, 0.5)
    else:
        ink = pick(rng, (BLACK, BLACK, (35, 31, 32), (60, 60, 65)))
        sober = rng.random() >= of.colourful
        accent = pick(rng, (BLACK, BLACK, (40, 40, 40), (90, 90, 90))) if sober else pictures.vivid(rng)
    options: dict[str, list[str]] = LOOKS["look"] | (LOOKS["colourful_look"] if of.colourful > 0.3 else {})
    options |= LOOKS["law_look"] if kind == "law" else {}
    look = {part: pick(rng, looks) for part, looks in options.items()} | {"pictures": of.pictures}
    justified = of.pictures == "paper" or kind in ("law", "book")
    return Style(
        voice=voice,
        font=Font(family, size),
        head=Font(other, size * rng.uniform(1.0, 1.6), bold=rng.random() < 0.8),
        mono=Font(text.pick_family(rng, "mono"), 0.92 * size),
        pitch=pitch,
        align=pick(rng, ("justify", "justify", "justify", "left") if justified else ("justify", "left", "left")),
        indent=round(size * rng.uniform(1, 2)) if indented else 0,
        gap=pick(rng, (0, 0, 0, 1, 2)) if indented else round(pitch * pick(rng, (0.15, 0.3, 0.5, 0.5, 0.8, 1.0))),
        numbered=rng.random() < 0.4,
        ink=ink,
        accent=accent,
        paper=paper,
        small=Font(
            family if rng.random() < 0.75 else other,
            max(7.0, round(2 * size * rng.uniform(0.8, 1.0)) / 2),
            italic=rng.random() < 0.15,
        ),
        look=look,
    )


def fill(
    page: Page, rng: Rng, s: Style, weights: Floats, x: int, y: int, width: int, bottom: int, first: str = ""
) -> None:
    """Fills a column from y to the bottom, beginning with what the writer `first` draws."""
    names, last, top, failures = list(writers.WRITERS), "heading", True, 0
    while failures < 4 and y < bottom:
        chances = weights.copy()
        if last != "text":
            chances[names.index(last)] *= 0.1 if last == "heading" else 0
        name, first = first or str(rng.choice(names, p=runs(chances))), ""
        own = s._replace(indent=s.indent * int(rng.random() < 0.4)) if top and name == "text" else s
        group = writers.WRITERS[name](rng, own, width, bottom - y - (0 if top else s.gap))
        gap = 0 if top or group is None else group.gap
        if name == "text" and last == "heading":
            gap = min(gap, round(0.4 * s.pitch))
        if group is None or y + gap + group.high > bottom + 2:
            failures += 1
            continue
        page.put(group.patches, x, y + gap)
        y += gap + group.high
        last, top, failures = name, False, 0


def running_texts(rng: Rng, s: Style, kind: str) -> dict[str, str]:
    """Makes up a page number, a running head, and an address, a date or an identifier."""
    folio = pick(rng, LOOKS["folios"]).format(rng.integers(1, 400))
    head = phrase(rng, s.voice, 2, 8, pick(rng, ("first", "title", "upper")))
    if kind in ("paper", "article", "maths", "sources") and rng.random() < 0.5:
        form = pick(rng, LOOKS["journals"])
        names = [phrase(rng, s.voice, 1, most, "title") for most in (2, 3)]
        head = form.format(*names, rng.integers(1, 90), int(rng.integers(0, 26)))
    others = (
        phrase(rng, s.voice, 1, 3, "title"),
        f"www.{pick(rng, s.voice.rare)}.org",
        f"{rng.integers(1, 29)}/{rng.integers(1, 13)}/20{rng.integers(10, 26)}",
        f"10.{rng.integers(1000, 9999)}/{rng.integers(10000)}",
    )
    return {"folio": folio, "head": head, "other": pick(rng, others)}


def furniture(page: Page, rng: Rng, s: Style, label: str, y: int) -> None:
    """Puts running heads and page numbers into the upper or the lower margin, with rules and bars at times."""
    size = max(6.5, s.font.size * rng.uniform(0.7, 0.95))
    font = s.small._replace(size=size, italic=rng.random() < 0.25, bold=rng.random() < 0.15)
    colour = pick(rng, (s.ink, s.ink, (120, 120, 120), s.accent))
    if rng.random() < 0.07:
        high = round(size * 2)
        page.image[max(0, y - high // 3) : y + high] = s.accent
        colour = letters_on(s.accent)
    texts = running_texts(rng, s, page.kind)
    few = label == "Page-footer" and rng.random() < 0.6
    places = pick(rng, LOOKS["running"][: 5 if few else None]).split()
    width, count, end = page.right - page.left, 3 - places.count("-"), y
    taken: list[tuple[int, int]] = []
    for place, name in enumerate(places):
        if name == "-":
            continue
        align, fits = ("left", "center", "right")[place], width // count - 8 if count > 1 else width
        ink = set_text(words(texts[name], font), fits, round(1.2 * size), align, most=2)
        patch = text_patch(label, ink, colour, page.left + (width - ink.shape[1]) * place // 2, y)
        if patch.label:
            start, stop = patch.x, patch.x + patch.size[1]
            if all(start >= other[1] + 3 or other[0] >= stop + 3 for other in taken):
                page.put([patch])
            taken.append((start, stop))
            end = max(end, patch.y + patch.size[0])
    if rng.random() < 0.35:
        at = end + 4 if label == "Page-header" else y - 5
        colour, thick = pick(rng, (s.ink, s.accent, (170, 170, 170))), pick(rng, (1, 1, 1, 2, 3))
        page.image[at : at + thick, page.left : page.right] = colour


def title_block(rng: Rng, s: Style, width: int, kind: str) -> Group:
    """Draws a title and what belongs to it: authors and an abstract, or a subtitle."""
    big = {"cover": 2.8, "poster": 3.0, "magazine": 2.6, "brochure": 2.4}.get(kind, 1.75) * rng.uniform(0.75, 1.4)
    font = s.head._replace(size=min(big * s.font.size, width / 7), bold=rng.random() < 0.75)
    align = pick(rng, ("left", "left", "center"))
    case = pick(rng, ("first", "title", "title", "upper"))
    title = phrase(rng, s.voice, 1, 6 if kind in ("cover", "magazine", "brochure", "form") else 16, case)
    ink = set_text(words(title, font), width, round(font.size * rng.uniform(1.05, 1.25)), align, most=5)
    groups = [text_group("Title", ink, pick(rng, (s.ink, s.accent)))]
    space = round(s.pitch * rng.uniform(0.5, 1.5))
    if kind == "paper":
        groups += authors(rng, s, width, align, space)
        if rng.random() < 0.8:
            groups += abstract(rng, s, width, space)
    elif rng.random() < 0.5:
        sub = s.head._replace(size=max(s.font.size, 0.5 * font.size), bold=False, italic=rng.random() < 0.3)
        lines, label = rng.uniform(0.3, 1.6), pick(rng, ("Text", "Text", "Section-header"))
        groups.append(set_prose(rng, s, width, lines, sub, label, align)._replace(gap=space))
    group = below(groups)
    return group._replace(high=group.high + 2 * space)


def authors(rng: Rng, s: Style, width: int, align: str, space: int) -> list[Group]:
    """Draws the authors of a paper and where they work."""
    marks = ("", "*", "1", "1,2", " and")
    names = [phrase(rng, s.voice, 2, 3, "title") + pick(rng, marks) for _ in range(int(rng.integers(1, 9)))]
    font = s.font._replace(bold=rng.random() < 0.4, size=1.05 * s.font.size)
    ink = set_text(words(", ".join(names), font), width, round(1.3 * font.size), align)
    groups = [text_group("Text", ink, s.ink, space)]
    for _ in range(int(rng.integers(0, 4))):
        font = s.small._replace(italic=rng.random() < 0.5)
        place = set_prose(rng, s, width, rng.uniform(0.4, 1.8), font, align=align)
        groups.append(place._replace(gap=pick(rng, (1, 4, space // 2))))
    return groups


def abstract(rng: Rng, s: Style, width: int, space: int) -> list[Group]:
    """Draws an abstract of one or more paragraphs, mostly with its name above and at times with key words below."""
    inset, groups = pick(rng, (0, 0, round(0.08 * width))), []
    if rng.random() < 0.6:
        name, font = pick(rng, LOOKS["abstracts"]), s.font._replace(bold=rng.random() < 0.8)
        ink = set_text([word(name, font)], width - inset, round(1.3 * font.size), pick(rng, ("left", "center")))
        groups.append(text_group("Section-header", ink, s.accent, space, inset // 2))
    parts = 1 if rng.random() < 0.6 else int(rng.integers(2, 5))
    for _ in range(parts):
        part = set_prose(rng, s, width - inset, rng.uniform(5, 14) / parts + 1, s.small)
        groups.append(Group(writers.moved(part, inset // 2, 0), part.high, pick(rng, (3, space // 2))))
    if rng.random() < 0.5:
        groups.append(set_prose(rng, s, width - inset, rng.uniform(0.4, 1.4), s.small)._replace(gap=space // 2))
    return groups


def put_logo(page: Page, rng: Rng, s: Style, x: int, y: int, high: int) -> None:
    """Puts a logo three times as wide as high on the page."""
    logo = pictures.picture(rng, "logo", 3 * high, high, s.paper, s.voice, s.head.family)
    page.put([writers.picture_patch("Picture", logo, s.paper)], x, y)


def cover(page: Page, rng: Rng, s: Style) -> None:
    """Fills a page with a large title, mostly over or beside a picture or a block of colour."""
    high, wide = page.image.shape[:2]
    side, look = round(0.09 * wide), pick(rng, ("over", "half", "colour", "plain"))
    y, width = round(high * rng.uniform(0.1, 0.5)), wide - 2 * side
    if look == "over":
        page.image[:] = (pictures.photo(rng, wide, high) * rng.uniform(0.25, 0.6)).astype(np.uint8)
        s = s._replace(ink=WHITE, accent=WHITE)
    elif look == "colour":
        s = s._replace(ink=WHITE, accent=WHITE, paper=s.accent if sum(s.accent) < 400 else (30, 50, 90))
        page.image[:] = s.paper
    elif look == "half":
        at, part, start = pick(rng, ((0, 0.45, 0.5), (0.5, 0.5, 0.08), (0.25, 0.4, 0.7)))
        inset = pick(rng, (0, 0, side))
        shot = pictures.photo(rng, wide - 2 * inset, round(part * high))
        page.put([Patch("Picture", None, shot, inset, round(at * high))])
        y = round(high * start)
    title = title_block(rng, s, width, "cover")
    page.put(title.patches, side, y)
    y += title.high
    for _ in range(int(rng.integers(0, 4))):
        y += round(s.pitch * rng.uniform(0.2, 2))
        line = set_prose(rng, s, width, rng.uniform(0.2, 1.4), s.font, align="left")
        if y + line.high < high * (0.48 if look == "half" and y < 0.5 * high else 0.92):
            page.put(line.patches, side, y)
            y += line.high
    if look != "over" and rng.random() < 0.6 and (look != "half" or y < 0.4 * high):
        size = round(0.07 * high)
        x = side if rng.random() < 0.5 else wide - side - 3 * size
        put_logo(page, rng, s, x, round(0.02 * high) if look == "half" else round(0.93 * high) - size, size)


def letter_head(page: Page, rng: Rng, s: Style) -> None:
    """Puts a sign, the sender, the date and the address of a letter or an invoice at the top."""
    size, width = round(4 * s.font.size), page.right - page.left
    if rng.random() < 0.7:
        x = page.left if rng.random() < 0.6 else page.right - 3 * size
        put_logo(page, rng, s, x, page.top, size)
        page.top += size + round(s.pitch)
    for _ in range(int(rng.integers(1, 4))):
        font = s.font._replace(bold=rng.random() < 0.15)
        lines = [
            word(phrase(rng, s.voice, 1, 4, "title") if rng.random() < 0.7 else number(rng), font)
            for _ in range(int(rng.integers(1, 6)))
        ]
        wide = max(line.shape[1] for line in lines)
        ink = np.zeros((round(len(lines) * s.pitch + s.font.size), wide), np.uint8)
        for row, line in enumerate(lines):
            y = round(row * s.pitch)
            ink[y : y + line.shape[0], : line.shape[1]] |= line
        page.put([text_patch("Text", ink, s.ink)], page.left + pick(rng, (0, 0, max(0, width - wide))), page.top)
        page.top += ink.shape[0] + round(s.pitch * rng.uniform(0.3, 1.5))


def slide_head(page: Page, rng: Rng, s: Style) -> None:
    """Puts the heading of a slide at the top, at times on a bar."""
    font = s.head._replace(size=s.font.size * rng.uniform(1.3, 1.9))
    inks, align = words(phrase(rng, s.voice, 1, 7), font), pick(rng, ("left", "left", "center"))
    ink, colour = set_text(inks, page.right - page.left, round(1.2 * font.size), align, most=2), s.accent
    if rng.random() < 0.25:
        page.ground(0, page.image.shape[1], page.top + ink.shape[0] + 6, s.accent)
        colour = letters_on(s.accent)
    page.put([text_patch("Section-header", ink, colour, page.left, page.top)])
    page.top += ink.shape[0] + round(s.pitch)


def stamp(page: Page, rng: Rng, s: Style) -> None:
    """Puts the stamp of an archive along the left margin."""
    source = f"arXiv:{rng.integers(1000, 2600)}.{rng.integers(10000, 99999)}v1  [cs.{phrase(rng, s.voice, 1, 1)}]"
    patch = text_patch("Page-header", word(source, s.font._replace(size=1.3 * s.font.size)), (120, 120, 120))
    assert patch.ink is not None
    turned = patch._replace(ink=np.rot90(patch.ink), x=max(4, page.left // 3), y=page.image.shape[0] // 4)
    page.put([turned])


def side_bar(page: Page, rng: Rng, s: Style) -> None:
    """Puts a tinted bar with a column of its own at the left or the right of a page."""
    high, wide = page.image.shape[:2]
    bar, on_left = round(wide * rng.uniform(0.22, 0.33)), rng.random() < 0.5
    tint = pick(rng, (s.accent, pale(rng, 0.3)))
    x = 0 if on_left else wide - bar
    page.ground(x, x + bar, high, tint)
    inner = writers.on_ground(s, tint)._replace(font=s.font._replace(size=max(7.0, 0.9 * s.font.size)))
    weights = np.array([5.0, 3, 2, 1, 0, 0, 0, 0, 0, 0.5, 0, 1])
    fill(page, rng, inner, weights, x + 12, page.top, bar - 24, round(page.bottom * rng.uniform(0.4, 1)))
    page.left, page.right = (bar + 16, page.right) if on_left else (page.left, x - 16)


def margin_notes(page: Page, rng: Rng, s: Style) -> None:
    """Puts small notes into a wide margin at the left or the right."""
    high, wide = page.image.shape[:2]
    band, on_left, y = round(wide * rng.uniform(0.12, 0.25)), rng.random() < 0.6, page.top
    font = s.small._replace(size=max(6.5, 0.9 * s.small.size), bold=rng.random() < 0.3)
    while y < page.bottom and rng.random() < 0.85:
        y += round(high * rng.uniform(0.0, 0.15))
        lines, colour = rng.uniform(0.5, 5), pick(rng, (s.ink, s.accent))
        note = set_prose(rng, s._replace(ink=colour), band - 12, lines, font, align="left")
        if y + note.high < page.bottom:
            page.put(note.patches, page.left if on_left else page.right - band + 12, y)
        y += note.high + round(2 * s.pitch)
    page.left, page.right = (page.left + band, page.right) if on_left else (page.left, page.right - band)


def compose(page: Page, rng: Rng, s: Style) -> None:
    """Fills a page: margins, running lines, a title, things across the page, and columns."""
    kind, of = page.kind, KINDS[page.kind]
    high, wide = page.image.shape[:2]
    weights = np.array(of.weights) * rng.gamma(2.0, 0.5, len(of.weights))
    weights[0] = max(weights[0], 0.5 * of.weights[0] + 0.2)
    side, top, low = (round(size * rng.uniform(0.05, 0.12)) for size in (wide, high, high))
    if kind == "slide":
        side, top = round(wide * rng.uniform(0.04, 0.09)), round(high * rng.uniform(0.05, 0.1))
    page.left, page.top, page.right, page.bottom = side, top, wide - side, high - low
    if of.colourful > 0.8 and rng.random() < 0.15 and sum(s.paper) > 600:  # a ground that fades
        fade = np.linspace(0, 1, high)[:, None, None] * (np.array(pale(rng, 0.25)) - np.array(s.paper))
        page.image[:] = (page.image + fade).astype(np.uint8)
    if rng.random() < of.header:
        furniture(page, rng, s, "Page-header", max(4, round(top * rng.uniform(0.3, 0.6))))
        page.top += round(1.3 * s.font.size)
    if rng.random() < of.footer:
        y = page.bottom + round(low * rng.uniform(0.25, 0.6))
        furniture(page, rng, s, "Page-footer", min(high - round(2 * s.font.size), y))
    if kind in ("paper", "article", "maths") and rng.random() < 0.04:
        stamp(page, rng, s)
    barred = kind in ("report", "brochure", "magazine", "manual")
    if barred and rng.random() < 0.2 * (0.4 + of.colourful) and wide > 500:
        side_bar(page, rng, s)
    elif kind in ("law", "book", "manual", "report", "paper") and rng.random() < (0.4 if kind == "law" else 0.12):
        margin_notes(page, rng, s)
    first = ""
    if kind == "slide":
        slide_head(page, rng, s)
        first = pick(rng, ("list", "list", "figure", ""))
        page.bottom = round(page.top + (page.bottom - page.top) * rng.uniform(0.5, 1))
    elif kind == "letter" or (kind == "form" and rng.random() < 0.3):
        letter_head(page, rng, s)
    width = page.right - page.left
    if rng.random() < of.title:
        title = title_block(rng, s, width, kind)
        if title.high < 0.6 * (page.bottom - page.top):
            page.put(title.patches, page.left, page.top)
            page.top += title.high
    if rng.random() < of.notes:
        foot = writers.notes(rng, s, width if rng.random() < 0.6 else width // 2 - 10, int(rng.integers(1, 5)))
        if foot.high < 0.3 * (page.bottom - page.top):
            page.bottom -= foot.high
            page.put(foot.patches, page.left, page.bottom)
            page.bottom -= round(s.pitch)
    fill_columns(page, rng, s, weights, first)


def fill_columns(page: Page, rng: Rng, s: Style, weights: Floats, first: str) -> None:
    """Fills the rest of a page with columns, at times with a picture or a table across them."""
    width, of = page.right - page.left, KINDS[page.kind]
    columns = max(1, min(pick(rng, of.columns), round(width / (9 * s.font.size))))
    gutter = round(s.font.size * rng.uniform(1.2, 3))
    if columns > 1 and rng.random() < 0.45:
        writer = writers.figure if rng.random() < 0.6 or page.kind == "magazine" else writers.tabular
        across = writer(rng, s, width, round((page.bottom - page.top) * rng.uniform(0.3, 0.75)))
        if across and rng.random() < 0.7:
            page.put(across.patches, page.left, page.top)
            page.top += across.high + round(s.pitch * rng.uniform(0.5, 1.5))
        elif across:
            page.bottom -= across.high
            page.put(across.patches, page.left, page.bottom)
            page.bottom -= round(s.pitch)
    if rng.random() < (0.12 if columns == 1 else 0.08):  # the last page of something
        page.bottom = round(page.top + (page.bottom - page.top) * rng.uniform(0.15, 0.8))
    shares = (1 / columns,) * columns
    if columns == 2 and of.colourful > 0.4 and rng.random() < 0.25:
        shares = pick(rng, ((0.35, 0.65), (0.62, 0.38), (0.3, 0.7)))
    x, ruled = page.left, columns > 1 and rng.random() < 0.08
    for i, share in enumerate(shares):
        column = round((width - gutter * (columns - 1)) * share)
        part = 1 if rng.random() < 0.8 else rng.uniform(0.5, 1)
        bottom = round(page.top + (page.bottom - page.top) * part)
        fill(page, rng, s, weights, x, page.top, column, bottom, "" if i else first)
        x += column + gutter
        if ruled and i < columns - 1:
            page.image[page.top : page.bottom, x - gutter // 2] = (150, 150, 150)


def scan(rng: Rng, image: Picture, boxes: Floats) -> tuple[Picture, Floats]:
    """Makes a page look scanned: skew, which boxes follow, paper, shadows, the back page, blur and noise."""
    high, wide = image.shape[:2]
    if rng.random() < 0.7:
        turn = np.asarray(cv2.getRotationMatrix2D((wide / 2, high / 2), float(rng.normal(0, 0.5)), 1), np.float64)
        edge = tuple(int(c) for c in image[2, 2])
        image = np.asarray(
            cv2.warpAffine(image, turn, (wide, high), flags=cv2.INTER_LINEAR, borderValue=edge), np.uint8
        )
        boxes = turned_boxes(boxes, turn).clip(0, (wide, high, wide, high))
    work: Any = image.astype(np.float32)
    if rng.random() < 0.6:
        work = np.repeat(work.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.2:  # the other side shines through
        work -= (255 - work[:, ::-1]) * rng.uniform(0.03, 0.12)
    paper = pick(rng, (WHITE, (250, 246, 232), (240, 238, 230), (232, 232, 232), (245, 230, 200)))
    work *= np.array(paper, np.float32) / 255
    work *= 1 - rng.uniform(0, 0.15) * pictures.noise(rng, wide, high, 2)
    if rng.random() < 0.15:
        band = int(rng.integers(2, 16))
        work[:, :band] *= np.linspace(0.2, 1, band)[None, :, None]
    if rng.random() < 0.5:
        work = cv2.GaussianBlur(work, (0, 0), rng.uniform(0.3, 0.9))
    if rng.random() < 0.15:  # a copy in black and white
        work = 255 / (1 + np.exp(-(work - 150) / 12))
    return pictures.as_picture(work + rng.normal(0, rng.uniform(1, 10), (high, wide, 1)).astype(np.float32)), boxes


def turned_boxes(boxes: Floats, turn: Floats) -> Floats:
    """The boxes of what was turned by a matrix (2, 3).

    A box's ink seldom fills its corners: the middles of its edges turn, and tell where it ends.
    """
    x0, y0, x1, y1 = boxes.T
    points = np.stack([(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), ((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)], 1)
    (left, right, *_), (*_, top, low) = np.einsum("ij,jkn->ikn", turn[:, :2], points) + turn[:, 2][:, None, None]
    lean = np.abs(turn[0, 1])
    reach_x, reach_y = lean * (y1 - y0) / 2 * 0.8, lean * (x1 - x0) / 2 * 0.8
    return np.stack([left - reach_x, top - reach_y, right + reach_x, low + reach_y], 1)


def _start(rng: Rng) -> tuple[str, int, int, int]:
    """Draws the kind of a page, its size before it is turned, and the quarter turns."""
    kind = str(rng.choice(list(KINDS), p=runs([row.share for row in KINDS.values()])))
    look, short, ratio = KINDS[kind].size, int(rng.integers(590, 760)), pick(rng, (11 / 8.5, 2**0.5))
    if look == "slide":
        return kind, round(short * pick(rng, (4 / 3, 16 / 9, 16 / 9))), short, 0
    if look == "book":
        return kind, short, round(short * rng.uniform(1.3, 1.65)), 0
    if look == "odd" and rng.random() < 0.4:
        wide, long = rng.random() < 0.5, round(short * rng.uniform(1.0, 1.6))
        return (kind, long, short, 0) if wide else (kind, short, long, 0)
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
    page = Page(np.full((high, wide, 3), s.paper, np.uint8), kind)
    (cover if kind == "cover" else compose)(page, rng, s)
    image, boxes = page.image, np.array(page.boxes, np.float64).reshape(-1, 4)
    if rng.random() < {"letter": 0.4, "form": 0.3, "patent": 0.7, "slide": 0.02, "brochure": 0.02}.get(kind, 0.1):
        image, boxes = scan(rng, image, boxes)
    for _ in range(turns):  # a quarter turn to the left
        image = np.ascontiguousarray(np.rot90(image))
        boxes = np.stack([boxes[:, 1], image.shape[0] - boxes[:, 2], boxes[:, 3], image.shape[0] - boxes[:, 0]], 1)
    return image, np.array(page.labels, np.int64), np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
