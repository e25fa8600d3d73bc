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
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dfine.data.synthetic.ink import FAINT, Ink, Rng, paste, pick

# fmt: off
MATPLOTLIB = {  # family: regular, italic, bold, bold italic
    "STIX": ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta"),
    "Computer Modern": ("cmr10", "cmti10", "cmb10", "cmb10"),
    "Computer Modern Sans": ("cmss10",) * 4,
    "Computer Modern Mono": ("cmtt10",) * 4,
    "DejaVu Sans": ("DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-Bold", "DejaVuSans-BoldOblique"),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic"),
    "DejaVu Sans Mono": ("DejaVuSansMono", "DejaVuSansMono-Oblique", "DejaVuSansMono-Bold", "DejaVuSansMono-Bold"),
}
SERIF = (  # named as often as it is likely
    "STIX", "STIX", "STIX", "STIX", "STIX", "Computer Modern", "Computer Modern", "Computer Modern", "EB Garamond",
    "EB Garamond", "Crimson Text", "Crimson Text", "PT Serif", "PT Serif", "Noto Serif", "Libre Baskerville",
    "IBM Plex Serif", "DejaVu Serif", "Playfair Display",
)
SANS = (
    "Arimo", "Arimo", "Arimo", "Arimo", "Arimo", "Open Sans", "Open Sans", "Fira Sans", "IBM Plex Sans", "Montserrat",
    "Poppins", "Roboto Condensed", "PT Sans Narrow", "DejaVu Sans", "Computer Modern Sans",
)
MONO = ("IBM Plex Mono", "DejaVu Sans Mono", "Computer Modern Mono", "IBM Plex Mono")
DISPLAY = ("Oswald", "Oswald", "Playfair Display", "Roboto Slab", "Zilla Slab", "Kalam", "Poppins", "Montserrat")
CYRILLIC = ("STIX", "Arimo", "Arimo", "Open Sans", "PT Serif", "Noto Serif", "DejaVu Sans")

# language: its share, frequent words, and what longer ones begin with, have inside and end with
LANGUAGES = {
    "English": (0.66,
        "the of and to in a is for with that by on as are at from this be we which can it or not was have each both "
        "than these between under over first given using where such more most after new its may other all will no",
        "b c d f g h l m n p r s t v w st tr pr con ex pl cl sp gr in re de un str ch th qu br",
        "a e i o u a e i o ea ou ai io", "n r t l s d nt st ct rd m ss ll ng tion ment ly er ing ed al ive ity ence"),
    "German": (0.1,
        "der die und in den von zu das mit sich des auf ist im dem nicht ein eine als auch es an werden aus er hat daß "
        "sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr",
        "B G F K W S Sch St L M N P T V Z Ab An Auf Ver be ge ent er un", "a e i o u ei au ie ä ü ö e",
        "n r t ch ck ng st rt ss nd ung heit keit lich isch en er te tz lung stand recht"),
    "French": (0.1,
        "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont la avec ou son "
        "aux cette ces mais comme leur être nous fait sans peut si même ont été entre dont tout ses deux d'une l'on",
        "b c d f g l m n p r s t v ch pr tr pl br ré dé con in l' d' qu'", "a e i o u é è ai ou au oi eu",
        "r t l s n nt que tion ment eur euse té ée ance ique ible ir er age"),
    "Latin": (0.06,
        "et in ad non est cum de ut qui ex per sed quod ab aut si a sunt esse ac quae pro nec atque hoc te se enim",
        "v c d f l m n p r s t con in pr tr qu pl", "a e i o u ae", "m s t r nt us um is orum ibus are ere it unt"),
    "Russian": (0.03,
        "и в не на с что по как из у за от для к это его то а все но при же так они был или бы до мы",
        "п с в р к м т н д б г пр ст тр раз по на", "а е и о у я ы ю", "л т н р м в ция ние ость ский ный ать ого ых"),
    "Devanagari": (0.015, "", "", "", ""),
    "Thai": (0.015, "", "", "", ""),
    "Arabic": (0.02, "", "", "", ""),
}
SCRIPTS = {  # letters only, so that shapes are right but words are not
    "Devanagari": ("Noto Sans Devanagari", "कखगघचछजझटठडढणतथदधनपफबभमयरलवशषसहअआइईउ", "ािीुूेैोौं"),
    "Thai": ("Noto Sans Thai", "กขคงจฉชซญดตถทธนบปผพฟมยรลวสหอ", "ะาเแโไำฯ"),
    "Arabic": ("Noto Sans Arabic", "ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "اوي"),
}
# fmt: on
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
    return (
        Path(spec.submodule_search_locations[0], "mpl-data/fonts/ttf")
        if spec and spec.submodule_search_locations
        else None
    )


@cache
def families() -> frozenset[str]:
    """The installed ones of the families that pages are set in."""
    wanted = {*SERIF, *SANS, *MONO, *DISPLAY, *(family for family, *_ in SCRIPTS.values())}
    found = set(MATPLOTLIB) if matplotlib_fonts() else set()
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


def pick_family(rng: Rng, names: Sequence[str]) -> str:
    """Returns an installed family of these, or else Pillow's own."""
    return pick(rng, [name for name in names if name in families()] or [""])


@lru_cache(maxsize=1024)
def face(font: Font) -> ImageFont.FreeTypeFont:
    """Opens a cut of a typeface."""
    root = matplotlib_fonts()
    if not font.family:
        built_in = ImageFont.load_default(font.size)
        assert isinstance(built_in, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return built_in
    if font.family in MATPLOTLIB and root:
        file = str(root / f"{MATPLOTLIB[font.family][2 * font.bold + font.italic]}.ttf")
    else:
        import fontpkg

        weight, style = 700 if font.bold else 400, "italic" if font.italic else "normal"
        styles = fontpkg.family(font.family).styles
        file = str(fontpkg.path(font.family, weight, style if style in styles else "normal", nearest=True))
    opened = ImageFont.truetype(file, font.size, layout_engine=ImageFont.Layout.BASIC)
    if "[" in file:  # a variable one
        axes = opened.get_variation_axes()
        opened.set_variation_by_axes([700 if font.bold and a["name"] == b"Weight" else _usual(a) for a in axes])
    return opened


def _usual(axis: object) -> float:
    """The setting of an axis for ordinary text: some families begin at their thinnest."""
    assert isinstance(axis, dict)
    return (
        float(max(axis["minimum"], min(400, axis["maximum"]))) if axis["name"] == b"Weight" else float(axis["default"])
    )


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
    glyphs = [_glyph(character, font) for character in (text.translate(PLAIN) if _is_poor(font) else text)]
    base, high = round(1.15 * line - rise), round(1.6 * line)
    canvas = np.zeros((high, ceil(sum(advance for *_, advance in glyphs) + 2 * font.size + 6)), np.uint8)
    x = 0.0
    for ink, top, advance in glyphs:
        above = max(0, -(base + top))
        paste(canvas, ink[above:], round(x), base + top + above)
        x += advance
    columns = np.flatnonzero(canvas.max(axis=0) >= FAINT)
    return canvas[:, columns[0] : columns[-1] + 1] if len(columns) else canvas[:, :2]


def _is_poor(font: Font) -> bool:
    """Whether a typeface has few letters beside ASCII."""
    return not font.family or "Computer" in font.family


@cache
def _lexicon(language: str) -> tuple[str, ...]:
    """Makes up 1,500 words of a language."""
    rng = np.random.default_rng(7)
    words = []
    for _ in range(1500):
        if language in SCRIPTS:
            _, letters, signs = SCRIPTS[language]
            count = int(rng.integers(1, 6))
            words.append("".join(pick(rng, letters) + pick(rng, signs) * (rng.random() < 0.4) for _ in range(count)))
            continue
        _, _, starts, cores, ends = LANGUAGES[language]
        middle = starts.lower().split()
        parts = [pick(rng, starts.split()), pick(rng, cores.split())]
        for _ in range(pick(rng, (0, 1, 1, 2))):
            parts += [pick(rng, middle)[-2:].strip("'"), pick(rng, cores.split())]
        words.append("".join(parts) + pick(rng, ends.split()))
    return tuple(words)


def draw_voice(rng: Rng) -> Voice:
    """Draws the language of a page and the words that it uses."""
    names = list(LANGUAGES)
    language = names[int(rng.choice(len(names), p=np.array([row[0] for row in LANGUAGES.values()])))]
    if language in SCRIPTS and SCRIPTS[language][0] not in families():
        language = "English"
    lexicon, common = _lexicon(language), LANGUAGES[language][1].split()
    rare = [lexicon[i] for i in rng.integers(len(lexicon), size=260)]
    return Voice(language, common or rare[:50], rare, pick(rng, ("", "", "", "[{}]", "[{}]", "({})", "({}, 20{})")))


def number(rng: Rng) -> str:
    """Makes up a number as it stands in text and in tables."""
    form = pick(rng, ("{:.0f}", "{:.1f}", "{:.2f}", "{:,.0f}", "{:.1f}%", "{:.3f}", "({:,.0f})", "{:,.2f}"))
    return form.format(10 ** rng.uniform(0, 4))


def phrase(rng: Rng, voice: Voice, low: int = 1, high: int = 4, case: str = "first") -> str:
    """Makes up some words without a stop; `case`: first, title, upper or none."""
    words = [
        pick(rng, voice.rare if rng.random() < 0.75 else voice.common) for _ in range(int(rng.integers(low, high + 1)))
    ]
    text = " ".join(words)
    return {"first": text[:1].upper() + text[1:], "title": text.title(), "upper": text.upper()}.get(case, text)


def prose(rng: Rng, voice: Voice, count: float, font: Font) -> list[Ink]:
    """Returns words of sentences, with stops, numbers, references and some in other cuts."""
    inks, fresh, cut = [], True, font
    size = max(1, int(count))
    for place, mark, odd in rng.random((size, 3)).tolist():
        words = voice.common if place < 0.42 else voice.rare
        text = words[int(place * 997) % len(words)]
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
        if 0.085 > odd > 0.08:
            inks.append(
                word(str(rng.integers(1, 30)), font._replace(size=0.65 * font.size), 0.4 * font.size, font.size)
            )
        if odd > 0.8:
            cut = font
    return inks


def set_text(
    inks: Sequence[Ink],
    width: int = 0,
    pitch: int = 0,
    align: str = "left",
    first: int = 0,
    rest: int = 0,
    most: int = 999,
) -> Ink:
    """Sets words in lines of `width` pixels (0: one line), `pitch` apart, and keeps `most` of them.

    `first` and `rest` are the indents of the first and of the other lines.
    """
    high = inks[0].shape[0]
    space = max(3, round(0.2 * high))
    width = width or first + sum(ink.shape[1] + space for ink in inks)
    lines: list[list[Ink]] = [[]]
    room = width - first
    for ink in inks:
        if lines[-1] and ink.shape[1] > room:
            if len(lines) == most:
                break
            lines.append([])
            room = width - rest
        lines[-1].append(ink)
        room -= ink.shape[1] + space
    else:
        most = 0  # the last line is the end of the paragraph
    canvas = np.zeros((pitch * (len(lines) - 1) + max(high, pitch), width), np.uint8)
    for row, line in enumerate(lines):
        start = rest if row else first
        slack = width - start - sum(ink.shape[1] for ink in line) - space * (len(line) - 1)
        spread = align == "justify" and (row < len(lines) - 1 or bool(most))
        step = slack / max(1, len(line) - 1) if spread and len(line) > 2 else 0.0
        x = start + max(0, {"center": slack / 2, "right": slack}.get(align, 0.0))
        for ink in line:
            paste(canvas, ink, round(x), row * pitch)
            x += ink.shape[1] + space + step
    return canvas
