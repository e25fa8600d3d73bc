"""The typed things that cross a module boundary, and the letters every shape comment uses.

    B  pages in a batch               T  boxes of a page (it differs from page to page)
    Q  queries                        C  classes
    D  width of a token               L  decoder layers (always the leading dimension: layers are stacked)
    N  bins of an edge distribution (N + 1 values W(0) .. W(N))
    S  memory cells of all levels     H, W  height and width of an image or a map

Boxes are (centre x, centre y, width, height) as fractions of the page's own height and width, before
any padding, unless a name says otherwise (`xyxy`, `xywh`, `pixels`).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """The truth of one page."""

    labels: Tensor  # (T,) int64, contiguous from 0
    boxes: Tensor  # (T, 4) cxcywh, fractions of the page
    image_id: int  # the json's id
    size: tuple[int, int]  # height, width of the original image in pixels

    def to(self, device: torch.device) -> "Target":
        labels, boxes = self.labels.to(device, non_blocking=True), self.boxes.to(device, non_blocking=True)
        return self._replace(labels=labels, boxes=boxes)


class Batch(NamedTuple):
    """Pages padded to one canvas: each page lies in the upper left corner."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, not normalised (the model does that)
    sizes: Tensor  # (B, 2) int64: valid height, width in pixels
    targets: list[Target]

    def to(self, device: torch.device) -> "Batch":
        """Without waiting for a GPU, if the batch lies in pinned memory, where a loader puts it.

        The sizes stay on the CPU: in evaluation mode, as a teacher is, the model groups the pages by them.
        """
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.sizes, [target.to(device) for target in self.targets])


class Prediction(NamedTuple):
    """One plain head."""

    logits: Tensor  # (B, Q, C)
    boxes: Tensor  # (B, Q, 4)


class Refinement(NamedTuple):
    """All decoder layers, stacked; in evaluation mode only the last one (L = 1)."""

    logits: Tensor  # (L, B, Q, C)
    boxes: Tensor  # (L, B, Q, 4)
    edge_logits: Tensor  # (L, B, Q, 4, N + 1): left, top, right, bottom
    initial_boxes: Tensor  # (B, Q, 4) the frame the edges are measured in, detached


class Queries(NamedTuple):
    """Where the matching queries start: everything a second model needs to ask the same questions."""

    cells: Tensor  # (B, Q) int64, indices into the memory
    proposal: Tensor  # (B, Q, 4) reference box, detached
    valid: Tensor  # (B, Q) bool: False where a page has fewer cells than there are queries


class NoisedTruth(NamedTuple):
    """Noised truth boxes that the denoising queries start from: `groups` times M positives, then M negatives."""

    labels: Tensor  # (B, 2 M groups) int64; C in padded slots
    boxes: Tensor  # (B, 2 M groups, 4); zero in padded slots
    groups: int
    chosen: list[Tensor] | None = None  # the boxes of each page that are noised, on the CPU; None: all of all pages


class Denoising(NamedTuple):
    """Outputs of the denoising queries."""

    refined: Refinement
    initial: Prediction | None  # in training mode
    queries: NoisedTruth


class Cells(NamedTuple):
    """What the encoder's heads say of every memory cell: what query selection chooses from."""

    logits: Tensor  # (B, S, C)
    boxes: Tensor  # (B, S, 4)
    anchors: Tensor  # (B, S, 4)
    valid: Tensor  # (B, S) bool: False in the padding and where the anchor touches the border
    memory: Tensor  # (B, S, D) as the decoder reads it


class DFineOutput(NamedTuple):
    refined: Refinement
    queries: Queries
    initial: Prediction | None = None  # layer 1's plain head; in training mode
    encoder: Prediction | None = None  # the query-selection head; in training mode
    denoising: Denoising | None = None  # where noised truth was passed in
    on_teacher_queries: Refinement | None = None  # where a teacher's queries were passed in (distillation)
    cells: Cells | None = None  # where dense answers were asked for


class Matches(NamedTuple):
    """Matched pairs as flat indices, all of the same length; `layer` is None where one assignment serves all."""

    layer: Tensor | None
    batch: Tensor
    query: Tensor
    target: Tensor  # into the concatenated targets of the batch

    def to(self, device: torch.device) -> "Matches":
        *layer, batch, query, target = send([index for index in self if index is not None], device)
        return Matches(layer[0] if layer else None, batch, query, target)


def send(numbers: list[Tensor], device: torch.device) -> list[Tensor]:
    """Flat tensors of one type from the CPU to a device, in one copy; nothing waits for a GPU."""
    packed = torch.cat(numbers)
    if device.type == "cuda":
        packed = packed.pin_memory()
    return list(packed.to(device, non_blocking=True).split([len(each) for each in numbers]))


class Detections(NamedTuple):
    """What is found on one page, best first."""

    scores: Tensor  # (K,)
    labels: Tensor  # (K,) int64
    boxes: Tensor  # (K, 4) xyxy in pixels of the original image, clipped to it
