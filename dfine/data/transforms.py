"""From a file to the pixels a model sees: reading, resizing, augmenting, padding. The same in training and use."""

import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from dfine.config import AugmentConfig, DataConfig

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for its newest version
import albumentations as A

WHITE = (255, 255, 255)
TURNS: dict[Any, Image.Transpose] = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]

# Pixels: nobody draws a thinner box, and float32 still tells its edges apart on a page of 65,535 pixels.
THINNEST = 0.01
# Pixels between two points that follow an edge, at most. More points change no box where a page bends by default.
SPACING = 8


class PageError(ValueError):
    """A page that cannot be used; the message names the file."""


def read_page(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads an image as it should look on white paper.

    16 bits become 8 (see `_bits`), transparency is laid on white, CMYK and greyscale become RGB, and the EXIF rotation
    is applied: always without `size`, else only where it makes the image fit.

    Args:
        size: height, width that the image must have.
    Returns:
        (H, W, 3) uint8 RGB
    Raises:
        PageError: unreadable, truncated, or of another size.
    """
    try:
        with Image.open(path) as image:
            turn = size is None or (image.height, image.width) != size
            page = as_page(image, turn)
    except Exception as error:  # what Pillow and the libraries below it raise on a broken file is no closed list
        raise PageError(f"{path}: cannot read the image: {str(error) or type(error).__name__}") from error
    if size is not None and page.shape[:2] != size:
        found = f"{page.shape[1]}x{page.shape[0]}"
        raise PageError(f"{path}: the image is {found} pixels, the annotations say {size[1]}x{size[0]}")
    return page


def as_page(image: Image.Image, turn: bool = True) -> np.ndarray:
    """An image as it should look on white paper, (H, W, 3) uint8 RGB; `turn`: after its EXIF rotation."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    deep = re.search(r"(RGB.?|LA);16", str(getattr(image, "tile", "")))  # gone once the image is loaded
    image = _turned(image) if turn else image
    return np.array(_on_white(_brightened(image) if deep else image))


def _turned(image: Image.Image) -> Image.Image:
    """After its EXIF rotation. Pillow's `exif_transpose` also writes the EXIF block anew, and fails if it is odd."""
    image.load()  # may itself turn the image, and drop the tag (TIFF)
    how = _turn(image)
    return image if how is None else image.transpose(how)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as for files: a block that cannot be read says nothing, and the page is as it lies
        return None


def turn_of(path: str | Path) -> Image.Transpose | None:
    """How `read_page` turns an image by its EXIF rotation; None: not at all, as a PDF.

    Raises:
        PageError: the file is gone.
    """
    try:
        with Image.open(path) as image:
            return None if image.format == "TIFF" else _turn(image)  # Pillow itself turns these
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise PageError(f"{path}: cannot read the image: {error}") from error


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], how: Image.Transpose) -> np.ndarray:
    """Where boxes (K, 4) xyxy in pixels of an image are once it is turned.

    Args:
        size: height, width of the image before.
    """
    (x1, y1, x2, y2), (height, width), turns = boxes.T, size, Image.Transpose
    if how in SIDEWAYS:
        x1, y1, x2, y2, height, width = y1, x1, y2, x2, width, height
    if how in (turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.ROTATE_270, turns.TRANSVERSE):
        x1, x2 = width - x2, width - x1
    if how in (turns.FLIP_TOP_BOTTOM, turns.ROTATE_180, turns.ROTATE_90, turns.TRANSVERSE):
        y1, y2 = height - y2, height - y1
    return np.stack([x1, y1, x2, y2], axis=1)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "F":  # white may be 1 or that of integers, and a little more where an edge was sharpened
        floats = np.nan_to_num(np.asarray(image), posinf=0)
        white = 1 if floats.max() < 2 else 2 ** _bits(floats.max() / 2) - 1
        return Image.fromarray((255 / white * floats).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits, or what Pillow makes of them
        pixels = np.asarray(image).astype(np.int64)
        eight_bits = (pixels >> (_bits(pixels.max()) - 8)).clip(0, 255).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image  # to which alone Pillow converts it
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _bits(most: float) -> int:
    """The bits of a scanner or camera whose brightest pixel this is: files of 16 bits hold 8, 10, 12 or 14 as well.

    Paper is more than a quarter as bright as white, so the fewest that hold it are meant.
    """
    return next((bits for bits in (8, 10, 12, 14, 16, 24) if most < 2**bits), 32)


def _brightened(image: Image.Image) -> Image.Image:
    """Colours of 16 bits, of which Pillow keeps the upper 8: of 10 bits it leaves 2, of 12 bits 4, enough to read."""
    pixels = np.array(image)
    colours = pixels[..., : 1 if image.mode == "LA" else 3]
    white = 2 ** (_bits(256 * int(colours.max())) - 8) - 1
    if white:
        colours[...] = (255 / white * colours).round()
    return Image.fromarray(pixels)


def fit(size: tuple[int, int], short_edge: int, long_edge: int) -> tuple[int, int]:
    """The size of a page scaled so that its short edge is `short_edge`, or its long edge `long_edge` if that is less.

    Args:
        size: height, width.
    """
    scale = min(short_edge / min(size), long_edge / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def model_size(size: tuple[int, int], short_edge: int, config: DataConfig) -> tuple[int, int]:
    """The size at which a model sees a page, by `config.sizing`: as `fit` has it, or the same for all pages.

    Args:
        size: height, width of the page.
    """
    if config.sizing == "keep_aspect":
        return fit(size, short_edge, config.max_long_edge)
    return round(short_edge * max(1.0, config.squash_aspect)), round(short_edge * max(1.0, 1 / config.squash_aspect))


def sized(page: np.ndarray, short_edge: int, config: DataConfig) -> np.ndarray:
    """The page (H, W, 3) as the model sees it, (height, width, 3) of `model_size`.

    Squashed pages are resized as published weights have it: bilinear, over all the pixels that become one.
    """
    size = model_size(page.shape[:2], short_edge, config)
    if config.sizing == "keep_aspect":
        return resize(page, size)
    return np.array(Image.fromarray(page).resize(size[::-1], Image.Resampling.BILINEAR))


def canvas_of(sizes: list[tuple[int, int]], stride: int) -> tuple[int, int]:
    """The smallest height, width that holds all pages and is a multiple of the stride."""
    height, width = (max(size[side] for size in sizes) for side in (0, 1))
    return math.ceil(height / stride) * stride, math.ceil(width / stride) * stride


def resize(page: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> (height, width, 3); area averaging when it shrinks, so that thin strokes stay grey."""
    if page.shape[:2] == size:
        return page
    shrinks = size[0] < page.shape[0] or size[1] < page.shape[1]
    return cv2.resize(page, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def pad(pages: list[np.ndarray], stride: int) -> tuple[Tensor, Tensor]:
    """Lays pages (h, w, 3) of any size on the smallest common canvas, each in the upper left corner.

    Returns:
        images (B, 3, H, W) uint8, and sizes (B, 2) int64: h, w of each page
    """
    sizes = [page.shape[:2] for page in pages]
    # On the CPU, whatever device a host program has for its own tensors.
    images = torch.zeros(len(pages), 3, *canvas_of(sizes, stride), dtype=torch.uint8, device="cpu")
    for image, page in zip(images, pages, strict=True):
        image[:, : page.shape[0], : page.shape[1]] = torch.from_numpy(page).permute(2, 0, 1)
    return images, torch.tensor(sizes, device="cpu")


class Elastic(A.ElasticTransform):
    """Albumentations' elastic transform on a coarse grid, with points that are followed to a fraction of a pixel.

    Args:
        alpha, sigma: as albumentations has them, in pixels. Drawing the field at every pixel takes ten times as long
            and gives the same one: it is smooth over `sigma` pixels.
    """

    CELL = 4  # pixels

    def __init__(self, alpha: float, sigma: float, **more: Any) -> None:
        super().__init__(alpha / self.CELL, sigma / self.CELL, **more)  # the noise's mean over sigma^2 cells is larger

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        # Smoothed noise is wild at the border of its field: cut the page's out of a larger one.
        margin = math.ceil(3 * self.sigma)
        rows, columns = math.ceil(height / self.CELL), math.ceil(width / self.CELL)
        maps = super().get_params_dependent_on_data({"shape": (rows + 2 * margin, columns + 2 * margin)}, data)
        field = np.stack([maps["map_x"], maps["map_y"]], axis=-1)[margin:-margin, margin:-margin] - margin
        field = field - np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)  # (rows, columns, 2) pixels
        field = cv2.resize(field.astype(np.float32), (columns * self.CELL, rows * self.CELL))[:height, :width]
        x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
        return {"map_x": field[..., 0] + x, "map_y": field[..., 1] + y[:, None]}

    def apply_to_keypoints(
        self, keypoints: np.ndarray, map_x: np.ndarray, map_y: np.ndarray, **params: Any
    ) -> np.ndarray:
        start = keypoints[:, :2]
        moved = start.copy()
        for _ in range(4):  # the maps say where an output pixel came from; solve for where a point goes
            column = moved[:, 0].round().astype(int).clip(0, map_x.shape[1] - 1)
            row = moved[:, 1].round().astype(int).clip(0, map_x.shape[0] - 1)
            moved = start - np.stack([map_x[row, column] - column, map_y[row, column] - row], axis=-1)
        return np.concatenate([moved, keypoints[:, 2:]], axis=-1)


def have_an_area(boxes: np.ndarray) -> np.ndarray:
    """Which of (T, 4) xyxy boxes in pixels are not empty, nor slivers that clipping left: (T,) bool."""
    return (boxes[:, 2:] - boxes[:, :2] >= THINNEST).all(1)


def augmentation(config: AugmentConfig) -> A.Compose:
    """What may happen to a training page, in the order in which paper, camera and file format would do it."""
    limit = config.brightness_contrast_limit
    steps = [
        Elastic(
            alpha=config.elastic_alpha,
            sigma=config.elastic_sigma,
            noise_distribution="uniform",
            border_mode=cv2.BORDER_CONSTANT,
            fill=WHITE,
            p=config.elastic_p,
        ),
        A.Perspective(scale=(0, config.perspective_scale), fit_output=True, fill=WHITE, p=config.perspective_p),
        A.SafeRotate(limit=config.rotation_degrees, fill=WHITE, p=config.rotation_p),  # safe: shrinks, crops nothing
        A.RandomBrightnessContrast(brightness_limit=limit, contrast_limit=limit, p=config.brightness_contrast_p),
        A.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.0), p=config.blur_p),
        A.GaussNoise(std_range=(0.01, 0.05), per_channel=False, p=config.noise_p),
        A.ImageCompression(quality_range=(40, 90), p=config.compression_p),
    ]
    points = A.KeypointParams("xy", remove_invisible=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where everything that moves points is off
        return A.Compose([step for step in steps if step.p > 0], keypoint_params=points)


def augment(
    augmentation: A.Compose, page: np.ndarray, labels: np.ndarray, boxes: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Applies an augmentation as the seed decides.

    Points along the edges of a box go through all steps, and the new box is drawn around them. With a new box after
    each step, boxes would become too large.

    Args:
        page: (H, W, 3) uint8. labels: (T,). boxes: (T, 4) xyxy pixels.
    Returns:
        page, labels, boxes of the same form; boxes that left the page are dropped.
    """
    augmentation.set_random_seed(seed)
    outlines = [outline(box) - 0.5 for box in boxes]  # 0 is the centre of the first pixel
    result = augmentation(image=page, keypoints=np.concatenate([np.zeros((0, 2)), *outlines]))
    page = result["image"]
    if outlines:
        points = np.asarray(result["keypoints"], dtype=np.float64) + 0.5
        first = np.cumsum([0, *(len(points) for points in outlines[:-1])])
        boxes = np.concatenate([np.minimum.reduceat(points, first), np.maximum.reduceat(points, first)], axis=-1)
        boxes = boxes.clip(0, np.tile(page.shape[1::-1], 2))
    kept = have_an_area(boxes)
    return page, labels[kept], boxes[kept]


def outline(box: np.ndarray) -> np.ndarray:
    """Points along the edges of a box (4,) xyxy: 8 on each, more on long ones -> (P, 2).

    What bends a page bends it between two points as well, and would cut ink off a long thin box.
    """
    across, down = (np.linspace(0, 1, max(8, math.ceil(side / SPACING) + 1)) for side in box[2:] - box[:2])
    x = np.concatenate([across, across, np.zeros_like(down), np.ones_like(down)])  # upper, lower, left, right edge
    y = np.concatenate([np.zeros_like(across), np.ones_like(across), down, down])
    return box[:2] + np.stack([x, y], axis=-1) * (box[2:] - box[:2])
