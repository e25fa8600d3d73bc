"""The losses of detection and FGL: pure functions over stacked heads, each a sum per head (not yet normalised).

H heads (or L layers) lead; P are the matched pairs, given as the picked predictions and their truth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine.boxes import iou_and_giou
from dfine.model.fdr import soft_bins
from dfine.structures import Matches


def vfl(
    logits: Tensor, matches: Matches, labels: Tensor, ious: Tensor, alpha: float = 0.75, gamma: float = 2
) -> Tensor:
    """Varifocal loss (arXiv 2008.13367, Eq. 2): the score of a matched query learns its IoU, all others learn 0.

    A matched (query, class) has target and weight IoU; every other one target 0 and weight alpha p^gamma.

    Args:
        logits: (H, B, Q, C). matches: K pairs, `layer` being the head. labels: (K,) their classes.
        ious: (K,) IoU of each pair, detached.
    Returns:
        (H,) binary cross-entropy summed over pages, queries and classes.
    """
    p = logits.detach().sigmoid()
    index = (matches.layer, matches.batch, matches.query, labels)
    target = torch.zeros_like(p).index_put(index, ious)
    weight = (alpha * p**gamma).index_put(index, ious)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none").sum((1, 2, 3))


def box_losses(boxes: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L1 on raw cxcywh and 1 - GIoU.

    Args:
        boxes: (H, P, 4). truth: (P, 4).
    Returns:
        L1 (H,), GIoU loss (H,), and the pairs' IoU (H, P), detached.
    """
    iou, giou = iou_and_giou(boxes, truth)
    return (boxes - truth).abs().sum((1, 2)), (1 - giou).sum(1), iou.detach()


def fgl(edge_logits: Tensor, offsets: Tensor, w: Tensor, weight: Tensor) -> Tensor:
    """Fine-grained localization loss (Eq. 4): cross-entropy on the two bins around the true offset of each edge.

    Args:
        edge_logits: (L, P, 4, N + 1). offsets: (P, 4) true offsets from the initial box. w: (N + 1,).
        weight: (L, P) IoU of the layer's own box with its truth, detached.
    Returns:
        (L,) summed over pairs and edges.
    """
    left, left_weight, right_weight = soft_bins(offsets, w)  # (P, 4) each
    bins = torch.stack([left, left + 1], dim=-1).expand(len(edge_logits), -1, -1, -1)  # (L, P, 4, 2)
    log_p = edge_logits.log_softmax(-1).gather(-1, bins)  # (L, P, 4, 2)
    cross_entropy = -(log_p * torch.stack([left_weight, right_weight], dim=-1)).sum((-1, -2))  # (L, P)
    return (weight * cross_entropy).sum(1)
