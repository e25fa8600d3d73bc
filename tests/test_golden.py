"""The model computes the original implementation's numbers, part by part (conftest.py says which)."""

import re
from pathlib import Path

import pytest
import torch
from recorded import Golden, answer, check_bins, check_gradients, column_major_positions, named, renamed, transformer
from torch import Tensor

from dfine.boxes import logit, xyxy_to_cxcywh
from dfine.checkpoints import original
from dfine.checkpoints.loading import load_model
from dfine.model import hybrid_encoder
from dfine.model.decoder import DecoderLayer, Gate
from dfine.model.deformable_attention import DeformableAttention, deformable_attention
from dfine.model.detector import DFine, detect
from dfine.model.fdr import LQE, decode, encode, expectation, soft_bins, weighting_function
from dfine.model.hybrid_encoder import HybridEncoder, sincos_positions
from dfine.model.layers import mlp
from dfine.structures import Detections, DFineOutput, Queries, Refinement

# FDR: the original measures offsets in sizes / reg_scale, we in sizes


def w_and_scale(golden: Golden, case: str) -> tuple[Tensor, float]:
    """W(n) in our units, and how many of the original's make one of ours."""
    bins = int(golden.number(f"in.{case}.reg_max"))
    a, scale = abs(golden.number(f"in.{case}.up")), abs(golden.number(f"in.{case}.reg_scale"))
    return weighting_function(bins, a, 1 / scale), scale


@pytest.mark.golden("01_*.npz", "W(n)")
def test_w_is_the_originals(golden: Golden):
    for case in golden.cases():
        w, scale = w_and_scale(golden, case)
        for kind in golden.under(f"out.{case}."):
            golden.check(w * scale, f"out.{case}.{kind}")


@pytest.mark.golden("02_*.npz", "decode")
def test_offsets_decode_to_the_originals_boxes(golden: Golden):
    for case in golden.cases():
        offsets = golden[f"in.{case}.dist"] / abs(golden.number(f"in.{case}.reg_scale"))
        golden.check(decode(golden[f"in.{case}.ref"], offsets), f"out.{case}")


@pytest.mark.golden("03_*.npz", "encode, soft bins")
def test_boxes_encode_to_the_originals_bins(golden: Golden):
    for case in golden.cases():
        scale = abs(golden.number(f"in.{case}.reg_scale"))
        w = golden[f"in.{case}.W"] / scale
        boxes = xyxy_to_cxcywh(golden[f"in.{case}.target_xyxy"])
        offsets = {"gt": golden[f"in.{case}.gt"] / scale, "box": encode(golden[f"in.{case}.ref"], boxes).flatten()}
        for kind, values in offsets.items():
            check_soft_bins(golden, f"out.{case}.{kind}_", values, w)


def check_soft_bins(golden: Golden, prefix: str, offsets: Tensor, w: Tensor) -> None:
    left, left_weight, right_weight = soft_bins(offsets, w)
    dense = torch.zeros(len(offsets), len(w)).scatter(1, left[:, None], left_weight[:, None])
    golden.check(dense.scatter_add(1, left[:, None] + 1, right_weight[:, None]), f"{prefix}dense")
    golden.check(left + right_weight, f"{prefix}soft_pos")
    check_bins(golden, prefix, left, left_weight, right_weight)


@pytest.mark.golden("04_*.npz", "expectation")
def test_expected_offsets_are_the_originals(golden: Golden):
    for case in golden.cases():
        w, scale = w_and_scale(golden, case)
        edge_logits = golden[f"in.{case}.x"].unflatten(-1, (4, -1))
        golden.check(expectation(edge_logits, w.float()) * scale, f"out.{case}")


@pytest.mark.golden("05_*.npz", "LQE")
def test_lqe_scores_are_the_originals(golden: Golden):
    for case in golden.cases():
        layers = list(golden.state(f"sd.{case}.reg_conf.layers.").values())  # weight and bias of each in turn
        lqe = LQE(top=int(golden.number(f"in.{case}.k")))
        lqe.mlp = mlp(layers[0].shape[1], *(len(weight) for weight in layers[::2]))
        lqe.load_state_dict(dict(zip(lqe.state_dict(), layers, strict=True)))
        edge_logits = golden[f"in.{case}.corners"].unflatten(-1, (4, -1))
        golden.check(lqe(golden[f"in.{case}.scores"], edge_logits), f"out.{case}")


# The decoder's parts


def shapes_of(golden: Golden, name: str) -> list[tuple[int, int]]:
    return [(height, width) for height, width in golden[name].tolist()]


@pytest.mark.golden("06a_*.npz", "deformable attention, function")
def test_deformable_attention_and_its_gradients_are_the_originals(golden: Golden):
    leaves = {name: golden[f"in.{name}"].requires_grad_() for name in ("value", "locations", "weights")}
    points = tuple(golden["in.num_points"].tolist())
    output = deformable_attention(shapes=shapes_of(golden, "in.shapes"), points=points, **leaves)
    golden.check(output, "out.output")
    output.backward(golden["in.upstream"])
    smooth = {"locations": golden["in.grad_locations_valid"]}  # elsewhere the derivative jumps
    for name, leaf in leaves.items():
        golden.check(leaf.grad, f"grad.{name}", smooth.get(name))


@pytest.mark.golden("06b_*.npz", "deformable attention, module")
def test_the_deformable_attention_module_and_all_its_gradients_are_the_originals(golden: Golden):
    place = ("decoder.decoder.layers.0.cross_attn.", "decoder.layers.0.cross_attention.")
    for case in golden.cases():
        state, points = golden.state(f"sd.{case}."), tuple(golden[f"in.{case}.num_points"].tolist())
        rows, dim = state["sampling_offsets.weight"].shape
        module = DeformableAttention(dim, rows // (2 * sum(points)), points)
        module.load_state_dict(renamed(state, *place))
        query, reference, memory = leaves = [golden[f"in.{case}.{name}"] for name in ("query", "ref", "memory")]
        for leaf in leaves:
            leaf.requires_grad_()
        output = module(query, reference.squeeze(2), memory, shapes_of(golden, f"in.{case}.shapes"), None)
        golden.check(output, f"out.{case}")
        output.backward(golden[f"in.{case}.upstream"])
        for name, leaf in zip(("query", "ref", "memory"), leaves, strict=True):
            golden.check(leaf.grad, f"grad.{case}.{name}")
        check_gradients(golden, f"grad.{case}.param.", module, *place)


@pytest.mark.golden("07_*.npz", "gate, decoder layer")
def test_gate_and_decoder_layer_are_the_originals(golden: Golden):
    theirs, ours = "decoder.decoder.layers.0.", "decoder.layers.0."
    gate = Gate(golden["in.gate.x1"].shape[-1])
    gate.load_state_dict(renamed(golden.state("sd.gate."), f"{theirs}gateway.", f"{ours}gate."))
    golden.check(gate(golden["in.gate.x1"], golden["in.gate.x2"]), "out.gate")

    state, points = golden.state("sd.layer."), tuple(golden["in.layer.num_points"].tolist())
    heads = len(state["cross_attn.sampling_offsets.bias"]) // (2 * sum(points))
    x, position, reference, memory = (golden[f"in.layer.{name}"] for name in ("target", "pos", "ref", "memory"))
    layer = DecoderLayer(x.shape[-1], heads, len(state["linear1.bias"]), points)
    layer.load_state_dict(renamed(state, theirs, ours))
    places = (reference.squeeze(2), memory, shapes_of(golden, "in.layer.shapes"))
    mask = golden["in.layer.mask"]
    golden.check(layer(x, position, *places, mask=mask), "out.layer_mask")
    golden.check(layer(x, position, *places), "out.layer_nomask")
    golden.check(layer(x, torch.zeros_like(x), *places, mask=mask), "out.layer_nopos")


# The hybrid encoder. `out` was recorded with the original's positions, `alt_rowmajor` with ours


POSITIONS = {"out": column_major_positions, "alt_rowmajor": sincos_positions}


@pytest.mark.golden("08_*.npz", "hybrid encoder")
def test_hybrid_encoder_and_positions_are_the_originals(golden: Golden, monkeypatch: pytest.MonkeyPatch):
    for kind, positions in POSITIONS.items():
        for name in golden.under(f"{kind}.pos_embed_"):
            width, height, dim = map(int, re.fullmatch(r"w(\d+)_h(\d+)_c(\d+)", name).groups())
            golden.check(positions(height, width, dim)[None], f"{kind}.pos_embed_{name}")
        monkeypatch.setattr(hybrid_encoder, "sincos_positions", positions)
        for case in set(golden.cases()) - {"depth_mult", "expansion"}:
            maps = list(golden.state(f"in.{case}.f").values())
            check_maps(golden, f"{kind}.{case}.o", encoder_of(golden).eval(), maps)
            encoder = encoder_of(golden)
            if check_maps(golden, f"{kind}.train.{case}.o", encoder, maps):
                check_statistics(golden, f"{kind}.train.sd_after.", encoder)


def encoder_of(golden: Golden) -> HybridEncoder:
    """With the recorded weights, in training mode; all recorded ones have 4 heads."""
    state = golden.state("sd.")
    channels = [state[f"input_proj.{level}.conv.weight"].shape[1] for level in golden.cases("sd.input_proj.")]
    feedforward_dim, dim = state["encoder.0.layers.0.linear1.weight"].shape
    shape = (golden.number("in.depth_mult"), golden.number("in.expansion"))
    encoder = HybridEncoder(channels, dim, 4, feedforward_dim, *shape)
    encoder.load_state_dict(renamed(state, "encoder.", "encoder."))
    return encoder


def check_maps(golden: Golden, prefix: str, encoder: HybridEncoder, maps: list[Tensor]) -> bool:
    """Compares the encoder's answer if there is one under the prefix; returns whether there is."""
    names = golden.under(prefix)
    for name, output in zip(names, encoder(maps) if names else [], strict=True):
        golden.check(output, prefix + name)
    return bool(names)


def check_statistics(golden: Golden, prefix: str, encoder: HybridEncoder) -> None:
    """Compares the running statistics of all batch norms."""
    ours = {original.our_name(f"encoder.{name}").removeprefix("encoder."): name for name in golden.under(prefix)}
    statistics = {name: tensor for name, tensor in encoder.state_dict().items() if "running_" in name}
    assert statistics.keys() == ours.keys()
    for name, tensor in statistics.items():
        golden.check(tensor, prefix + ours[name])


# From memory to boxes


@pytest.mark.golden("09*.npz", "query selection, decoder")
def test_evaluation_and_training_outputs_are_the_originals(golden: Golden):
    state, queries = golden.state("sd."), int(golden.number("cfg.num_queries"))
    for case in golden.cases():
        maps = list(golden.state(f"in.{case}.f").values())
        model = transformer(state, queries, maps)
        output = answer(model)
        golden.check(output.queries.cells, f"out.{case}.train.topk_index")
        for name, tensor in named(output).items():
            if f"out.{case}.train.{name}" in golden:
                golden.check(tensor, f"out.{case}.train.{name}")
        check_evaluation(golden, f"out.{case}.eval.", transformer(state, queries, maps).eval())
        check_anchors(golden, model, maps)


def check_evaluation(golden: Golden, prefix: str, model: DFine) -> None:
    """The original can stop after an earlier layer than the last."""
    model.decoder.layers = model.decoder.layers[: int(golden.number("cfg.eval_idx")) + 1]
    output = answer(model)
    golden.check(output.queries.cells, f"{prefix}topk_index")
    golden.check(output.refined.logits[-1], f"{prefix}pred_logits")
    golden.check(output.refined.boxes[-1], f"{prefix}pred_boxes")


def check_anchors(golden: Golden, model: DFine, maps: list[Tensor]) -> None:
    """One case's anchors are recorded; invalid ones as 0."""
    shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
    anchors, valid = model.selection.anchors(shapes, None, maps[0])
    if anchors.shape == golden["out.anchors_unact"].shape:
        golden.check(valid[..., None], "out.anchors_valid")
        golden.check(logit(anchors) * valid[..., None], "out.anchors_unact")


@pytest.mark.golden("14_*.npz", "detections")
def test_detections_are_the_originals_clipped_to_the_page(golden: Golden):
    sizes = golden["in.sizes_wh"]
    output = output_of(golden["in.logits"], golden["in.boxes"])
    pages = detect(output, [(h, w) for w, h in sizes.tolist()], top=int(golden.number("in.num_top")))
    golden.check(torch.stack([page.labels for page in pages]), "out.labels")
    golden.check(torch.stack([page.scores for page in pages]), "out.scores")
    clipped = golden["out.boxes"].clamp(min=0).minimum(sizes.repeat(1, 2)[:, None])
    golden.check(torch.stack([page.boxes for page in pages]), "out.boxes", expected=clipped)


def output_of(logits: Tensor, boxes: Tensor) -> DFineOutput:
    """An evaluation output with no more in it than detections need."""
    nothing = torch.empty(0)
    return DFineOutput(Refinement(logits[None], boxes[None], nothing, nothing), Queries(nothing, nothing, nothing))


# The nano model, end to end


@pytest.mark.golden("15_n_end_to_end.npz", "D-FINE-N, end to end")
def test_the_nano_models_features_answers_and_detections_are_the_originals(
    golden: Golden, nano_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _, _ = load_model(nano_checkpoint)
    parameters = torch.tensor(sum(p.numel() for p in model.parameters()))
    golden.check(parameters, "out.num_trainable")
    golden.check(parameters + 2, "out.num_parameters")  # up and reg_scale are config of ours
    for kind, positions in POSITIONS.items():
        monkeypatch.setattr(hybrid_encoder, "sincos_positions", positions)
        for case in set(golden.cases(f"{kind}.")) - {"num_parameters", "num_trainable"}:
            check_nano(golden, model, case, f"{kind}.{case}.")


@torch.inference_mode()
def check_nano(golden: Golden, model: DFine, case: str, prefix: str) -> None:
    maps: dict[str, list[Tensor]] = {}
    for name in ("backbone", "encoder"):
        model.get_submodule(name).register_forward_hook(lambda *call, name=name: maps.update({name: call[-1]}))
    output = model(nano_image(golden, case))
    for name, level in [key.split(".")[:2] for key in golden.under(prefix) if key.endswith("mean")]:
        x = maps[name][int(level)]
        golden.check(x.mean((2, 3)), f"{prefix}{name}.{level}.mean")
        golden.check(x[:, :16, :8, :8], f"{prefix}{name}.{level}.crop")
    # Neighbouring scores are closer than rounding errors: queries are compared cell by cell, not in order.
    ours, theirs = output.queries.cells.sort(), golden[f"{prefix}topk_index"].sort()
    golden.check(ours.values, f"{prefix}topk_index", expected=theirs.values)
    for name, tensor in {"pred_logits": output.refined.logits[-1], "pred_boxes": output.refined.boxes[-1]}.items():
        expected = golden[f"{prefix}{name}"][0, theirs.indices[0]]
        golden.check(tensor[0, ours.indices[0]], f"{prefix}{name}", expected=expected)
    ((width, height),) = golden["in.post_size_wh"].tolist()
    check_detections(golden, f"{prefix}post.", *detect(output, [(height, width)]), torch.tensor([width, height] * 2))


def nano_image(golden: Golden, case: str) -> Tensor:
    """Large images are recorded small, to be enlarged by repeating every pixel 4 x 4."""
    if f"in.{case}" in golden:
        return golden[f"in.{case}"]
    return golden[f"in.{case}_small"].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def check_detections(golden: Golden, prefix: str, ours: Detections, size: Tensor) -> None:
    """Nearly equal scores may change places, and the last of them fall out of the list."""
    scores, labels = golden[f"{prefix}scores"], golden[f"{prefix}labels"]
    boxes = golden[f"{prefix}boxes"].clamp(min=0).minimum(size)
    golden.check(ours.scores, f"{prefix}scores")
    distance = (boxes[:, None] - ours.boxes).abs().amax(-1) / size.max() + (scores[:, None] - ours.scores).abs()
    nearest = distance.masked_fill(labels[:, None] != ours.labels, torch.inf).argmin(1)
    listed = scores > scores[-1] + 1e-4
    assert nearest[listed].unique().numel() == listed.sum()
    golden.check(ours.labels[nearest], f"{prefix}labels", listed)
    golden.check(ours.boxes[nearest], f"{prefix}boxes", listed, expected=boxes)
