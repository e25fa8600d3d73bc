"""GO-LSD, global optimal localization self-distillation (paper section 4.2).

The union gathers every head's matching into one set of pairs that localisation is supervised by; DDF lets all
layers learn the last layer's edge distributions.
"""

import torch
from torch import Tensor

from dfine.structures import Matches


def union(matches: Matches, queries: int, last: int) -> Matches:
    """Every head casts a vote for its pairs; a query takes the box with most votes.

    Ties go to the last decoder layer's choice, then to the lower index. A box may keep several queries.

    Args:
        matches: of all heads, on the CPU. queries: Q. last: the head that is the last decoder layer.
    Returns:
        On the CPU; one assignment for all heads (`layer` is None), in order of page and query.
    """
    boxes = int(matches.target.numpy().max(initial=0)) + 1
    pair = (matches.batch * queries + matches.query) * boxes + matches.target
    pair, which = pair.unique(return_inverse=True)  # in order of page, query and target
    vote = torch.ones(len(which))
    vote[matches.layer == last] += 0.5  # the half decides ties and nothing else
    votes = torch.zeros(len(pair)).index_add(0, which, vote)
    order = votes.argsort(descending=True, stable=True)
    order = order[(pair[order] // boxes).argsort(stable=True)]  # each query's pairs together, most votes first
    query, target = pair[order] // boxes, pair[order] % boxes  # counted over all pages
    best = torch.ones_like(query, dtype=torch.bool)
    best[1:] = query[1:] != query[:-1]
    return Matches(None, query[best] // queries, query[best] % queries, target[best])


def kl_of_edges(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) summed over the four edges.

    Args:
        teacher: (..., 4, N + 1) probabilities at temperature T. student: (..., 4, N + 1) logits.
    Returns:
        (...)
    """
    log_student = (student / temperature).log_softmax(-1)
    return temperature**2 * (torch.xlogy(teacher, teacher) - teacher * log_student).sum((-1, -2))


def ddf(kl: Tensor, weight: Tensor, matched: Tensor, normalisers: Tensor, shares: Tensor) -> Tensor:
    """Decoupled distillation focal loss (Eq. 5): matched and unmatched queries are averaged apart, then combined.

    Args:
        kl: (L, B, Q) divergence of a query's four edges. weight: (L, B, Q), detached: IoU where matched, else the
            teacher's best class probability. matched: (B, Q) bool.
        normalisers: (2,) number of matched and of unmatched queries. shares: (2,) the numbers whose square roots
            weigh the two means.
    Returns:
        (L,)
    """
    weighted = weight * kl / 4  # a mean over edges
    sums = torch.stack([(weighted * matched).sum((1, 2)), (weighted * ~matched).sum((1, 2))], dim=-1)  # (L, 2)
    root = shares.clamp(min=torch.finfo(shares.dtype).tiny).sqrt()  # not 0: a batch may have no query at all
    return (sums / normalisers * root).sum(-1) / root.sum()
