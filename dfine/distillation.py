"""A frozen teacher and a smaller student that answers the teacher's questions (GO-LSD across models).

D-FINE's bins are offsets in each model's own initial box, so two models' distributions cannot be compared bin by
bin. Two ideas make them comparable: the student's decoder runs a second time on the teacher's places (memory cells
and proposals), and the teacher's distributions are carried over into the student's frame.
"""

import torch
from torch import Tensor

from dfine.boxes import full_precision
from dfine.fdr import decode, encode, soft_bins


def check_teacher(teacher: dict, student: dict) -> None: ...


def project(
    edge_logits: Tensor, frame: Tensor, w: Tensor, student_frame: Tensor, student_w: Tensor, temperature: float = 1.0
) -> Tensor:
    """Carries edge distributions from one frame (and its bins) over into another.

    Bin n of an edge is a place: decode(frame, W(n)). Seen from the other frame that place is an offset
    d_n = encode(student_frame, decode(frame, W(n))), whose probability goes to the two bins around it:
    P = sum_n softmax(edge_logits / T)_n soft_bins(d_n). The identity where frames and bins agree; the expected box
    is kept unless places lie beyond the outermost bins.

    Args:
        edge_logits: (B, Q, 4, N + 1). frame, student_frame: (B, Q, 4) cxcywh. w: (N + 1,). student_w: (M + 1,).
    Returns:
        (B, Q, 4, M + 1) probabilities, detached.
    """
    with torch.no_grad():
        p = (full_precision(edge_logits) / temperature).softmax(-1)  # (B, Q, 4, N + 1)
        offsets = w[:, None].expand(-1, 4)  # (N + 1, 4) the same bin on all four edges
        places = decode(frame[..., None, :], offsets)  # (B, Q, N + 1, 4)
        d = encode(student_frame[..., None, :], places).transpose(-1, -2)  # (B, Q, 4, N + 1)
        left, left_weight, right_weight = soft_bins(d, student_w)
        projected = p.new_zeros(*p.shape[:-1], len(student_w))
        projected.scatter_add_(-1, left, p * left_weight)
        return projected.scatter_add_(-1, left + 1, p * right_weight)
