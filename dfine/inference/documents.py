"""A document is a file with pages: PDFs and TIFFs have any number of them, every other image has one.

Points are those of the PDF's own user space, in which its text and its annotations are placed. They count 1/72 inch
(unless the page sets a UserUnit), x to the right and y upwards on the page before its rotation. The origin is where the
media box has it, mostly the lower left corner of the sheet. Rotation and crop box change a page's pixels, but not its
points: a box in points can be written into the file as the /Rect of an annotation.
"""

import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dfine.arguments import page_ranges
from dfine.data.transforms import PageError, as_page, read_page
from dfine.inference import DPI

MAX_PIXELS = 36_000_000  # of a rendered page, as A4 has at 600 dpi; 108 MB. A larger page is rendered with fewer dpi.
UNREAD = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows these, but reads none without help from others
MARK = "with boxes drawn by dfine.predict"  # in the first bytes of its pictures, which are no pages to predict on
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes; + is BigTIFF

PDFIUM = threading.Lock()  # two threads in this library at once crash the process, even in different files
if hasattr(os, "register_at_fork"):  # a process that is forked meanwhile would wait for the lock for ever
    os.register_at_fork(before=PDFIUM.acquire, after_in_parent=PDFIUM.release, after_in_child=PDFIUM.release)


class PageLocation(NamedTuple):
    """Where a page is."""

    file: Path
    page: int  # from 1

    def __str__(self) -> str:
        paged = self.page > 1 or self.file.suffix.lower() in (".pdf", ".tif", ".tiff")
        return f"{self.file}, page {self.page}" if paged else str(self.file)


class PagePixels(NamedTuple):
    """A page as one sees it, that is after its rotation."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    to_points: np.ndarray | None  # (2, 3) float64: (x, y, 1) in pixels -> (x, y) in points; of PDFs alone


def list_pages(paths: Iterable[Path], numbers: str = "") -> Iterator[PageLocation | PageError]:
    """The pages of files and folders in order, without reading them, and an error for each that cannot be listed.

    Args:
        paths: folders stand for all images and PDFs in them and in their sub-folders, linked ones too, sorted; the
            pictures that `dfine.predict` drew are passed over. How many files were is said by a warning.
        numbers: which pages of PDFs and TIFFs, such as "1-3,7" or "5-"; empty: all. Other images have one page anyway.
    Raises:
        ValueError: `numbers` are not numbers of pages.
    """
    ranges = page_ranges(numbers)
    for path in paths:
        if not path.is_dir():
            yield from _pages_of(path, ranges)
            continue
        errors: list[OSError] = []
        files: list[Path] = []
        others: Counter[str] = Counter()
        for file in _files_in(path, errors):
            if file.suffix.lower() not in endings():
                others[file.suffix.lower() or "without an ending"] += 1
            elif file.is_fifo():  # reading it would wait for ever
                others["pipes"] += 1
            elif MARK.encode() in _head(file):
                others[MARK] += 1
            else:
                files.append(file)
        if others:
            kinds = ", ".join(f"{number} {kind}" for kind, number in others.most_common(5))
            kinds += ", ..." if len(others) > 5 else ""
            number = others.total()
            warnings.warn(f"{path}: passed over {number} files that are no pages: {kinds}", stacklevel=2)
        yield from (PageError(f"{error.filename}: cannot read the folder: {error.strerror}") for error in errors)
        if not files and not errors:
            yield PageError(f"no images or PDFs in {path} (pictures {MARK} do not count)")
        for file in sorted(files):
            yield from _pages_of(file, ranges)


@cache
def endings() -> set[str]:
    """Of the files that are read in folders: all that Pillow reads, and PDFs."""
    known = Image.registered_extensions()  # such as {".png": "PNG"}; some can only be written
    return {".pdf"} | {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in UNREAD}


def _files_in(folder: Path, errors: list[OSError]) -> Iterator[Path]:
    """All files in a folder and its sub-folders, each folder once, so that links may go round in circles.

    Linked folders come last: what can be reached without a link has a path without one.
    """
    waiting, seen = [folder], set[str]()
    for start in waiting:
        for place, folders, names in os.walk(start, onerror=errors.append):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            waiting += [Path(place, name) for name in folders if os.path.islink(Path(place, name))]
            yield from (Path(place, name) for name in names)


def read(file: str | Path, page: int = 1, dpi: float = DPI) -> PagePixels:
    """Reads or renders one page of a file.

    Args:
        page: from 1. dpi: of PDFs; a page that would have more than `MAX_PIXELS` gets fewer.
    Raises:
        PageError: it cannot be read; names file and page.
    """
    location, head = PageLocation(Path(file), page), _head(Path(file))
    if _is_pdf(location.file, head):
        return _render(location, dpi)
    if head[:4] not in TIFF:
        if page != 1:
            raise PageError(f"{location}: an image has one page")
        return PagePixels(read_page(file), None)
    try:
        with Image.open(file) as image:
            next(islice(_tiff_pages(image), page - 1, None))
            return PagePixels(as_page(image), None)
    except Exception as error:  # what Pillow and the libraries below it raise on a broken file is no closed list
        raise PageError(f"{location}: cannot read the page: {str(error) or type(error).__name__}") from error


def is_one_page(path: Path) -> bool:
    """Whether a path is an image of one page: no folder, no PDF (of however many pages), no TIFF of several."""
    head = _head(path)
    if path.is_dir() or _is_pdf(path, head):
        return False
    return head[:4] not in TIFF or len(list(_pages_of(path, []))) == 1


def boxes_in_points(boxes: np.ndarray, to_points: np.ndarray) -> np.ndarray:
    """(K, 4) xyxy pixels -> (K, 4) xyxy points: lower left, then upper right corner in user space."""
    corners = boxes.reshape(-1, 2, 2) @ to_points[:, :2].T + to_points[:, 2]  # (K, 2, 2)
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def _pages_of(file: Path, ranges: list[range]) -> Iterator[PageLocation | PageError]:
    head, broken = _head(file), None
    if _is_pdf(file, head):
        try:
            with _open_pdf(file) as pdf:
                pages = len(pdf)
        except PageError as error:
            yield error
            return
    elif head[:4] in TIFF:
        pages = 0
        try:
            with Image.open(file) as image:
                for _ in _tiff_pages(image):
                    pages += 1
        except Exception as error:  # as in `read`; what comes after a broken page cannot be found
            location = PageLocation(file, pages + 1)
            broken = PageError(f"{location}: cannot read the page: {str(error) or type(error).__name__}")
    else:
        yield PageLocation(file, 1)
        return
    if pages == 0:
        yield broken or PageError(f"{file}: has no pages")
        return
    chosen = (
        {page for numbers in ranges for page in numbers[:pages] if page <= pages} if ranges else range(1, pages + 1)
    )
    yield from (PageLocation(file, page) for page in sorted(chosen))
    for numbers in ranges:
        if numbers.start > pages:
            yield PageError(f"{file}: has no page {numbers.start}: it ends with page {pages}")
    if broken is not None:
        yield broken


def _head(file: Path) -> bytes:
    """The first bytes, by which readers know a PDF; none if the file cannot be read, which reading it will say."""
    try:
        with file.open("rb") as opened:
            return opened.read(1024)
    except OSError:
        return b""


def _is_pdf(file: Path, head: bytes) -> bool:
    return file.suffix.lower() == ".pdf" or b"%PDF-" in head


def _tiff_pages(image: Image.Image) -> Iterator[int]:
    """The frames that are pages, each being the current one while it is its turn; thumbnails and masks are none."""
    for frame in count():
        try:
            image.seek(frame)
        except EOFError:
            return
        if not image.tag_v2.get(254, 0) & 0b101:  # type: ignore[attr-defined]  # NewSubfileType
            yield frame


@contextmanager
def _open_pdf(file: Path) -> Iterator[Any]:
    """A `pypdfium2.PdfDocument`. Other threads wait for its end: what is to be read side by side is for processes."""
    try:
        import pypdfium2
    except ImportError as error:
        raise PageError(
            f"{file}: PDFs need the extra `documents`: pip install -e '.[documents]', or pip install pypdfium2"
        ) from error
    raw = pypdfium2.raw  # the constructor of `PdfDocument` mistakes a PDF without pages for one that cannot be read
    try:
        file.open("rb").close()
    except OSError as error:
        raise PageError(f"{file}: cannot read the PDF: {error.strerror}") from error
    with PDFIUM:
        handle = raw.FPDF_LoadDocument(os.fsencode(file), None)
        if not handle:
            code = raw.FPDF_GetLastError()
            if code == raw.FPDF_ERR_PASSWORD:
                raise PageError(f"{file}: is locked by a password: save it without one first")
            raise PageError(f"{file}: cannot read the PDF: {pypdfium2.internal.ErrorToStr.get(code, code)}")
        with pypdfium2.PdfDocument(handle) as pdf:
            pdf.init_forms()  # so that what is filled in is there
            yield pdf


def _render(location: PageLocation, dpi: float) -> PagePixels:
    with _open_pdf(location.file) as pdf:
        try:
            page = pdf[location.page - 1]
            width, height = page.get_size()  # after rotation, of the crop box
            left, bottom, right, top = page.get_bbox()  # the crop box, before rotation
            if width * height == 0:
                raise ValueError("it has no area: its crop box lies outside its media box")
            scale = min(dpi / 72, (MAX_PIXELS / (width * height)) ** 0.5)
            pixels = page.render(scale, rev_byteorder=True).to_numpy().copy()
        except Exception as error:  # pdfium's, or numbers in the file that no page can have
            raise PageError(f"{location}: cannot read the page: {error}") from error
        # The pixels' upper left, upper right and lower left corner in user space: each turn by 90 degrees clockwise
        # brings up the crop box's next corner against the clock.
        corners = np.array([[left, top], [left, bottom], [right, bottom], [right, top]], dtype=np.float64)
        turns = page.get_rotation() // 90
    origin, across, down = corners[turns], corners[turns - 1], corners[(turns + 1) % 4]
    x, y = (across - origin) / pixels.shape[1], (down - origin) / pixels.shape[0]
    return PagePixels(pixels, np.stack([x, y, origin], axis=1))
