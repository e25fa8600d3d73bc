"""Files with pages: which they have, the right pixels, and where these are in points."""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pdf import RED, write_pdf
from PIL import Image, TiffImagePlugin
from processes import ends, launch
from tiny import drawn_page

from dfine.data.transforms import PageError
from dfine.inference import documents
from dfine.inference.documents import MARK, PageLocation, boxes_in_points, list_pages, page_ranges, read

needs_pdfium = pytest.mark.skipif(find_spec("pypdfium2") is None, reason="needs the extra `documents`")
PAGE = "/MediaBox [0 0 90 120]"


def red_box(pixels: np.ndarray) -> np.ndarray:
    """Where a page is red, (1, 4) xyxy pixels."""
    rows, columns = np.nonzero((pixels == (255, 0, 0)).all(-1))
    return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], dtype=np.float64)


def write_tiff(path: Path, *pages: np.ndarray) -> None:
    first, *others = map(Image.fromarray, pages)
    first.save(path, save_all=True, append_images=others)


def listed(*paths: Path, numbers: str = "") -> list[str]:
    """Pages as `name:page`, errors as they are."""
    places = list_pages(paths, numbers)
    return [f"{place.file.name}:{place.page}" if isinstance(place, PageLocation) else str(place) for place in places]


# PDFs


@needs_pdfium
@pytest.mark.parametrize("crop", ["", "/CropBox [15 22 5000 100]"], ids=["whole", "cropped"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270, -90])
def test_the_points_of_a_known_rectangle_do_not_depend_on_rotation_and_crop(
    tmp_path: Path, rotation: int, crop: str
) -> None:
    write_pdf(tmp_path / "a.pdf", [(f"/MediaBox [5 10 95 130] {crop} /Rotate {rotation}", RED)])
    pixels, to_points = read(tmp_path / "a.pdf", dpi=144)
    assert to_points is not None
    np.testing.assert_allclose(boxes_in_points(red_box(pixels), to_points), [[20, 30, 60, 40]], atol=1e-9)


@needs_pdfium
def test_a_page_is_seen_after_its_rotation_and_within_its_crop_box(tmp_path: Path) -> None:
    cropped = "/MediaBox [5 10 95 130] /CropBox [15 22 5000 100]"
    write_pdf(tmp_path / "a.pdf", [(f"{cropped} /Rotate {rotation}", RED) for rotation in (0, 90, 180, 270)])
    upright, *others = [read(tmp_path / "a.pdf", page, dpi=144).pixels for page in (1, 2, 3, 4)]
    assert upright.shape == (2 * (100 - 22), 2 * (95 - 15), 3)
    assert red_box(upright).tolist() == [[2 * (20 - 15), 2 * (100 - 40), 2 * (60 - 15), 2 * (100 - 30)]]
    for quarters, other in enumerate(others, 1):
        np.testing.assert_array_equal(other, np.rot90(upright, -quarters))


@needs_pdfium
def test_a_page_has_as_many_pixels_as_its_dpi_say_but_never_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pdf(tmp_path / "a.pdf", [("/MediaBox [0 0 72 144]", RED), ("/MediaBox [0 0 5669 2835]", RED)])  # 2 x 1 metre
    assert read(tmp_path / "a.pdf", 1, 100).pixels.shape == (200, 100, 3)
    assert read(tmp_path / "a.pdf", 1).pixels.shape == (288, 144, 3)
    monkeypatch.setattr(documents, "MAX_PIXELS", 20_000)
    pixels, to_points = read(tmp_path / "a.pdf", 2)
    height, width = pixels.shape[:2]
    assert 100 <= height <= 101
    assert 200 <= width <= 201
    assert to_points is not None
    np.testing.assert_allclose(boxes_in_points(np.array([[0, 0, width, height]]), to_points), [[0, 0, 5669, 2835]])


@needs_pdfium
def test_what_is_filled_into_a_form_is_on_the_page(tmp_path: Path) -> None:
    field = "<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /F 4 /Rect [20 30 60 40] /AP << /N 6 0 R >> >>"
    entries = f"/MediaBox [0 0 90 120] /Annots [{field}]"
    # The second page's content is what the field looks like.
    look = "/Type /XObject /Subtype /Form /BBox [0 0 40 10] /Length 27"
    write_pdf(tmp_path / "a.pdf", [(entries, ""), (PAGE, "")], catalog=f"/AcroForm << /Fields [{field}] >>")
    text = (tmp_path / "a.pdf").read_text()
    filled = text.replace(
        "6 0 obj\n<< /Length 0 >>\nstream\n\n", f"6 0 obj\n<< {look} >>\nstream\n1 0 0 rg 0 0 40 10 re f   \n"
    )
    (tmp_path / "b.pdf").write_text(filled)
    assert not (read(tmp_path / "a.pdf").pixels == (255, 0, 0)).all(-1).any()
    assert red_box(read(tmp_path / "b.pdf", dpi=72).pixels).tolist() == [[20, 80, 60, 90]]


def read_over_and_over(file: Path) -> None:
    """Reads in many threads; ends well if all saw the page, and a process that is forked meanwhile sees it, too."""
    read(file)  # imports the library
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(lambda: red_box(read(file).pixels).tolist()) for _ in range(2000)]
        found[100].result()
        forked = multiprocessing.get_context("fork").Process(target=read, args=(file,))
        forked.start()
        forked.join(timeout=30)
        forked.kill()
    assert forked.exitcode == 0
    assert {str(place.result()) for place in found} == {"[[40.0, 160.0, 120.0, 180.0]]"}


@needs_pdfium
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_threads_read_pdfs_one_after_the_other(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [(PAGE, RED)])
    assert ends(launch(read_over_and_over, tmp_path / "a.pdf", count=1)) == [0]


@needs_pdfium
def test_a_broken_page_is_named_and_the_others_are_there(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [(PAGE, RED)] * 3, broken=1)
    assert listed(tmp_path / "a.pdf") == ["a.pdf:1", "a.pdf:2", "a.pdf:3"]
    for page in (1, 3):
        assert red_box(read(tmp_path / "a.pdf", page, 72).pixels).tolist() == [[20, 80, 60, 90]]
    with pytest.raises(PageError, match=r"a.pdf, page 2: cannot read the page"):
        read(tmp_path / "a.pdf", 2)


@needs_pdfium
def test_a_page_without_area_is_named(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [(f"{PAGE} /CropBox [500 500 600 600]", RED)])
    with pytest.raises(PageError, match=r"a.pdf, page 1: .* its crop box lies outside its media box"):
        read(tmp_path / "a.pdf")


@needs_pdfium
def test_pdfs_without_pages_that_can_be_read_are_named(tmp_path: Path) -> None:
    locked = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O ({'o' * 32}) /U ({'u' * 32}) >> /ID [(a) (a)]"
    write_pdf(tmp_path / "locked.pdf", [(PAGE, RED)], trailer=locked)
    write_pdf(tmp_path / "empty.pdf", [])
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nno more")
    write_pdf(tmp_path / "named", [(PAGE, RED)])
    assert listed(tmp_path / "locked.pdf") == [
        f"{tmp_path / 'locked.pdf'}: is locked by a password: save it without one first"
    ]
    assert listed(tmp_path / "empty.pdf") == [f"{tmp_path / 'empty.pdf'}: has no pages"]
    assert listed(tmp_path / "none.pdf") == [f"{tmp_path / 'none.pdf'}: cannot read the PDF: No such file or directory"]
    (broken,) = listed(tmp_path / "broken.pdf")
    assert broken.startswith(f"{tmp_path / 'broken.pdf'}: cannot read the PDF")
    assert red_box(read(tmp_path / "named", dpi=72).pixels).tolist() == [[20, 80, 60, 90]]  # whatever its name


def test_without_the_extra_a_pdf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    write_pdf(tmp_path / "a.pdf", [(PAGE, RED)])
    (message,) = listed(tmp_path / "a.pdf")
    assert message.startswith(f"{tmp_path / 'a.pdf'}: PDFs need the extra `documents`: pip install")


# TIFFs


def test_a_tiff_has_all_its_pages_but_no_thumbnails_and_masks(tmp_path: Path) -> None:
    pages = [drawn_page(40, 30), drawn_page(20, 15), drawn_page(30, 40), drawn_page(30, 40)]
    kinds = [TiffImagePlugin.ImageFileDirectory_v2() for _ in pages]
    kinds[1][254] = 1  # a reduced version of another page
    kinds[3][254] = 4  # which pixels of another page are transparent
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "a.tif", new=True) as file:
        for page, kind in zip(pages, kinds, strict=True):
            Image.fromarray(page).save(file, "TIFF", tiffinfo=kind)
            file.newFrame()
    assert listed(tmp_path / "a.tif") == ["a.tif:1", "a.tif:2"]
    for number, page in ((1, pages[0]), (2, pages[2])):
        pixels, to_points = read(tmp_path / "a.tif", number)
        np.testing.assert_array_equal(pixels, page)
        assert to_points is None


def test_a_truncated_tiff_has_the_pages_before_its_end(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", *[drawn_page(40, 30)] * 3)
    whole = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(whole[: len(whole) // 2])
    *pages, broken = listed(tmp_path / "a.tif")
    assert pages == ["a.tif:1", "a.tif:2"]
    assert broken.startswith(f"{tmp_path / 'a.tif'}, page 3: cannot read the page")
    np.testing.assert_array_equal(read(tmp_path / "a.tif", 1).pixels, drawn_page(40, 30))
    with pytest.raises(PageError, match=r"a.tif, page 2: cannot read the page"):
        read(tmp_path / "a.tif", 2)


def test_a_page_that_a_file_does_not_have_is_named(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", drawn_page())
    Image.fromarray(drawn_page()).save(tmp_path / "b.png")
    write_pdf(tmp_path / "c.pdf", [(PAGE, RED)])
    for name in ("a.tif", "b.png", "c.pdf"):
        for page in (0, 2):
            with pytest.raises(PageError, match=rf"{name}(, page {page})?: "):
                read(tmp_path / name, page)


# Which pages


@pytest.mark.parametrize(
    ("numbers", "pages"),
    [("", [1, 2, 3, 4]), ("2", [2]), ("1-2,4", [1, 2, 4]), ("3-", [3, 4]), ("2-9", [2, 3, 4]), (" 4, 1 ,1-1", [1, 4])],
)
def test_pages_are_chosen_by_number(tmp_path: Path, numbers: str, pages: list[int]) -> None:
    write_tiff(tmp_path / "a.tif", *[drawn_page(20, 15)] * 4)
    assert listed(tmp_path / "a.tif", numbers=numbers) == [f"a.tif:{page}" for page in pages]


def test_pages_that_are_not_there_are_named_and_images_are_not_concerned(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", *[drawn_page(20, 15)] * 2)
    Image.fromarray(drawn_page()).save(tmp_path / "b.png")
    message = f"{tmp_path / 'a.tif'}: has no page 7: it ends with page 2"
    assert listed(tmp_path, numbers="1-5,7") == ["a.tif:1", "a.tif:2", message, "b.png:1"]


@pytest.mark.parametrize("numbers", ["0", "3-1", "a", "1,,2", "-3", "1-2-3", "1.5", ","])
def test_what_is_no_number_of_a_page_is_named(numbers: str) -> None:
    with pytest.raises(ValueError, match=r"write numbers of pages such as 1-3,7|pages count upwards from 1"):
        page_ranges(numbers)


# Folders


def test_folders_are_searched_and_their_folders_are_no_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "x.png/d.webp", "x.png/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(drawn_page()).save(tmp_path / name, "PNG")
    assert listed(tmp_path) == ["c.png:1", "b.JPG:1", "d.webp:1"]
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert "gone.png:1" in listed(tmp_path)  # reading it says that it is not there


@pytest.mark.parametrize("kind", [{}, {"format": "GIF"}, {"format": "JPEG2000"}, {"format": "AVIF"}, {"format": "TGA"}])
def test_folders_have_what_is_read_by_name_whatever_its_ending(tmp_path: Path, kind: dict[str, str]) -> None:
    Image.init()
    if kind and kind["format"] not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind['format']}")
    ending = {"": "jfif", "GIF": "gif", "JPEG2000": "jp2", "AVIF": "avif", "TGA": "tga"}[kind.get("format", "")]
    Image.fromarray(drawn_page()).save(tmp_path / f"a.{ending}", **kind)
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n")  # Pillow knows it, and cannot read it
    assert listed(tmp_path) == [f"a.{ending}:1"]
    assert read(tmp_path / f"a.{ending}").pixels.shape == (120, 90, 3)


def test_linked_folders_are_searched_once_even_if_they_go_round_in_circles(tmp_path: Path) -> None:
    for name in ("pages/z/own.png", "elsewhere/c.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(drawn_page()).save(tmp_path / name)
    for link, to in {"a": "pages/z", "b": "pages", "c": "elsewhere", "z/d": "elsewhere", "z/e": "pages/z"}.items():
        (tmp_path / "pages" / link).symlink_to(tmp_path / to)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "pages")
    found = [str(place) for place in list_pages([tmp_path / "pages"])]
    assert found == [str(tmp_path / "pages" / name) for name in ("c/c.png", "z/own.png")]


def test_how_many_files_were_passed_over_is_said(tmp_path: Path) -> None:
    for name in ("a.json", "b.JSON", "notes"):
        (tmp_path / name).write_text("")
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    (tmp_path / "own.png").write_bytes(MARK.encode())
    kinds = rf"2 \.json, 1 without an ending, 1 {MARK}$"
    with pytest.warns(UserWarning, match=rf"^{tmp_path}: passed over 4 files that are no pages: {kinds}"):
        assert listed(tmp_path) == ["page.png:1"]


def test_a_pipe_in_a_folder_is_passed_over_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    with pytest.warns(UserWarning, match=r"passed over 1 files that are no pages: 1 pipes$"):
        assert listed(tmp_path) == ["page.png:1"]


def test_a_folder_without_pages_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(MARK.encode())
    (message,) = listed(tmp_path)
    assert message.startswith(f"no images or PDFs in {tmp_path}")
    assert listed(tmp_path / "own.png") == ["own.png:1"]  # by name it is a page like any other


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    Image.fromarray(drawn_page()).save(tmp_path / "a.png")
    scan = os.scandir

    def closed(path: Any) -> Any:  # tests may run as root, whom no permissions stop
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert listed(tmp_path) == [f"{tmp_path / 'closed'}: cannot read the folder: Permission denied", "a.png:1"]
    assert listed(tmp_path / "closed") == [f"{tmp_path / 'closed'}: cannot read the folder: Permission denied"]
