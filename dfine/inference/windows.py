"""Pages much longer than wide, or wider than long, such as pages one below the other: windows shaped like one page."""

import math

import numpy as np
import torch
from torch import Tensor

from dfine.config import DataConfig

LONG = 1.4  # longer than a page by this much, it is seen with less than 1 / LONG of the short edge that others have
MAX_WINDOWS = 1000  # of one page; a strip of few pixels would have more
SLACK = 0.03  # of a window: a model sees a box here a little otherwise than there

Box = tuple[int, int, int, int]  # xyxy pixels of the page


def aspect(data: DataConfig) -> float:
    """Long by short side of the longest page that a model sees with its whole short edge; squashed pages: of A4."""
    if data.sizing == "keep_aspect":
        return max(1.0, data.max_long_edge / data.eval_short_edge)
    return max(math.sqrt(2), data.squash_aspect, 1 / data.squash_aspect)


def is_long(size: tuple[int, int], data: DataConfig) -> bool:
    """Whether a page of this height and width is much longer than wide, or wider than long, for a model."""
    return max(size) > LONG * aspect(data) * min(size)


def windows_of(size: tuple[int, int], data: DataConfig) -> list[Box]:
    """Windows that cover a page and overlap by half of their length or more; of a page that is not long, all of it.

    Args:
        size: height, width of the page.
    """
    (height, width), long = size, max(size)
    if not is_long(size, data):
        return [(0, 0, width, height)]
    length = max(round(aspect(data) * min(size)), math.ceil(2 * long / MAX_WINDOWS))
    starts = np.linspace(0, long - length, math.ceil(2 * (long - length) / length) + 1).round().astype(int).tolist()
    if height > width:
        return [(0, start, width, start + length) for start in starts]
    return [(start, 0, start + length, height) for start in starts]


def best_seen_here(boxes: Tensor, windows: list[Box], index: int) -> Tensor:
    """Which boxes of a window are seen there with the most room to its edges: (K,) bool.

    A window that cuts a box sees a part of it, which is left out if the next window sees the whole. Of a box longer
    than the overlap, no window need see the whole; then its parts stay.

    Args:
        boxes: (K, 4) xyxy pixels of the page. index: of the window among all.
    """
    along = 0 if windows[0][0] != windows[-1][0] else 1
    starts, ends = (boxes.new_tensor([window[side] for window in windows]) for side in (along, along + 2))
    slack = SLACK * (ends[0] - starts[0])
    room = torch.minimum(boxes[:, along, None] - starts, ends - boxes[:, along + 2, None])  # (K, windows)
    return room[:, index] >= room.amax(1) - slack
