"""Hungarian matching of all heads at once: one cost tensor, one copy to the CPU."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dfine import distributed
from dfine.boxes import iou_and_giou
from dfine.config import MatcherConfig
from dfine.structures import Matches, Target

INVALID = -np.inf  # marks the costs of queries that may not be matched; no cost is


def match(
    logits: Tensor,
    boxes: Tensor,
    targets: list[Target],
    config: MatcherConfig,
    last_copies: int = 1,
    valid: Tensor | None = None,
) -> Matches:
    """Assigns to each head's queries the boxes of their page one to one, at the least total cost.

    Args:
        logits: (H, B, Q, C) of H heads. boxes: (H, B, Q, 4).
        last_copies: how many queries of the last head each box goes to, as far as there are as many.
        valid: (B, Q), which queries may be matched; None: all.
    Returns:
        On the CPU; `layer` is the head. Every box is matched once a head, unless a page has more boxes than queries.
    Raises:
        FloatingPointError: a cost is not finite; names head and image id.
    """
    labels = pad_sequence([target.labels for target in targets], batch_first=True)  # (B, T)
    truth = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=1)  # (B, T, 4)
    shape = (len(logits), *labels.shape)
    cost = matching_cost(logits, boxes, labels.expand(shape), truth.expand(*shape, 4), config)  # (H, B, Q, T)
    if valid is not None:
        cost = cost.masked_fill(~valid[..., None], INVALID)  # so that it travels to the CPU along with the costs
    costs = cost.cpu().numpy()
    first = np.cumsum([0] + [len(target.labels) for target in targets])

    def assign(i: int) -> list[tuple[np.ndarray, ...]]:
        """Page i's pairs in every head: head, page, query and box."""
        count = len(targets[i].labels)
        queries = np.flatnonzero((costs[0, i, :, :count] != INVALID).all(1))
        pairs: list[tuple[np.ndarray, ...]] = []
        for head, cost in enumerate(costs[:, i, queries, :count]):
            if not np.isfinite(cost).all():
                raise FloatingPointError(f"matching cost of head {head} is not finite on image {targets[i].image_id}")
            copies = max(1, min(last_copies, len(cost) // max(1, count))) if head == len(costs) - 1 else 1
            query, box = linear_sum_assignment(np.tile(cost, copies))
            box = box % max(1, count) + first[i]
            pairs.append((np.full_like(query, head), np.full_like(query, i), queries[query], box))
        return pairs

    with ThreadPoolExecutor(distributed.cores()) as pool:  # scipy works on several pages at once
        pages = list(pool.map(assign, range(len(targets))))
    columns = zip(*(pair for page in pages for pair in page), strict=True)
    return Matches(*(torch.from_numpy(np.concatenate(column)) for column in columns))


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
