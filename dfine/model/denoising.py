"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3): queries that start from noised truth.

A group holds M positives, then M negatives, M being the most boxes of any page of this process's batch, up to a limit:
positives are moved a little and must find their box again, negatives are moved further and must answer "nothing".
Shorter pages fill up with padded slots: ordinary visible queries with zero content and a zero box.
`draw_noise` draws, `noised_truth` computes, so that recorded draws can be replayed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfine.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from dfine.config import DenoisingConfig
from dfine.structures import Matches, NoisedTruth, Target


def freshly_noised(targets: list[Target], classes: int, config: DenoisingConfig) -> NoisedTruth | None:
    """The denoising queries of a batch, from new noise; None where there shall be none."""
    if config.queries == 0:
        return None
    chosen = draw_boxes(targets, config.max_boxes)
    if chosen is not None:
        targets = [
            target._replace(labels=target.labels[boxes], boxes=target.boxes[boxes])
            for target, boxes in zip(targets, chosen, strict=True)
        ]
    noise = draw_noise(targets, config.queries, classes)
    noised = noised_truth(targets, noise, config.queries, classes, config.label_noise, config.box_noise)
    return noised._replace(chosen=chosen)


def draw_boxes(targets: list[Target], most: int) -> list[Tensor] | None:
    """Draws which boxes of each page are noised, at most so many, in order; None, without a draw: all of all pages.

    From torch's global generator of the CPU.
    """
    if most_boxes(targets) <= most:
        return None
    return [torch.randperm(len(target.labels))[:most].sort().values for target in targets]


def noised_share(targets: list[Target], chosen: list[Tensor] | None) -> float:
    """Of the boxes of this process's batch: those that are noised stand for the others, too."""
    return sum(map(len, chosen)) / sum(len(target.labels) for target in targets) if chosen else 1.0


class Noise(NamedTuple):
    """Everything random about a batch's denoising queries; K = 2 M groups slots."""

    label_coin: Tensor  # (B, K) uniform in [0, 1)
    new_label: Tensor  # (B, K) int64, uniform over the classes
    sign: Tensor  # (B, K, 4) -1 or 1, of x1, y1, x2, y2
    size: Tensor  # (B, K, 4) uniform in [0, 1)


def draw_noise(targets: list[Target], queries: int, classes: int) -> Noise:
    """Draws from torch's global generator of the targets' device."""
    device = targets[0].boxes.device
    shape = (len(targets), 2 * most_boxes(targets) * group_count(targets, queries))
    return Noise(
        label_coin=torch.rand(shape, device=device),
        new_label=torch.randint(0, classes, shape, device=device),
        sign=torch.randint(0, 2, (*shape, 4), device=device) * 2 - 1,
        size=torch.rand((*shape, 4), device=device),
    )


def noised_truth(
    targets: list[Target], noise: Noise, queries: int, classes: int, label_noise: float, box_noise: float
) -> NoisedTruth:
    """The denoising queries of a batch.

    Every corner coordinate moves by +-(size, plus 1 for negatives) * box_noise * half the width (x) or height (y) and
    is clipped to the page; sizes are made positive again. A label is redrawn where its coin lies below `label_noise`
    (it may be the old one again).
    """
    most, groups = most_boxes(targets), group_count(targets, queries)
    device = targets[0].boxes.device
    labels = torch.full((len(targets), most), classes, device=device)
    boxes = torch.zeros(len(targets), most, 4, device=device, dtype=targets[0].boxes.dtype)
    for i, target in enumerate(targets):
        labels[i, : len(target.labels)] = target.labels
        boxes[i, : len(target.labels)] = target.boxes
    labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)  # (B, K), (B, K, 4)

    negative = (torch.arange(labels.shape[1], device=device) // max(1, most)) % 2  # (K,) 0 or 1
    half_size = boxes[..., 2:].repeat(1, 1, 2) / 2  # (B, K, 4)
    shift = noise.sign * (noise.size + negative[:, None]) * box_noise * half_size
    noised = xyxy_to_cxcywh((cxcywh_to_xyxy(boxes) + shift).clamp(0, 1))
    noised = torch.cat([noised[..., :2], noised[..., 2:].abs()], dim=-1)  # (B, K, 4)
    redraw = (noise.label_coin < label_noise) & (labels < classes)
    return NoisedTruth(torch.where(redraw, noise.new_label, labels), noised, groups)


def group_count(targets: list[Target], queries: int) -> int:
    """max(1, queries // M): about `queries` positives in all."""
    return max(1, queries // max(1, most_boxes(targets)))


def most_boxes(targets: list[Target]) -> int:
    """M: the most boxes of any page."""
    return max((len(target.labels) for target in targets), default=0)


def attention_mask(slots: int, groups: int, queries: int, device: torch.device) -> Tensor:
    """True where attention is blocked: a group sees itself and the matching queries, which see no group.

    Args:
        slots: denoising queries in all, in front of the `queries` matching queries.
    Returns:
        (slots + queries, slots + queries) bool
    """
    group = torch.arange(slots, device=device) // max(1, slots // groups)
    group = torch.cat([group, torch.full((queries,), groups, device=device)])  # the matching queries come last
    return (group[:, None] != group) & (group < groups)


def match_denoising(targets: list[Target], groups: int, chosen: list[Tensor] | None = None) -> Matches:
    """The fixed assignment: in every group the j-th positive of a page belongs to its j-th noised box. On the CPU.

    Args:
        chosen: which boxes of each page are noised, as in `NoisedTruth`.
    """
    chosen = chosen or [torch.arange(len(target.labels)) for target in targets]
    most = max((len(boxes) for boxes in chosen), default=0)
    batch, query, target, first = [], [], [], 0
    for i, (page, boxes) in enumerate(zip(targets, chosen, strict=True)):
        j = torch.arange(len(boxes)).repeat(groups)
        batch.append(torch.full_like(j, i))
        query.append(j + 2 * most * torch.arange(groups).repeat_interleave(len(boxes)))
        target.append(boxes.repeat(groups) + first)
        first += len(page.labels)
    return Matches(None, torch.cat(batch), torch.cat(query), torch.cat(target))
