"""FDR, fine-grained distribution refinement (paper section 4.1), and LQE, the location quality estimator.

A box is predicted as four discrete distributions, one for each edge (left, top, right, bottom), over N + 1
offsets W(0) .. W(N) of that edge from the initial box, in units of the initial box's width or height.
Every decoder layer refines the same four distributions. In code `edge_logits` (..., 4, N + 1) are the
unnormalised log-probabilities, `offsets` (..., 4) an expected or a true offset of each edge.
"""

import torch
from torch import Tensor, nn

from dfine.boxes import full_precision, xyxy_to_cxcywh
from dfine.model.layers import mlp, zero_last


def weighting_function(bins: int, a: float, c: float) -> Tensor:
    """W(n), n = 0 .. N (Eq. 3): fine steps near 0, coarse ones far away, odd around N/2.

    W(0) = -2a, W(N) = 2a, W(N/2) = 0, and for 1 <= n < N/2: W(n) = c - c (a/c + 1)^((N - 2n) / (N - 2)).
    (The original scales this by reg_scale = 1/c and divides by it again when decoding: the same numbers.)

    Args:
        bins: N, even. a: half the largest offset. c: curvature; the smaller, the finer the steps near 0.
    Returns:
        (N + 1,) float64, rising.
    """
    n = torch.arange(1, bins // 2, dtype=torch.float64)
    left = c - c * (a / c + 1) ** ((bins - 2 * n) / (bins - 2))
    ends = torch.tensor([-2.0 * a, 0.0, 2.0 * a], dtype=torch.float64)
    return torch.cat([ends[:1], left, ends[1:2], -left.flip(0), ends[2:]])


def expectation(edge_logits: Tensor, w: Tensor) -> Tensor:
    """Expected offsets sum_n W(n) softmax(edge_logits)_n (in Eq. 1): (..., 4, N + 1), (N + 1,) -> (..., 4)."""
    return (full_precision(edge_logits).softmax(-1) * w).sum(-1)  # as a matrix product autocast would make it bf16


def decode(reference: Tensor, offsets: Tensor) -> Tensor:
    """Moves the edges of a reference box (Eq. 1), outwards where an offset is positive.

    x1 = x - (1/2 + l) w, y1 = y - (1/2 + t) h, x2 = x + (1/2 + r) w, y2 = y + (1/2 + b) h.

    Args:
        reference: (..., 4) cxcywh. offsets: (..., 4) left, top, right, bottom, in widths (heights) of the reference.
    Returns:
        (..., 4) cxcywh; width or height is negative where opposite edges cross.
    """
    centre, size = reference[..., :2], reference[..., 2:]
    low = centre - (0.5 + offsets[..., :2]) * size
    high = centre + (0.5 + offsets[..., 2:]) * size
    return xyxy_to_cxcywh(torch.cat([low, high], dim=-1))


def encode(reference: Tensor, boxes: Tensor) -> Tensor:
    """The inverse of `decode`: offsets (..., 4) that move the edges of `reference` onto `boxes` (both cxcywh)."""
    centre, size = reference[..., :2], reference[..., 2:] + 1e-16
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    return torch.cat([(centre - low) / size - 0.5, (high - centre) / size - 0.5], dim=-1)


def soft_bins(offsets: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An offset as a distribution over the two bins around it, whose expectation it is.

    Offset d with W(n) <= d < W(n + 1) puts (W(n + 1) - d) / (W(n + 1) - W(n)) on bin n and the rest on n + 1.
    Below W(0) all is on bin 0, at or above W(N) all is on bin N.

    Args:
        offsets: any shape. w: (N + 1,) rising.
    Returns:
        left bin n (int64, 0 .. N - 1), its weight, the weight of bin n + 1; each in the shape of `offsets`.
    """
    left = (torch.searchsorted(w, offsets.contiguous(), right=True) - 1).clamp(0, len(w) - 2)
    right_weight = ((offsets - w[left]) / (w[left + 1] - w[left])).clamp(0, 1)
    return left, 1 - right_weight, right_weight


class LQE(nn.Module):
    """Location quality estimator: sure edges raise the class scores of a query, unsure ones lower them.

    Of each edge the `top` largest probabilities and their mean; the four edges together, a small MLP, one
    number that is added to all class logits.
    """

    def __init__(self, top: int = 4, hidden_dim: int = 64) -> None:
        super().__init__()
        self.top = top
        self.mlp = zero_last(mlp(4 * (top + 1), hidden_dim, 1))

    def forward(self, logits: Tensor, edge_logits: Tensor) -> Tensor:
        probabilities = full_precision(edge_logits).softmax(-1)  # (B, Q, 4, N + 1)
        best = probabilities.topk(self.top, dim=-1).values  # (B, Q, 4, top)
        statistics = torch.cat([best, best.mean(-1, keepdim=True)], dim=-1)  # (B, Q, 4, top + 1)
        return full_precision(logits) + full_precision(self.mlp(statistics.flatten(-2)))  # (B, Q, C)
