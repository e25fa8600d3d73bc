"""Who is supervised by what: one pass over the matching queries, one over the denoising queries, no state.

Classes are supervised by each head's own matching, boxes and edges of all heads by the union of the matchings,
denoising queries by the box they were made from.
"""

from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfine import distributed
from dfine.boxes import iou
from dfine.config import LossConfig
from dfine.losses.detection import box_losses, fgl, vfl
from dfine.losses.golsd import ddf, kl_of_edges, union
from dfine.losses.matcher import match
from dfine.model.denoising import match_denoising, noised_share
from dfine.model.fdr import encode
from dfine.structures import DFineOutput, Matches, Prediction, Refinement, Target, send


class Truth(NamedTuple):
    """The boxes of all pages of a batch, one after the other; `Matches.target` points here."""

    labels: Tensor  # (sum T,)
    boxes: Tensor  # (sum T, 4)


class Counts(NamedTuple):
    """What there is in the batches of all processes."""

    boxes: Tensor  # ()
    pairs: Tensor  # () of the union
    queries: Tensor  # (2,) matching queries that the union gives a box, and the others
    slots: Tensor  # (2,) denoising queries that stand for a box, and the others

    @classmethod
    def of(cls, numbers: Tensor) -> "Counts":
        """From (5,): the pairs of the union are the matched queries."""
        return cls(numbers[0], numbers[1], numbers[1:3], numbers[3:5])


class Normalisers(NamedTuple):
    """What sums are divided by: counts over all processes, divided by the number of processes."""

    boxes: Tensor  # ()
    pairs: Tensor  # () of the union
    queries: Tensor  # (2,) matched and unmatched, for DDF
    shares: Tensor  # (2,) whose square roots weigh DDF's two means


def criterion(output: DFineOutput, targets: list[Target], w: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """All losses of D-FINE, weighted: named terms whose sum is the total.

    `vfl`, `l1`, `giou` and `fgl` hold a number for each decoder layer, `ddf` for all but the last; the plain heads
    have `_initial` and `_encoder` behind the name, denoising queries `_denoising` and `_denoising_initial`.

    Args:
        output: of the model in training mode. w: W(n), (N + 1,).
    Raises:
        FloatingPointError: a matching cost is not finite; names head and image id.
    """
    refined, valid = output.refined, output.queries.valid
    layers, pages, queries = refined.logits.shape[:3]
    truth = Truth(torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets]))
    groups, slots, chosen = 1, 0, None
    if output.denoising is not None:
        noised = output.denoising.queries
        groups, slots, chosen = noised.groups, noised.labels.shape[1], noised.chosen

    heads = stack(refined, output.initial, output.encoder)
    matches = match(heads.logits, heads.boxes, targets, config.matcher, config.matcher.encoder_queries, valid)
    union_pairs = union(matches, queries, last=layers - 1)
    denoising_matches = match_denoising(targets, groups, chosen)
    pairs, positives = len(union_pairs.query), len(denoising_matches.query)
    numbers = torch.tensor([len(truth.labels), pairs, pairs, positives, pages * slots - positives])

    columns: list[Any] = [numbers, *matches, *union_pairs[1:], *denoising_matches[1:]]
    sent = iter(send(columns, valid.device))  # in one copy
    numbers, matches = next(sent), Matches(*islice(sent, 4))
    union_pairs, denoising_matches = Matches(None, *islice(sent, 3)), Matches(None, *islice(sent, 3))
    numbers[2] = valid.sum() - numbers[2]  # only the device knows how many queries are valid
    numbers[4] -= slots * (~valid.any(1)).sum()  # pages that the truth does not teach: see `on_labelled_pages`
    numbers = distributed.sum_over_processes(numbers.to(w.dtype))
    counts = Counts.of(numbers)
    shares = Counts.of(numbers.clamp(min=1) / distributed.world_size())

    normalisers = Normalisers(shares.boxes, shares.pairs, shares.queries, counts.queries)
    terms = supervise(refined, heads, matches, union_pairs, truth, w, normalisers, config)
    losses = split_heads(terms, layers, ("", "_initial", "_encoder"))
    if output.denoising is not None:
        refined, heads = output.denoising.refined, stack(output.denoising.refined, output.denoising.initial)
        matches = every_head(denoising_matches, layers + 1)
        # DDF's two means are combined as those of the matching queries are: so the original does.
        boxes = shares.boxes * groups * noised_share(targets, chosen)
        normalisers = Normalisers(boxes, boxes, shares.slots, counts.queries)
        terms = supervise(refined, heads, matches, denoising_matches, truth, w, normalisers, config)
        losses |= split_heads(terms, layers, ("_denoising", "_denoising_initial"))
    return losses


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of all terms of `criterion` -> ()."""
    return torch.stack([loss.sum() for loss in losses.values()]).sum()


def scheduled(config: LossConfig, epoch: float) -> LossConfig:
    """The config as it is after so many epochs, fractions included: `encoder_queries` is 1 from its end on."""
    if not 0 < config.matcher.encoder_queries_end_epoch <= epoch:
        return config
    return config.model_copy(update={"matcher": config.matcher.model_copy(update={"encoder_queries": 1})})


def supervise(
    refined: Refinement,
    heads: Prediction,
    matches: Matches,
    union_pairs: Matches,
    truth: Truth,
    w: Tensor,
    normalisers: Normalisers,
    config: LossConfig,
) -> dict[str, Tensor]:
    """The weighted terms of one set of queries, a number a head.

    Args:
        refined: the layers. heads: all of them and the plain heads, stacked.
        matches: of each head, for classes. union_pairs: for boxes and edges of all heads.
    """
    ious = iou(heads.boxes.detach()[matches.layer, matches.batch, matches.query], truth.boxes[matches.target])  # (K,)
    classes = vfl(heads.logits, matches, truth.labels[matches.target], ious)

    at = (slice(None), union_pairs.batch, union_pairs.query)  # the pairs' predictions, in every head
    paired_truth = truth.boxes[union_pairs.target]  # (P, 4)
    l1, giou, pair_ious = box_losses(heads.boxes[at], paired_truth)  # (H,), (H,), (H, P)

    offsets = encode(refined.initial_boxes[at[1:]], paired_truth)  # (P, 4)
    edges = fgl(refined.edge_logits[at], offsets, w, pair_ious[: len(refined.logits)])

    teacher = refined.edge_logits[-1].detach()
    kl = kl_of_edges((teacher / config.temperature).softmax(-1), refined.edge_logits[:-1], config.temperature)
    matched = torch.zeros(kl.shape[1:], dtype=torch.bool, device=kl.device)  # (B, Q)
    matched.index_put_(at[1:], matched.new_ones(()))  # `= True` would wait for the GPU up to torch 2.14
    weight = refined.logits[-1].detach().sigmoid().amax(-1).repeat(len(kl), 1, 1)  # (L - 1, B, Q)
    weight[at] = pair_ious[: len(kl)]
    return {
        "vfl": config.vfl * classes / normalisers.boxes,
        "l1": config.l1 * l1 / normalisers.pairs,
        "giou": config.giou * giou / normalisers.pairs,
        "fgl": config.fgl * edges / normalisers.pairs,
        "ddf": config.ddf * ddf(kl, weight, matched, normalisers.queries, normalisers.shares),
    }


def stack(refined: Refinement, *plain: Prediction | None) -> Prediction:
    """Layers and plain heads as one: logits (H, B, Q, C), boxes (H, B, Q, 4)."""
    heads = [head for head in plain if head is not None]
    return Prediction(
        torch.cat([refined.logits, *(head.logits[None] for head in heads)]),
        torch.cat([refined.boxes, *(head.boxes[None] for head in heads)]),
    )


def every_head(matches: Matches, heads: int) -> Matches:
    """One assignment, repeated for each of H heads."""
    layer = torch.arange(heads, device=matches.batch.device).repeat_interleave(len(matches.batch))
    return Matches(layer, *(index.repeat(heads) for index in matches[1:]))


def split_heads(terms: dict[str, Tensor], layers: int, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Takes the stacked heads apart: the layers under the first suffix, each plain head under its own."""
    losses = {f"{term}{suffixes[0]}": values[:layers] for term, values in terms.items()}
    for i, suffix in enumerate(suffixes[1:], start=layers):
        losses |= {f"{term}{suffix}": terms[term][i] for term in ("vfl", "l1", "giou")}
    return losses
