"""Who is supervised by what: one pass over the matching queries, one over the denoising queries, no state.

Classes are supervised by each head's own matching, boxes and edges of all heads by the union of the matchings,
denoising queries by the box they were made from.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfine import distributed
from dfine.boxes import iou
from dfine.config import LossConfig
from dfine.losses.detection import box_losses, fgl, vfl
from dfine.losses.golsd import ddf, kl_of_edges, union
from dfine.losses.matcher import match
from dfine.model.denoising import denoising_matches
from dfine.model.fdr import encode
from dfine.structures import DFineOutput, Matches, Prediction, Refinement, Target, send


class Truth(NamedTuple):
    """The boxes of all pages of a batch, one after the other; `Matches.target` points here."""

    labels: Tensor  # (sum T,)
    boxes: Tensor  # (sum T, 4)


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
    refined = output.refined
    layers, pages, queries = refined.logits.shape[:3]
    device = refined.logits.device
    truth = Truth(torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets]))

    heads = stack(refined, output.initial, output.encoder)
    real = output.queries.real
    own = match(heads.logits, heads.boxes, targets, config.matcher, config.matcher.encoder_queries, real)
    pairs = union(own, queries, last=layers - 1)
    groups, slots = 1, 0
    if output.denoising is not None:
        groups, slots = output.denoising.queries.groups, output.denoising.queries.labels.shape[1]
    fixed = denoising_matches(targets, groups)

    noise_unmatched = pages * slots - len(fixed.query)
    counts = torch.tensor([len(truth.labels), len(pairs.query), -len(pairs.query), len(fixed.query), noise_unmatched])
    columns: list[Any] = [counts, *own, *pairs[1:], *fixed[1:]]
    counts, *indices = send(columns, device)
    own, pairs, fixed = Matches(*indices[:4]), Matches(None, *indices[4:7]), Matches(None, *indices[7:])
    counts[2] += real.sum()  # unmatched queries: only the device knows how many there are
    total = distributed.sum_over_processes(counts.to(w.dtype))
    share = total.clamp(min=1) / distributed.world_size()
    normalisers = Normalisers(share[0], share[1], share[1:3], total[1:3])
    terms = supervise(refined, heads, own, pairs, truth, w, normalisers, config)
    losses = name(terms, layers, ("", "_initial", "_encoder"))
    if output.denoising is not None:
        heads = stack(output.denoising.refined, output.denoising.initial)
        normalisers = Normalisers(share[0] * groups, share[0] * groups, share[3:5], total[1:3])
        terms = supervise(
            output.denoising.refined, heads, every_head(fixed, layers + 1), fixed, truth, w, normalisers, config
        )
        losses |= name(terms, layers, ("_denoising", "_denoising_initial"))
    return losses


def scheduled(config: LossConfig, epoch: float) -> LossConfig:
    """The config as it is after so many epochs, fractions included: `encoder_queries` is 1 from its end on."""
    if not 0 < config.matcher.encoder_queries_end_epoch <= epoch:
        return config
    return config.model_copy(update={"matcher": config.matcher.model_copy(update={"encoder_queries": 1})})


def supervise(
    refined: Refinement,
    heads: Prediction,
    own: Matches,
    pairs: Matches,
    truth: Truth,
    w: Tensor,
    normalisers: Normalisers,
    config: LossConfig,
) -> dict[str, Tensor]:
    """The weighted terms of one set of queries, a number a head: `own` supervises classes, `pairs` boxes and edges."""
    ious = iou(heads.boxes.detach()[own.layer, own.batch, own.query], truth.boxes[own.target])  # (K,)
    classes = vfl(heads.logits, own, truth.labels[own.target], ious)

    at = (slice(None), pairs.batch, pairs.query)  # the pairs' predictions, in every head
    paired_truth = truth.boxes[pairs.target]  # (P, 4)
    l1, giou, pair_ious = box_losses(heads.boxes[at], paired_truth)  # (H,), (H,), (H, P)

    offsets = encode(refined.initial_boxes[at[1:]], paired_truth)  # (P, 4)
    edges = fgl(refined.edge_logits[at], offsets, w, pair_ious[: len(refined.logits)])

    teacher = refined.edge_logits[-1].detach()
    kl = kl_of_edges((teacher / config.temperature).softmax(-1), refined.edge_logits[:-1], config.temperature)
    matched = torch.zeros(kl.shape[1:], dtype=torch.bool, device=kl.device)  # (B, Q)
    matched[at[1:]] = True
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


def name(terms: dict[str, Tensor], layers: int, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Takes the stacked heads apart: the layers under the first suffix, each plain head under its own."""
    losses = {f"{term}{suffixes[0]}": values[:layers] for term, values in terms.items()}
    for i, suffix in enumerate(suffixes[1:], start=layers):
        losses |= {f"{term}{suffix}": terms[term][i] for term in ("vfl", "l1", "giou")}
    return losses
