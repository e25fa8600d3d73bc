"""Pages with named boxes, for people to look at. Pages are (H, W, 3) uint8 RGB."""

import colorsys
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import ImageFont
from torchvision.utils import draw_bounding_boxes, make_grid

from dfine.data.transforms import canvas_of


def draw(
    page: np.ndarray, labels: np.ndarray, boxes: np.ndarray, names: Sequence[str], scores: np.ndarray | None = None
) -> np.ndarray:
    """The page with its boxes in their classes' colours, each with its name and, where there is one, its score.

    Args:
        page: (H, W, 3) uint8. labels: (K,). boxes: (K, 4) xyxy pixels, best first. names: of the labels.
    Returns:
        (H, W, 3) uint8
    """
    if len(boxes) == 0:
        return page
    captions = [names[label] for label in labels]
    if scores is not None:
        captions = [f"{caption} {score:.2f}" for caption, score in zip(captions, scores, strict=True)]
    long_edge = max(page.shape)
    backwards = slice(None, None, -1)  # the best box is drawn last, on top
    drawn = draw_bounding_boxes(
        torch.from_numpy(page).permute(2, 0, 1),
        torch.from_numpy(boxes[backwards].copy()),
        captions[backwards],
        [colour(int(label)) for label in labels[backwards]],
        width=1 + long_edge // 800,
        # torchvision scales only fonts from a file; this is the one that Pillow brings along.
        font=BytesIO(ImageFont.load_default(1).font_bytes),  # type: ignore[union-attr]
        font_size=max(9, long_edge // 80),
        label_colors="white",
        fill_labels=True,
    )
    return drawn.permute(1, 2, 0).numpy()


def colour(label: int) -> tuple[int, int, int]:
    """A class's colour: dark enough for white text, and far from those of the labels next to it."""
    red, green, blue = colorsys.hls_to_rgb(label * 0.618 % 1, 0.33, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def grid(pages: list[np.ndarray], columns: int) -> np.ndarray:
    """Pages of any size side by side on grey, row by row, each in the upper left corner of its cell."""
    height, width = canvas_of([(page.shape[0], page.shape[1]) for page in pages], 1)
    cells = torch.full((len(pages), 3, height, width), 128, dtype=torch.uint8)
    for cell, page in zip(cells, pages, strict=True):
        cell[:, : page.shape[0], : page.shape[1]] = torch.from_numpy(page).permute(2, 0, 1)
    return make_grid(cells, nrow=columns, padding=8, pad_value=128).permute(1, 2, 0).numpy()
