"""From a file to pixels: pages look as on white paper, and boxes stay on what they enclose."""

import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from torchvision.transforms.v2.functional import resize as resize_image

from dfine.boxes import cxcywh_to_xyxy
from dfine.config import AugmentConfig, DataConfig
from dfine.data.transforms import (
    THINNEST,
    TURNS,
    PageError,
    as_page,
    augment,
    augmentation,
    canvas_of,
    fit,
    model_size,
    outline,
    pad,
    read_page,
    resize,
    sized,
    turn_boxes,
    turn_of,
)

NONE = {name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")}
ALL = dict.fromkeys(NONE, 1.0)


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1025, 1025), (640, 640)),
        ((792, 612), (828, 640)),  # the short edge rules
        ((1000, 500), (928, 464)),  # the long edge rules
        ((3000, 10), (928, 3)),
        ((30000, 10), (928, 1)),  # never nothing
    ],
)
def test_a_page_keeps_its_aspect_within_both_edges(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit(size, 640, 928) == expected
    assert fit(size[::-1], 640, 928) == expected[::-1]


@pytest.mark.parametrize(("aspect", "expected"), [(1.0, (64, 64)), (0.75, (64, 85)), (1.5, (96, 64))])
def test_squashed_pages_all_get_one_shape(aspect: float, expected: tuple[int, int]) -> None:
    config = DataConfig(sizing="squash", squash_aspect=aspect)
    for size in ((400, 100), (100, 400), (30, 30), (64, 64)):
        assert model_size(size, 64, config) == expected
        page = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        assert sized(page, 64, config).shape == (*expected, 3)


def test_squashed_pages_are_interpolated_over_all_pixels_that_become_one() -> None:
    """As published weights have it: bilinear and antialiased."""
    page = np.random.default_rng(0).integers(0, 255, (300, 90, 3), dtype=np.uint8)
    expected = resize_image(torch.from_numpy(page).permute(2, 0, 1), [64, 64], antialias=True)
    found = torch.from_numpy(sized(page, 64, DataConfig(sizing="squash"))).permute(2, 0, 1)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_pages_that_keep_their_aspect_are_fitted() -> None:
    page = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    config = DataConfig(max_long_edge=700)
    assert model_size((300, 200), 640, config) == fit((300, 200), 640, 700)
    np.testing.assert_array_equal(sized(page, 64, config), resize(page, (96, 64)))


def test_the_canvas_holds_all_pages_and_is_a_multiple_of_the_stride() -> None:
    assert canvas_of([(33, 64), (20, 65)], 32) == (64, 96)


def test_padding_keeps_every_pixel_and_adds_zeros() -> None:
    random = np.random.default_rng(0)
    pages = [random.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((5, 9), (8, 3))]
    images, sizes = pad(pages, 4)
    assert images.shape == (2, 3, 8, 12)
    assert sizes.tolist() == [[5, 9], [8, 3]]
    for padded, page in zip(images.permute(0, 2, 3, 1).numpy(), pages, strict=True):
        assert (padded[: page.shape[0], : page.shape[1]] == page).all()
        assert padded.sum() == page.sum()


def test_thin_strokes_do_not_vanish_when_a_page_shrinks() -> None:
    page = np.full((400, 400, 3), 255, np.uint8)
    page[::8] = 0
    assert (resize(page, (100, 100))[:, :, 0].reshape(-1, 2, 100).mean(1) < 230).all()
    assert resize(page, (400, 400)) is page


@pytest.mark.parametrize("upright", [True, False])
def test_strokes_across_a_strip_that_keeps_its_short_side_do_not_vanish(upright: bool) -> None:
    strip = np.full((1, 400, 3), 255, np.uint8)
    strip[:, ::8] = 0
    small = resize(strip.transpose(1, 0, 2), (100, 1)) if upright else resize(strip, (1, 100))
    assert (small.reshape(-1, 2, 3).mean(1) < 230).all()


# Reading


def striped() -> np.ndarray:
    """(6, 8) uint8: black above, grey in the middle, white below."""
    return np.repeat(np.array([0, 128, 255], np.uint8), 2)[:, None].repeat(8, axis=1)


def rgba(alpha: int) -> Image.Image:
    """Black ink, transparent or half transparent paper of a colour that must not be seen."""
    page = np.zeros((6, 8, 4), np.uint8)
    page[..., 3] = 255
    page[2:] = (200, 0, 0, alpha)
    return Image.fromarray(page)


def palette_with_transparency() -> Image.Image:
    page = Image.fromarray((striped() > 0).astype(np.uint8), mode="P")
    page.putpalette([0, 0, 0, 200, 0, 0])
    page.info["transparency"] = 1
    return page


def cmyk() -> Image.Image:
    ink = 255 - striped()
    nothing = np.zeros_like(ink)
    return Image.merge("CMYK", [Image.fromarray(channel) for channel in (nothing, nothing, nothing, ink)])


THREE_GREYS = striped()
INK_ON_WHITE = np.where(striped() > 0, 255, 0)


@pytest.mark.parametrize(
    ("page", "suffix", "expected"),
    [
        (Image.fromarray(striped()), "png", THREE_GREYS),
        (Image.fromarray(striped()), "webp", THREE_GREYS),
        (Image.fromarray(striped()).convert("RGB"), "bmp", THREE_GREYS),
        (Image.fromarray(striped()).convert("P"), "tif", THREE_GREYS),
        (Image.fromarray(striped().astype(np.uint16) * 257), "png", THREE_GREYS),
        (Image.fromarray(striped().astype(np.uint16) * 257), "tif", THREE_GREYS),
        (Image.fromarray(striped().astype(np.int32) * 257), "tif", THREE_GREYS),
        *((Image.fromarray(np.uint16(striped() / 255 * (2**b - 1))), "png", THREE_GREYS) for b in (8, 10, 12, 14)),
        *(
            (Image.fromarray(np.float32(striped() / 255 * white)), "tif", THREE_GREYS)
            for white in (1, 255, 4095, 65535)
        ),
        (Image.fromarray(np.where(striped() > 0, np.float32(striped() / 255), np.nan)), "tif", THREE_GREYS),
        (cmyk(), "jpg", THREE_GREYS),
        (cmyk(), "tif", THREE_GREYS),
        (Image.fromarray(striped() > 0), "png", INK_ON_WHITE),
        (rgba(0), "png", INK_ON_WHITE),
        (rgba(0), "tif", INK_ON_WHITE),
        (rgba(0).convert("LA"), "png", INK_ON_WHITE),
        (palette_with_transparency(), "png", INK_ON_WHITE),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_kind_of_image_looks_as_on_white_paper(
    tmp_path: Path, page: Image.Image, suffix: str, expected: np.ndarray
) -> None:
    page.save(tmp_path / f"page.{suffix}")
    found = read_page(tmp_path / f"page.{suffix}")
    assert found.dtype == np.uint8
    assert found.shape == (6, 8, 3)
    assert np.abs(found.astype(int) - expected[..., None]).max() <= 4  # some of the formats lose a little


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_white_is_white_in_colours_of_16_bits_too(tmp_path: Path, bits: int, suffix: str, channels: int) -> None:
    page = np.repeat(np.uint16(striped() / 255 * (2**bits - 1))[..., None], channels, axis=-1)
    page[..., 3:] = 65535  # opaque
    cv2.imwrite(str(tmp_path / f"page.{suffix}"), page)
    found = read_page(tmp_path / f"page.{suffix}")
    assert (found[:2] == 0).all()
    assert (found[2:4] < 200).all()
    assert (found[4:] == 255).all()


@pytest.mark.parametrize("bits", [10, 16])
def test_white_is_white_in_greys_of_16_bits_with_transparency(tmp_path: Path, bits: int) -> None:
    """A PNG of two channels, which neither Pillow nor OpenCV writes."""
    page = np.full((6, 8, 2), 65535, ">u2")  # opaque
    page[..., 0] = striped() / 255 * (2**bits - 1)
    rows = b"".join(b"\0" + row.tobytes() for row in page)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in {
        b"IHDR": struct.pack(">IIBBBBB", 8, 6, 16, 4, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "page.png").write_bytes(content)
    found = read_page(tmp_path / "page.png")
    assert (found[0].max(), found[5].min()) == (0, 255)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_colours_that_are_multiplied_with_their_opacity_are_laid_on_white(mode: str) -> None:
    page = rgba(51) if mode == "RGBa" else rgba(51).convert("LA")
    np.testing.assert_allclose(as_page(page.convert(mode)), as_page(page), atol=3)


@pytest.mark.parametrize("size", [(0, 10), (10, 0)])
def test_an_image_without_pixels_is_no_page(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="it has no pixels"):
        as_page(Image.new("RGB", size))


def test_half_transparent_paper_is_laid_on_white(tmp_path: Path) -> None:
    rgba(51).save(tmp_path / "page.png")
    assert np.abs(read_page(tmp_path / "page.png")[3, 3].astype(int) - (244, 204, 204)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12) * 2)
    turn = Image.Transpose
    stored_by = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM]  # what undoes orientation 1, 2, ...
    stored_by += [turn.TRANSPOSE, turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    how = stored_by[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if how is None else upright.transpose(how)).save(tmp_path / "page.png", exif=exif)
    assert (read_page(tmp_path / "page.png")[..., 0] == np.asarray(upright)).all()
    assert turn_of(tmp_path / "page.png") == TURNS.get(orientation)


@pytest.mark.parametrize("how", TURNS.values(), ids=lambda how: how.name)
def test_boxes_turn_with_their_image(how: Image.Transpose) -> None:
    page = np.full((30, 50, 3), 255, np.uint8)
    page[4:9, 20:43] = 0
    boxes = np.array([[20, 4, 43, 9], [0, 0, 50, 30]])
    turned = np.array(Image.fromarray(page).transpose(how))
    np.testing.assert_array_equal(turn_boxes(boxes, (30, 50), how), [ink(turned), [0, 0, *turned.shape[1::-1]]])


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of one directory; an entry is tag, type, count and four bytes of value."""
    directory = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_page_turns_whatever_else_its_exif_says(tmp_path: Path, suffix: str) -> None:
    resolution_as_text = (0x011A, 2, 3, b"72\0\0")
    exif = exif_block((0x0112, 3, 1, bytes([6, 0, 0, 0])), resolution_as_text)
    Image.fromarray(striped()).convert("RGB").save(tmp_path / f"page.{suffix}", exif=exif)
    page = read_page(tmp_path / f"page.{suffix}")
    assert page.shape == (8, 6, 3)
    assert page[:, -1].max() < 20  # black was above and is on the right


def test_a_page_whose_exif_cannot_be_read_stays_as_it_lies(tmp_path: Path) -> None:
    broken = PngImagePlugin.PngInfo()
    broken.add_text("Raw profile type exif", "\nexif\n  4\nzz")
    Image.fromarray(striped()).save(tmp_path / "page.png", pnginfo=broken)
    assert (read_page(tmp_path / "page.png") == striped()[..., None]).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_error_that_is_not_pillows_own_names_the_file_too(tmp_path: Path) -> None:
    path = tmp_path / "page.avif"
    Image.fromarray(striped()).convert("RGB").save(path)
    main_item = b"pitm" + bytes(5)  # and then its number, which is 1
    assert main_item in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(main_item + b"\1", main_item + b"\7"))
    with pytest.raises(RuntimeError), Image.open(path):
        pass
    with pytest.raises(PageError, match=r"page\.avif: cannot read the image: .*item"):
        read_page(path)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.png").write_text("no image")
    with pytest.raises(PageError, match=r"page\.png: cannot read the image"):
        read_page(tmp_path / "page.png")
    with pytest.raises(PageError, match=r"none\.png"):
        read_page(tmp_path / "none.png")


# Augmentation


def black_rectangle(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A white page (420, 320, 3) with a rectangle of any proportions anywhere, and its box xyxy."""
    page = np.full((420, 320, 3), 255, np.uint8)
    x, y = random.integers(0, 160, 2)
    width, height = random.integers(4, 160, 2)
    page[y : y + height, x : x + width] = 0
    return page, np.array([[x, y, x + width, y + height]], dtype=np.float64)


def ink(page: np.ndarray) -> np.ndarray:
    """The box xyxy around everything dark."""
    dark = page.mean(-1) < 128
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


@pytest.mark.parametrize("kinds", [*((kind,) for kind in NONE), tuple(NONE)], ids=[*NONE, "all"])
def test_boxes_follow_the_pixels(kinds: tuple[str, ...]) -> None:
    steps = augmentation(AugmentConfig(**NONE | dict.fromkeys(kinds, 1.0)))
    for seed in range(15):
        page, box = black_rectangle(np.random.default_rng(seed))
        page, labels, boxes = augment(steps, page, np.array([4]), box, seed)
        assert labels.tolist() == [4]
        assert np.abs(boxes[0] - ink(page)).max() <= 2


@pytest.mark.parametrize("upright", [False, True])
def test_long_thin_boxes_follow_the_pixels_where_the_page_bends(upright: bool) -> None:
    steps = augmentation(AugmentConfig(**NONE | {"elastic_p": 1.0}))
    for seed in range(8):
        page, box = np.full((640, 640, 3), 255, np.uint8), np.array([[60, 300, 560, 324]], dtype=np.float64)
        page[300:324, 60:560] = 0
        if upright:
            page, box = page.transpose(1, 0, 2).copy(), box[:, [1, 0, 3, 2]]
        page, _, boxes = augment(steps, page, np.array([4]), box, seed)
        assert np.abs(boxes[0] - ink(page)).max() <= 1


def test_a_short_box_has_eight_points_an_edge_and_a_long_one_one_every_eight_pixels() -> None:
    assert outline(np.array([5.0, 5, 61, 20])).shape == (4 * 8, 2)
    points = outline(np.array([10.0, 20, 810, 40]))
    assert len(points) == 2 * 101 + 2 * 8
    assert np.abs(np.diff(points[:101, 0])).max() == pytest.approx(8)
    assert [*points.min(0), *points.max(0)] == [10, 20, 810, 40]


@pytest.mark.parametrize("kind", NONE)
def test_every_augmentation_changes_the_page(kind: str) -> None:
    page, box = black_rectangle(np.random.default_rng(0))
    assert (augment(augmentation(AugmentConfig(**NONE | {kind: 1.0})), page, np.array([0]), box, 1)[0] != page).any()


def test_nothing_happens_without_augmentations_and_nothing_is_said() -> None:
    page, box = black_rectangle(np.random.default_rng(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _, boxes = augment(augmentation(AugmentConfig(**NONE)), page, np.array([0]), box, 1)
    assert (found == page).all()
    np.testing.assert_allclose(boxes, box, atol=1e-4)


def test_no_augmentation_cuts_off_the_edges_of_a_page() -> None:
    page = np.full((420, 320, 3), 255, np.uint8)
    corners = np.array([[0, 0, 9, 9], [311, 0, 320, 9], [0, 411, 9, 420], [311, 411, 320, 420]], dtype=np.float64)
    steps = augmentation(AugmentConfig(**NONE | {"perspective_p": 1.0, "rotation_p": 1.0}))
    for seed in range(10):
        boxes = augment(steps, page, np.arange(4), corners, seed)[2]
        assert len(boxes) == 4
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 6


def test_paper_that_comes_into_view_is_white() -> None:
    page = np.full((420, 320, 3), 255, np.uint8)
    still = {"brightness_contrast_p": 0.0, "noise_p": 0.0}
    for seed in range(10):
        found = augment(augmentation(AugmentConfig(**ALL | still)), page, np.zeros(0), np.zeros((0, 4)), seed)[0]
        assert found.min() > 250


def test_the_seed_decides_everything() -> None:
    page, box = black_rectangle(np.random.default_rng(0))
    first, same, other = (augment(augmentation(AugmentConfig(**ALL)), page, np.array([0]), box, s) for s in (5, 5, 6))
    assert (first[0] == same[0]).all()
    assert (first[2] == same[2]).all()
    assert (first[2] != other[2]).any()


def test_slivers_that_augmentation_leaves_at_the_border_are_dropped() -> None:
    page = np.full((64, 48, 3), 255, np.uint8)
    boxes = np.array([[48 - 1e-4, 5, 60, 20], [5, 64 - 1e-4, 20, 70], [40, 5, 60, 20]])
    _, labels, kept = augment(augmentation(AugmentConfig(**NONE)), page, np.arange(3), boxes, 0)
    assert labels.tolist() == [2]
    np.testing.assert_allclose(kept, [[40, 5, 48, 20]], atol=1e-4)


def test_float32_tells_the_edges_of_the_thinnest_box_apart_on_the_largest_page() -> None:
    low = np.linspace(0, 65535 - THINNEST, 1001) / 65535
    size = torch.full((1001,), THINNEST / 65535)
    centre = torch.from_numpy(low + THINNEST / 65535 / 2).float()
    corners = cxcywh_to_xyxy(torch.stack([centre, centre, size, size], dim=-1))
    assert (corners[:, 2:] > corners[:, :2]).all()


def test_a_blank_page_stays_a_page_without_boxes() -> None:
    page = np.full((64, 48, 3), 255, np.uint8)
    found, labels, boxes = augment(augmentation(AugmentConfig(**ALL)), page, np.zeros(0, np.int64), np.zeros((0, 4)), 0)
    assert found.shape == page.shape
    assert (labels.shape, labels.dtype, boxes.shape) == ((0,), np.int64, (0, 4))
