"""Denoising, matching and losses give the original implementation's numbers (conftest.py says which)."""

from collections import Counter

import pytest
import torch
from recorded import Golden, answer, check_bins, check_gradients, layer_names, named, transformer
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dfine.boxes import cxcywh_to_xyxy, logit
from dfine.config import LossConfig, MatcherConfig
from dfine.losses.criterion import criterion, stack
from dfine.losses.golsd import union
from dfine.losses.matcher import match, matching_cost
from dfine.model.denoising import (
    Noise,
    attention_mask,
    draw_noise,
    match_denoising,
    noised_truth,
)
from dfine.model.fdr import encode, soft_bins, weighting_function
from dfine.structures import Denoising, DFineOutput, Matches, NoisedTruth, Prediction, Queries, Refinement, Target

# Denoising


@pytest.mark.golden("10_*.npz", "denoising")
def test_denoising_queries_and_their_mask_are_the_originals(golden: Golden):
    for case in set(golden.cases()) - {"stat"}:
        check_replay(golden, case)
    nothing = Target(torch.empty(0, dtype=torch.int64), torch.empty(0, 4), 0, (480, 640))
    noised = noised_truth([nothing], draw_noise([nothing], 100, 5), 100, 5, 0.25, 1.0)
    check_groups(golden, "out.empty.", [nothing], noised, int(golden["out.empty.num_split"][1]))
    check_draws(golden)


def replayed(golden: Golden, prefix: str, targets: list[Target], queries: int, classes: int) -> NoisedTruth:
    """The denoising queries of recorded draws."""
    coin, label, bit, size = (golden[f"{prefix}{name}"] for name in ("label_coin", "new_label", "sign_bit", "size"))
    return noised_truth(targets, Noise(coin, label, 2 * bit - 1, size), queries, classes, 0.25, 1.0)


def check_replay(golden: Golden, case: str) -> None:
    targets, queries = golden.targets(f"in.{case}."), int(golden.number(f"in.{case}.num_denoising"))
    embedding = golden["sd.class_embed.weight"]
    noised = replayed(golden, f"in.{case}.rand.", targets, queries, len(embedding) - 1)
    golden.check(noised.labels, f"out.{case}.classes")
    golden.check(embedding[noised.labels], f"out.{case}.content")
    golden.check(logit(noised.boxes), f"out.{case}.box_unact")
    low, high = golden[f"out.{case}.corners_clipped"].chunk(2, dim=-1)  # crossed; sizes are made positive later
    corners = torch.cat([low.minimum(high), low.maximum(high)], dim=-1)
    golden.check(cxcywh_to_xyxy(noised.boxes), f"out.{case}.corners_clipped", expected=corners)
    queries = int(golden.number(f"in.{case}.num_queries"))
    mask = attention_mask(noised.labels.shape[1], noised.groups, queries, noised.boxes.device)
    golden.check(mask, f"out.{case}.attn_mask")
    check_groups(golden, f"out.{case}.", targets, noised, queries)


def check_groups(golden: Golden, prefix: str, targets: list[Target], noised: NoisedTruth, queries: int) -> None:
    """Groups, slots, and which slots are positives. Without any box the original has no group, we have empty ones."""
    slots = noised.labels.shape[1]
    golden.check(torch.tensor(noised.groups if slots else 0), f"{prefix}num_group")
    golden.check(torch.tensor([slots, queries]), f"{prefix}num_split")
    fixed = match_denoising(targets, noised.groups)
    for page in golden.cases(f"{prefix}positive_idx."):
        golden.check(fixed.query[fixed.batch == int(page)], f"{prefix}positive_idx.{page}")


def check_draws(golden: Golden) -> None:
    """Our own draws have the statistics of as many of the original's."""
    torch.manual_seed(0)
    target = Target(golden["in.stat.labels"], golden["in.stat.boxes"], 0, (480, 640))
    boxes, classes = len(target.labels), len(golden["sd.class_embed.weight"]) - 1
    groups = 5
    pages = int(golden.number("out.stat.label_samples")) // (2 * groups * boxes)
    targets, queries = [target] * pages, groups * boxes
    noised = noised_truth(targets, draw_noise(targets, queries, classes), queries, classes, 0.25, 1.0)

    low, high = cxcywh_to_xyxy(noised.boxes).unflatten(1, (groups, 2, boxes)).chunk(2, dim=-1)
    centre, half = target.boxes[:, :2], target.boxes[:, 2:] / 2
    negative = torch.tensor([0, 1]).view(2, 1, 1)
    crossed = (low > centre - half) & (low < centre) & (negative == 1)  # both corners moved inwards, past each other
    low, high = torch.where(crossed, high, low), torch.where(crossed, low, high)
    shift = torch.stack([low - (centre - half), high - (centre + half)]) / half  # (2, pages, groups, 2, boxes, 2)
    got = {"plus_sign_fraction": (shift > 0).float().mean()}
    for name, ratio in zip(("positive", "negative"), shift.abs().unbind(3), strict=True):
        got |= {f"{name}_ratio_min": ratio.min(), f"{name}_ratio_max": ratio.max(), f"{name}_ratio_mean": ratio.mean()}
    got["label_changed_fraction"] = (noised.labels != target.labels.repeat(2 * groups)).float().mean()
    got["label_changed_expected"] = torch.tensor(0.25 * (1 - 1 / classes))
    for name, value in got.items():
        assert value.item() == pytest.approx(golden.number(f"out.stat.{name}"), abs=0.01), name


# Matching


@pytest.mark.golden("11_*.npz", "matching cost, matching")
def test_costs_and_matches_are_the_originals_wherever_they_are_finite(golden: Golden):
    for case in golden.cases():
        logits, boxes = golden[f"in.{case}.logits"], golden[f"in.{case}.boxes"]
        for page, target in enumerate(golden.targets(f"in.{case}.")):
            prefix, one = f"out.{case}.{page}.", slice(page, page + 1)
            cost = matching_cost(logits[page], boxes[page], target.labels, target.boxes, MatcherConfig())
            golden.check(cost.nan_to_num(nan=1.0), f"{prefix}cost")  # what the original makes of a NaN
            if cost.isfinite().all():
                found = match(logits[None, one], boxes[None, one], [target], MatcherConfig())
                golden.check(found.query, f"{prefix}query")
                golden.check(found.target, f"{prefix}target")
            else:
                with pytest.raises(FloatingPointError, match=f"image {page}"):
                    match(logits[None, one], boxes[None, one], [target], MatcherConfig())
                query, box = map(torch.from_numpy, linear_sum_assignment(cost.nan_to_num(nan=1.0)))
                golden.check(query, f"{prefix}query")
                golden.check(box, f"{prefix}target")


@pytest.mark.golden("12_*.npz", "union")
def test_every_query_takes_a_box_with_as_many_votes_as_in_the_original(golden: Golden):
    for case in golden.cases():
        votes = votes_of(golden, case)
        found = union(votes, queries=1000, last=int(votes.layer.max()))
        for page in golden.cases(f"out.{case}."):
            prefix, number = f"out.{case}.{page}.", int(page.removeprefix("b"))
            count, ours = Counter(pairs_of(votes, number)), pairs_of(found, number)
            theirs = recorded_pairs(golden, prefix, "_sorted")
            assert sorted(recorded_pairs(golden, prefix, "")) == theirs
            assert [count[pair] for pair in ours] == [count[pair] for pair in theirs]  # equal votes: either may win
            golden.check(found.query[found.batch == number], f"{prefix}query_sorted")


def votes_of(golden: Golden, case: str) -> Matches:
    """All layers' matches; boxes are numbered page by page here, which `union` does not mind."""
    cast = []
    for layer in range(int(golden.number(f"in.{case}.num_layers"))):
        for page in golden.cases(f"in.{case}.l{layer}."):
            query, target = (golden[f"in.{case}.l{layer}.{page}.{name}"] for name in ("query", "target"))
            batch = torch.full_like(query, int(page.removeprefix("b")))
            cast.append((torch.full_like(query, layer), batch, query, target))
    return Matches(*(torch.cat(column) for column in zip(*cast, strict=True)))


def pairs_of(matches: Matches, page: int) -> list[tuple[int, int]]:
    """(query, box) of a page."""
    here = matches.batch == page
    return list(zip(matches.query[here].tolist(), matches.target[here].tolist(), strict=True))


def recorded_pairs(golden: Golden, prefix: str, order: str) -> list[tuple[int, int]]:
    return list(zip(*(golden[f"{prefix}{name}{order}"].tolist() for name in ("query", "target")), strict=True))


# Losses


@pytest.mark.golden("13*[!s].npz", "losses, with the model")
def test_every_loss_and_the_gradient_of_every_weight_are_the_originals(golden: Golden):
    state, targets = golden.state("sd."), golden.targets("in.")
    maps = [tensor.requires_grad_() for tensor in golden.state("in.f").values()]
    slots, queries = golden["dn.num_split"].tolist()
    model = transformer(state, queries, maps)
    positives, classes = int(golden.number("cfg.num_denoising")), len(state["enc_score_head.weight"])
    noised = replayed(golden, "in.rand.", targets, positives, classes)
    assert noised.labels.shape[1] == slots
    output = answer(model, noised)
    for name in golden.under("model_out."):
        golden.check(named(output)[name], f"model_out.{name}")
    check_losses(golden, output, targets, model.decoder.w).backward()
    check_bins_of_fgl(golden, output, targets, model.decoder.w)
    for level, tensor in enumerate(maps):
        golden.check(tensor.grad, f"grad.f{level}")
    check_gradients(golden, "grad.param.", model, "decoder.", "")


@pytest.mark.golden("13*_leaves.npz", "losses, alone")
def test_every_loss_and_its_gradient_with_respect_to_every_output_are_the_originals(golden: Golden):
    heads = [name for name in golden.under("in.") if not name.startswith("target.")]
    leaves = {name: golden[f"in.{name}"].requires_grad_() for name in heads}
    bins = leaves["pred_corners"].shape[-1] // 4 - 1
    targets = golden.targets("in.")
    w = weighting_function(bins, a=0.5, c=0.25).float()
    check_losses(golden, output_of(leaves, int(golden["dn.num_group"])), targets, w).backward()
    for name, leaf in leaves.items():
        golden.check(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, f"grad.{name}")


def output_of(arrays: dict[str, Tensor], groups: int) -> DFineOutput:
    """The output that `recorded.named` would give these names."""
    layers = 1 + len({name.split(".")[1] for name in arrays if name.startswith("aux_outputs.")})
    refined = refinement_of(arrays, layer_names(layers))
    noise = refinement_of(arrays, [f"dn_outputs.{i}." for i in range(layers)])
    queries = NoisedTruth(torch.zeros(noise.boxes.shape[1:3]), noise.boxes[0].detach(), max(1, groups))
    denoising = Denoising(noise, head_of(arrays, "dn_pre_outputs."), queries)
    nothing, every = torch.empty(0), torch.ones(refined.logits.shape[1:3], dtype=torch.bool)
    heads = head_of(arrays, "pre_outputs."), head_of(arrays, "enc_aux_outputs.0.")
    return DFineOutput(refined, Queries(nothing, nothing, every), *heads, denoising)


def refinement_of(arrays: dict[str, Tensor], names: list[str]) -> Refinement:
    logits, boxes, edges, frames = (
        torch.stack([arrays[f"{name}{array}"] for name in names])
        for array in ("pred_logits", "pred_boxes", "pred_corners", "ref_points")
    )
    assert frames.equal(frames[:1].expand_as(frames))  # the initial box is the frame of all layers
    return Refinement(logits, boxes, edges.unflatten(-1, (4, -1)), frames[0].detach())


def head_of(arrays: dict[str, Tensor], name: str) -> Prediction:
    return Prediction(arrays[f"{name}pred_logits"], arrays[f"{name}pred_boxes"])


def check_losses(golden: Golden, output: DFineOutput, targets: list[Target], w: Tensor) -> Tensor:
    """Compares groups, matches, union and every term; returns the total."""
    check_matches(golden, output, targets)
    noised = output.denoising.queries
    check_groups(golden, "dn.", targets, noised, output.refined.logits.shape[2])
    losses = criterion(output, targets, w, LossConfig())
    for name, loss in terms_of(losses).items():
        golden.check(loss, f"out.loss.loss_{name}")
    total = torch.stack([loss.sum() for loss in losses.values()]).sum()
    golden.check(total, "out.loss_total")
    return total


def terms_of(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our losses under the original's names."""
    layers = len(losses["vfl"])
    heads = {"": [*(f"_aux_{i}" for i in range(layers - 1)), ""], "_denoising": [f"_dn_{i}" for i in range(layers)]}
    terms = {f"ddf_dn_{layers - 1}": torch.zeros(())}  # the last layer has nothing to learn from itself
    for ours, theirs in {"vfl": "vfl", "l1": "bbox", "giou": "giou", "fgl": "fgl", "ddf": "ddf"}.items():
        for suffix, names in heads.items():
            values = losses[f"{ours}{suffix}"]
            terms |= {f"{theirs}{name}": value for name, value in zip(names, values, strict=False)}  # ddf has one less
        for suffix, name in {"_initial": "_pre", "_encoder": "_enc_0", "_denoising_initial": "_dn_pre"}.items():
            if f"{ours}{suffix}" in losses:
                terms[f"{theirs}{name}"] = losses[f"{ours}{suffix}"]
    return terms


def check_matches(golden: Golden, output: DFineOutput, targets: list[Target]) -> None:
    """Every head's own matches, and the union."""
    heads = stack(output.refined, output.initial, output.encoder)
    own = match(heads.logits, heads.boxes, targets, MatcherConfig())
    layers, _, queries = output.refined.logits.shape[:3]
    both = union(own, queries, last=layers - 1)
    names = [*(f"aux_{i}" for i in range(layers - 1)), "final", "pre", "enc_0"]
    first = 0
    for page, target in enumerate(targets):
        for head, name in enumerate(names):
            here = (own.batch == page) & (own.layer == head)
            golden.check(own.query[here], f"match.{name}.{page}.query")
            golden.check(own.target[here] - first, f"match.{name}.{page}.target")
        here, prefix = both.batch == page, f"match.go.{page}."
        order = golden[f"{prefix}query"].argsort()  # the original's is arbitrary
        golden.check(both.query[here], f"{prefix}query", expected=golden[f"{prefix}query"][order])
        golden.check(both.target[here] - first, f"{prefix}target", expected=golden[f"{prefix}target"][order])
        first += len(target.labels)


def check_bins_of_fgl(golden: Golden, output: DFineOutput, targets: list[Target], w: Tensor) -> None:
    """The soft bins of union pairs, in the original's order, and of positives; and the root weights of DDF."""
    pairs = [(golden[f"match.go.{page}.query"], golden[f"match.go.{page}.target"]) for page in range(len(targets))]
    offsets = [
        encode(output.refined.initial_boxes[page, query], targets[page].boxes[target]).flatten()
        for page, (query, target) in enumerate(pairs)
    ]
    check_bins(golden, "mid.fgl.", *soft_bins(torch.cat(offsets), w))
    denoising, truth = output.denoising, torch.cat([target.boxes for target in targets])
    fixed = match_denoising(targets, denoising.queries.groups)
    offsets = encode(denoising.refined.initial_boxes[fixed.batch, fixed.query], truth[fixed.target])
    check_bins(golden, "mid.fgl_dn.", *soft_bins(offsets.flatten(), w))
    pages, queries = output.refined.logits.shape[1:3]
    matched = sum(len(query) for query, _ in pairs)
    edges = 4 * torch.tensor([matched, pages * queries - matched])
    for name, number in zip(("pos", "neg"), edges, strict=True):
        golden.check((8 / pages * number).sqrt(), f"mid.ddf_num_{name}")  # a factor of 8 / batch, which cancels
