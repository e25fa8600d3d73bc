"""Typefaces, words of several languages and set text of the drawn documents.

The typefaces come from the extra `pages`: the `fontpkg-*` wheels, found by `fontpkg`, and those inside matplotlib
(STIX, Computer Modern, DejaVu). Those that are not installed are left out; with none, Pillow's own face does all.
Pages are the same everywhere only where the same typefaces are installed.
"""

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from dfine.data.synthetic.ink import FAINT, Ink, Rng, break_lines, paste, pick

LOOKS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("looks.yaml").read_text(encoding="utf-8"))
FACES: dict[str, list[str]] = LOOKS["faces"]
LANGUAGES: dict[str, dict[str, Any]] = LOOKS["languages"]
PLAIN = str.maketrans("–—’‘“”•§×−·…éèàâêôûçäöüß°±≤", "--''\"\"*S.-..eeaaeoucaous.+=")  # for faces of few letters


class Font(NamedTuple):
    """A cut of a typeface; `size` in pixels, the family "" is Pillow's own."""

    family: str
    size: float
    bold: bool = False
    italic: bool = False


class Voice(NamedTuple):
    """The words of a page."""

    language: str
    common: Sequence[str]
    rare: Sequence[str]
    cites: str  # "[{}]", "({}, 20{})" or nothing


@cache
def matplotlib_fonts() -> Path | None:
    """Where matplotlib keeps its typefaces, without importing it."""
    spec = find_spec("matplotlib")
    return Path(spec.origin).with_name("mpl-data") / "fonts/ttf" if spec and spec.origin else None


@cache
def families() -> frozenset[str]:
    """The installed ones of the families that pages are set in."""
    wanted = {name for names in FACES.values() for name in names}
    wanted |= {language["family"] for language in LANGUAGES.values() if "family" in language}
    found = set(LOOKS["matplotlib"]) if matplotlib_fonts() else set()
    if find_spec("fontpkg"):
        import fontpkg

        found |= {fontpkg.family(slug).name for slug in fontpkg.families()}
    if missing := wanted - found:
        warnings.warn(
            f"{len(missing)} of {len(wanted)} typefaces are missing, so drawn documents differ from those of a full "
            "installation: pip install 'dfine[pages]'",
            stacklevel=2,
        )
    return frozenset(wanted & found)


def pick_family(rng: Rng, use: str) -> str:
    """Returns an installed family for a use (a key of `FACES`), or else Pillow's own."""
    return pick(rng, [name for name in FACES[use] if name in families()] or [""])


@lru_cache(maxsize=1024)
def face(font: Font) -> ImageFont.FreeTypeFont:
    """Opens a cut of a typeface."""
    root = matplotlib_fonts()
    weight, style = 700 if font.bold else 400, "italic" if font.italic else "normal"
    if not font.family:
        built_in = ImageFont.load_default(font.size)
        assert isinstance(built_in, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return built_in
    if font.family in LOOKS["matplotlib"] and root:
        file = str(root / f"{LOOKS['matplotlib'][font.family][2 * font.bold + font.italic]}.ttf")
    else:
        import fontpkg

        styles = fontpkg.family(font.family).styles
        file = str(fontpkg.path(font.family, weight, style if style in styles else "normal", nearest=True))
    opened = ImageFont.truetype(file, font.size, layout_engine=ImageFont.Layout.BASIC)
    if "[" in file:  # a variable one, which may begin at its thinnest
        axes: list[Any] = opened.get_variation_axes()
        set_to = [
            min(max(weight, a["minimum"]), a["maximum"]) if a["name"] == b"Weight" else a["default"] for a in axes
        ]
        opened.set_variation_by_axes(set_to)
    return opened


@lru_cache(maxsize=1 << 16)
def _glyph(character: str, font: Font) -> tuple[Ink, int, float]:
    """Returns the ink of a character, the row of its top below the baseline, and the way to the next character."""
    opened = face(font)
    stroke = font.size / 30 if font.bold and not font.family else 0  # Pillow's own face has no bold cut
    image = Image.new("L", (ceil(opened.getlength(character)) + round(font.size) + 4, round(3 * font.size)))
    base = 2 * round(font.size)
    ImageDraw.Draw(image).text((round(font.size / 2), base), character, 255, opened, anchor="ls", stroke_width=stroke)
    ink = np.asarray(image)
    rows = np.flatnonzero(ink.any(axis=1))
    first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (base - 1, base)
    return ink[first:last], first - base, opened.getlength(character) + stroke


@lru_cache(maxsize=1 << 16)
def word(text: str, font: Font, rise: float = 0.0, line: float = 0.0) -> Ink:
    """Returns the ink of a word, or of several, without side bearings; not to be written to.

    Its height is that of a line of size `line` (0: its own), 1.6 times the size, with the baseline at 1.15; `rise`
    lifts it by so many pixels. Characters are drawn once and then copied, for FreeType takes longer than all the rest.
    """
    font = font._replace(size=round(2 * font.size) / 2)  # few sizes, many copies
    line = line or font.size
    poor = not font.family or "Computer" in font.family  # few letters beside ASCII
    glyphs = [_glyph(character, font) for character in (text.translate(PLAIN) if poor else text)]
    base, high = round(1.15 * line - rise), round(1.6 * line)
    canvas = np.zeros((high, ceil(sum(advance for *_, advance in glyphs) + 2 * font.size + 6)), np.uint8)
    x = 0.0
    for ink, top, advance in glyphs:
        above = max(0, -(base + top))
        paste(canvas, ink[above:], round(x), base + top + above)
        x += advance
    columns = np.flatnonzero(canvas.max(axis=0) >= FAINT)
    return canvas[:, columns[0] : columns[-1] + 1] if len(columns) else canvas[:, :2]


def words(text: str, font: Font) -> list[Ink]:
    """Returns the ink of each word of a text."""
    return [word(each, font) for each in text.split()]


@cache
def _lexicon(language: str) -> list[str]:
    """Makes up 1,500 words of a language."""
    rng = np.random.default_rng(7)
    return [_made_up(rng, LANGUAGES[language]) for _ in range(1500)]


def _made_up(rng: Rng, language: dict[str, Any]) -> str:
    """Makes up a word: letters with signs here and there, or parts that words begin with, have inside and end with."""
    if "letters" in language:
        letters, signs = language["letters"], language["signs"]
        count = int(rng.integers(1, 6))
        return "".join(pick(rng, letters) + pick(rng, signs) * (rng.random() < 0.4) for _ in range(count))
    starts, cores, ends = (language[part].split() for part in ("starts", "cores", "ends"))
    text = pick(rng, starts) + pick(rng, cores)
    for _ in range(pick(rng, (0, 1, 1, 2))):
        text += pick(rng, starts).lower()[-2:].strip("'") + pick(rng, cores)
    return text + pick(rng, ends)


def draw_voice(rng: Rng) -> Voice:
    """Draws the language of a page and the words that it uses."""
    language = str(rng.choice(list(LANGUAGES), p=[each["share"] for each in LANGUAGES.values()]))
    if LANGUAGES[language].get("family", "") not in {"", *families()}:
        language = "English"
    lexicon, common = _lexicon(language), LANGUAGES[language].get("common", "").split()
    rare = [lexicon[i] for i in rng.integers(len(lexicon), size=260)]
    return Voice(language, common or rare[:50], rare, pick(rng, ("", "", "", "[{}]", "[{}]", "({})", "({}, 20{})")))


def number(rng: Rng) -> str:
    """Makes up a number as it stands in text and in tables."""
    form = pick(rng, LOOKS["numbers"])
    return form.format(10 ** rng.uniform(0, 4))


def phrase(rng: Rng, voice: Voice, low: int = 1, high: int = 4, case: str = "first") -> str:
    """Makes up some words without a stop; `case`: first, title or upper."""
    count = int(rng.integers(low, high + 1))
    text = " ".join(pick(rng, voice.rare if rng.random() < 0.75 else voice.common) for _ in range(count))
    return {"title": text.title(), "upper": text.upper()}.get(case, text[:1].upper() + text[1:])


def prose(rng: Rng, voice: Voice, count: float, font: Font) -> list[Ink]:
    """Returns words of sentences, with stops, numbers, references and some in other cuts."""
    inks, fresh, cut = [], True, font
    for place, mark, odd in rng.random((max(1, int(count)), 3)).tolist():
        choice = voice.common if place < 0.42 else voice.rare
        text = choice[int(place * 997) % len(choice)]
        if odd < 0.03:
            text = number(rng)
        elif odd < 0.04:
            text = text.upper()
        elif odd < 0.05:
            cut = pick(rng, (font._replace(italic=True), font._replace(bold=True), font))
        elif odd < 0.08 and voice.cites:
            text += " " + voice.cites.format(rng.integers(1, 90), rng.integers(10, 25))
        text = text[:1].upper() + text[1:] if fresh else text
        fresh = mark < 0.06
        inks.append(word(text + ("." if fresh else "," if mark < 0.12 else ""), cut))
        if 0.08 < odd < 0.085:
            inks.append(raised(str(rng.integers(1, 30)), font, 0.65, 0.4))
        if odd > 0.8:
            cut = font
    return inks


def raised(text: str, font: Font, size: float, rise: float) -> Ink:
    """Returns the ink of a small raised mark in a line of a font; `size` and `rise` are parts of the font's size."""
    return word(text, font._replace(size=size * font.size), rise * font.size, font.size)


def set_text(
    inks: Sequence[Ink],
    width: int = 0,
    pitch: int = 0,
    align: str = "left",
    first: int = 0,
    rest: int = 0,
    most: int = 99,
) -> Ink:
    """Sets words in lines of `width` pixels (0: one line), `pitch` apart, and keeps `most` of them.

    `first` and `rest` are the indents of the first and of the other lines.
    """
    high = inks[0].shape[0]
    space = max(3, round(0.2 * high))
    width = width or first + sum(ink.shape[1] + space for ink in inks)
    lines, cut = break_lines(inks, width, space, first, rest, most)
    canvas = np.zeros((pitch * (len(lines) - 1) + max(high, pitch), width), np.uint8)
    for row, line in enumerate(lines):
        start = rest if row else first
        slack = width - start - sum(ink.shape[1] for ink in line) - space * (len(line) - 1)
        spread = align == "justify" and len(line) > 2 and (cut or row < len(lines) - 1)
        step = slack / (len(line) - 1) if spread else 0.0
        x = start + max(0, {"center": slack / 2, "right": slack}.get(align, 0.0))
        for ink in line:
            paste(canvas, ink, round(x), row * pitch)
            x += ink.shape[1] + space + step
    return canvas
