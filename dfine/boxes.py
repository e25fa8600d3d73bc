"""What torchvision lacks or does otherwise: boxes as (cx, cy, w, h), overlaps without epsilons, element by element.

All functions broadcast over the leading dimensions: `iou(a, b)` of two (K, 4) gives K numbers, and
`iou(a[:, None], b)` gives all pairs. No epsilon is added, so an 8-pixel box has IoU 1 with itself.
"""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy. Negative widths and heights, which FDR can decode, count as 0."""
    centre, size = boxes[..., :2], boxes[..., 2:].clamp(min=0)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) xyxy -> (..., 4) cxcywh. Sizes keep their sign."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of (..., 4) cxcywh boxes; at least one of the two must have an area. -> (...)"""
    return iou_and_giou(a, b)[0]


def iou_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv 1902.09630) of (..., 4) cxcywh boxes -> (...), (...)."""
    left, top, right, bottom = cxcywh_to_xyxy(a).unbind(-1)  # single coordinates: last dimensions of 2 are slow
    left_b, top_b, right_b, bottom_b = cxcywh_to_xyxy(b).unbind(-1)
    width = torch.minimum(right, right_b) - torch.maximum(left, left_b)
    height = torch.minimum(bottom, bottom_b) - torch.maximum(top, top_b)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = (right - left) * (bottom - top) + (right_b - left_b) * (bottom_b - top_b) - intersection
    width = torch.maximum(right, right_b) - torch.minimum(left, left_b)
    height = torch.maximum(bottom, bottom_b) - torch.minimum(top, top_b)
    hull = width * height
    overlap = intersection / union
    return overlap, overlap - (hull - union) / hull


def logit(fraction: Tensor) -> Tensor:
    """Inverse sigmoid, finite: its argument is clamped 1e-5 inside (0, 1)."""
    return torch.logit(fraction, eps=1e-5)


def full_precision(x: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and float64 stay. For boxes, softmax and losses under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: on GPUs, and on CPUs with `avx512_bf16` (all with `amx_bf16` have it).

    Other CPUs compute in bf16 as well, ten times as slowly. What mkldnn calls support is AVX-512 without it, too.
    """
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
