"""Hungarian matching of all heads at once: one cost tensor, one copy to the CPU."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dfine.boxes import iou_and_giou
from dfine.config import MatcherConfig
from dfine.structures import Matches, Target


@torch.no_grad()
def matching_cost(logits: Tensor, boxes: Tensor, labels: Tensor, truth: Tensor, config: MatcherConfig) -> Tensor:
    """Cost of giving a box of the page to a query: focal class cost (alpha .25, gamma 2), L1 and -GIoU, weighted.

    Args:
        logits: (..., Q, C). boxes: (..., Q, 4). labels: (..., T) int64. truth: (..., T, 4).
    Returns:
        (..., Q, T)
    """
    p = logits.sigmoid()
    found = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    missed = 0.75 * p**2 * -(1 - p + 1e-8).log()
    index = labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1])  # (..., Q, T)
    classes = (found - missed).gather(-1, index)
    l1 = torch.cdist(boxes, truth, p=1)
    giou = iou_and_giou(boxes[..., :, None, :], truth[..., None, :, :])[1]
    return config.classes * classes + config.l1 * l1 - config.giou * giou


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: list[Target],
    config: MatcherConfig,
    last_copies: int = 1,
    real: Tensor | None = None,
) -> Matches:
    """Assigns to each head's queries the boxes of their page one to one, at the least total cost.

    Args:
        logits: (H, B, Q, C) of H heads. boxes: (H, B, Q, 4).
        last_copies: how many queries of the last head each box goes to, as far as there are as many.
        real: (B, Q), which queries may be matched; None: all.
    Returns:
        On the CPU; `layer` is the head. Every box is matched once a head, unless a page has more boxes than queries.
    Raises:
        FloatingPointError: a cost is not finite; names head and image id.
    """
    labels = pad_sequence([target.labels for target in targets], batch_first=True)  # (B, T)
    truth = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=1)  # (B, T, 4)
    shape = (len(logits), *labels.shape)
    costs = matching_cost(logits, boxes, labels.expand(shape), truth.expand(*shape, 4), config).cpu().numpy()
    usable = np.ones(logits.shape[1:3], dtype=bool) if real is None else real.cpu().numpy()  # (B, Q)
    pairs: list[tuple[np.ndarray, ...]] = []
    first = 0
    for i, target in enumerate(targets):
        count, queries = max(1, len(target.labels)), np.flatnonzero(usable[i])
        for head, cost in enumerate(costs[:, i, queries, : len(target.labels)]):
            if not np.isfinite(cost).all():
                raise FloatingPointError(f"matching cost of head {head} is not finite on image {target.image_id}")
            copies = max(1, min(last_copies, len(cost) // count)) if head == len(costs) - 1 else 1
            query, box = linear_sum_assignment(np.tile(cost, copies))
            pairs.append((np.full_like(query, head), np.full_like(query, i), queries[query], box % count + first))
        first += len(target.labels)
    return Matches(*(torch.from_numpy(np.concatenate(column)) for column in zip(*pairs, strict=True)))
