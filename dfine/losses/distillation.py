"""Distillation: a small student learns a frozen teacher's scores, boxes and edge distributions.

D-FINE's bins are offsets in each model's own initial box, so the edge distributions of two models cannot be compared
bin by bin. Two steps make them comparable: the student's decoder answers the teacher's queries as well, from the same
memory cells and proposals but with its own memory (`shared` in `DFine.forward`), and the teacher's distribution is
carried over from its frame into the student's (`project`). The losses are pure functions, each a sum per layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dfine import distributed
from dfine.boxes import iou
from dfine.config import DistillConfig, MatcherConfig
from dfine.losses.golsd import ddf, kl_of_edges
from dfine.losses.matcher import match
from dfine.model.fdr import decode, encode, soft_bins
from dfine.structures import Refinement, Target


def active(config: DistillConfig, epoch: float) -> dict[str, float]:
    """The terms that count now and their weights, alpha included; none: the teacher need not be asked.

    Args:
        epoch: epochs done, fractions included.
    """
    go_lsd = config.go_lsd.weight if epoch >= config.go_lsd.start_epoch else 0.0
    weights = {"class": config.classes.weight, "box": config.boxes.weight, "go_lsd": go_lsd}
    return {term: config.alpha * weight for term, weight in weights.items() if config.alpha * weight > 0}


def distillation(
    student: Refinement,
    teacher: Refinement,
    w: Tensor,
    teacher_w: Tensor,
    targets: list[Target],
    weights: dict[str, float],
    config: DistillConfig,
    matcher: MatcherConfig,
    real: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted losses of the shared queries, a number for each of the student's layers.

    Args:
        student: its answers to the teacher's queries, of all layers. teacher: its answers; the last layer counts.
        w, teacher_w: W(n) of either model, (N + 1,) each; N may differ.
        weights: of the terms to compute, see `active`. real: `Queries.real` of the teacher; None: all are.
    Returns:
        `distill_class`, `distill_box` and `distill_go_lsd`, as far as they have a weight, (L,) each.
    Raises:
        FloatingPointError: the teacher's answer is not finite; names the image id.
    """
    logits, boxes = teacher.logits[-1].detach(), teacher.boxes[-1].detach()  # (B, Q, C), (B, Q, 4)
    confidence = logits.sigmoid().amax(-1)  # (B, Q)
    losses = {}
    if "class" in weights:
        temperature = config.classes.temperature
        kl = config.classes.loss == "kl"
        sums = class_kl(logits, student.logits, temperature) if kl else class_mse(logits, student.logits)
        losses["class"] = sums / normaliser(logits.new_tensor(sum(len(target.labels) for target in targets)))
    if "box" in weights:
        sums = box_distance(boxes, student.boxes, confidence, squared=config.boxes.loss == "mse")
        losses["box"] = sums / normaliser(confidence.sum(), least=torch.finfo(w.dtype).tiny)
    if "go_lsd" in weights:
        losses["go_lsd"] = go_lsd(student, teacher, w, teacher_w, targets, config.go_lsd.temperature, matcher, real)
    return {f"distill_{term}": weights[term] * loss for term, loss in losses.items()}


def class_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of every score, each a Bernoulli distribution sigmoid(logit / T).

    Args:
        teacher: (B, Q, C) logits. student: (L, B, Q, C) logits.
    Returns:
        (L,) summed over pages, queries and classes.
    """
    teacher, student = teacher / temperature, student / temperature
    p = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher, p, reduction="none")
    cross_entropy = F.binary_cross_entropy_with_logits(student, p.expand_as(student), reduction="none")
    return temperature**2 * (cross_entropy - entropy).sum((1, 2, 3))


def class_mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Squared differences of the scores (not of the logits): (B, Q, C), (L, B, Q, C) logits -> (L,) summed."""
    return (student.sigmoid() - teacher.sigmoid()).square().sum((1, 2, 3))


def box_distance(teacher: Tensor, student: Tensor, confidence: Tensor, squared: bool) -> Tensor:
    """L1 or squared distance of raw cxcywh, weighted by the teacher's confidence.

    Args:
        teacher: (B, Q, 4). student: (L, B, Q, 4). confidence: (B, Q) the teacher's best class probability.
    Returns:
        (L,) summed over pages and queries.
    """
    difference = student - teacher
    distance = difference.square() if squared else difference.abs()
    return (confidence * distance.sum(-1)).sum((1, 2))


def go_lsd(
    student: Refinement,
    teacher: Refinement,
    w: Tensor,
    teacher_w: Tensor,
    targets: list[Target],
    temperature: float,
    matcher: MatcherConfig,
    real: Tensor | None = None,
) -> Tensor:
    """GO-LSD across models: DDF of every layer of the student against the teacher's last layer -> (L,).

    A query that the teacher matches to a box weighs the IoU of the teacher's box with it, any other the teacher's
    best class probability; matched and unmatched queries are averaged apart (paper section 4.2).
    """
    logits, boxes, edge_logits = (x[-1].detach() for x in teacher[:3])
    try:
        pairs = match(logits[None], boxes[None], targets, matcher, real=real).to(logits.device)
    except FloatingPointError as error:
        raise FloatingPointError(f"the teacher's answer: {error}") from error
    at = (pairs.batch, pairs.query)
    matched = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)  # (B, Q)
    matched[at] = True
    weight = logits.sigmoid().amax(-1)  # (B, Q)
    weight[at] = iou(boxes[at], torch.cat([target.boxes for target in targets])[pairs.target])

    p = (edge_logits / temperature).softmax(-1)  # (B, Q, 4, N + 1)
    p = project(p, teacher.initial_boxes, teacher_w, student.initial_boxes, w)  # (B, Q, 4, the student's N + 1)
    kl = kl_of_edges(p, student.edge_logits, temperature)  # (L, B, Q)
    unmatched = ~matched if real is None else real & ~matched
    counts = torch.stack([matched.sum(), unmatched.sum()]).to(w.dtype)  # (2,)
    return ddf(kl, weight, matched, normaliser(counts), shares=normaliser(counts, least=0))


def project(p: Tensor, frame: Tensor, w: Tensor, new_frame: Tensor, new_w: Tensor) -> Tensor:
    """Carries edge distributions over into another frame, bin by bin: the edge positions stay where they are.

    Bin n of an edge stands for a place on the page, decode(frame, W(n)); its probability goes to the two bins around
    that place in the new frame. So the decoded box stays, up to what lies beyond the outermost bins of the new frame
    and is moved onto them; with the same frame and W the distribution itself stays.

    Args:
        p: (..., 4, N + 1) probabilities. frame, new_frame: (..., 4) initial boxes, cxcywh.
        w, new_w: (N + 1,) each; N may differ.
    Returns:
        (..., 4, new N + 1) probabilities.
    """
    offsets = w.view(-1, *[1] * frame.dim()).expand(-1, *frame.shape)  # (N + 1, ..., 4): W(n) on all four edges
    offsets = encode(new_frame, decode(frame, offsets)).movedim(0, -1)  # (..., 4, N + 1)
    left, left_weight, right_weight = soft_bins(offsets, new_w)
    projected = p.new_zeros(*p.shape[:-1], len(new_w))
    return projected.scatter_add(-1, left, p * left_weight).scatter_add(-1, left + 1, p * right_weight)


def normaliser(count: Tensor, least: float = 1) -> Tensor:
    """What sums are divided by: a count over all processes, divided by their number."""
    return distributed.sum_over_processes(count).clamp(min=least) / distributed.world_size()
