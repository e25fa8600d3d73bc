"""The decoder refines the edge distributions of a box layer by layer; nothing moves before it is trained."""

from math import log, sqrt

import pytest
import torch
from tiny import random_boxes, shaken
from torch import Tensor, nn

from dfine.config import DecoderConfig
from dfine.model.decoder import Decoder, DecoderLayer, Gate, SelfAttention, attend, class_head
from dfine.model.fdr import decode, expectation
from dfine.model.layers import zero_last

SHAPES = [(4, 6), (2, 3)]
CONFIG = DecoderConfig(heads=4, feedforward_dim=64, layers=3, points=(1, 2), bins=8)


def untrained(**config: object) -> Decoder:
    """Of width 32 for 3 classes, in float64."""
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**dict(CONFIG) | config), 32, 3).double()


def trained(**config: object) -> Decoder:
    return shaken(untrained(**config))


def inputs(queries: int = 5, pages: int = 2) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Content, reference, memory and its shapes."""
    torch.manual_seed(2)
    x = torch.randn(pages, queries, 32, dtype=torch.float64)
    memory = torch.randn(pages, 30, 32, dtype=torch.float64)
    return x, random_boxes(pages, queries), memory, SHAPES


def xavier_uniform(weight: Tensor) -> bool:
    bound = sqrt(6 / (weight.shape[0] + weight.shape[1]))
    return bool(weight.abs().max() <= bound) and weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)


# Before training


def test_at_step_0_every_layers_box_is_the_initial_box_is_the_reference():
    x, reference, *memory = inputs()
    refined, initial = untrained()(x, reference, *memory)
    torch.testing.assert_close(initial.boxes, reference)
    torch.testing.assert_close(refined.initial_boxes, reference)
    torch.testing.assert_close(refined.boxes, reference.expand(3, 2, 5, 4))


def test_at_step_0_all_edge_distributions_are_uniform():
    assert (untrained()(*inputs())[0].edge_logits == 0).all()


def test_at_step_0_a_query_belongs_to_each_class_with_one_percent():
    heads = [class_head(32, 3), *untrained().class_heads]
    for head in heads:
        assert head.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
        assert head.bias.tolist() == pytest.approx([-log(99)] * 3)


def test_position_and_feedforward_weights_start_xavier_uniform():
    decoder = untrained()
    linears = [m for m in decoder.position if isinstance(m, nn.Linear)]
    linears += [m for layer in decoder.layers for m in layer.feedforward if isinstance(m, nn.Linear)]
    assert len(linears) == 2 + 2 * 3
    assert all(xavier_uniform(linear.weight) for linear in linears)


# The gate


def test_the_gate_starts_as_an_ordinary_residual_connection():
    """LN((x + y) / 2), and layer norm does not see the half."""
    x, y = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(Gate(8).double()(x, y), nn.LayerNorm(8).double()(x + y), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forgotten", [0, 1])
def test_the_gate_can_forget_either_side(forgotten: int):
    gate, sides = Gate(8).double(), torch.randn(2, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        gate.gate.bias.view(2, 8)[forgotten] = -100
        gate.gate.bias.view(2, 8)[1 - forgotten] = 100
    torch.testing.assert_close(gate(*sides), nn.LayerNorm(8).double()(sides[1 - forgotten]))


def test_the_gate_looks_at_both_sides():
    torch.manual_seed(0)
    gate = shaken(Gate(8)).double()
    sides = torch.randn(2, 1, 8, dtype=torch.float64, requires_grad=True)
    gate.gate(sides.transpose(0, 1).flatten(1))[0, 0].backward()  # one channel of g1
    assert (sides.grad != 0).all()


# Self-attention


def attentions() -> tuple[nn.MultiheadAttention, SelfAttention, Tensor, Tensor]:
    """torch's and ours with the same weights; content and position of five queries."""
    torch.manual_seed(0)
    theirs, ours = nn.MultiheadAttention(32, 4, batch_first=True), SelfAttention(32, 4)
    nn.init.normal_(theirs.in_proj_bias)
    ours.load_state_dict(theirs.state_dict())
    x, position = torch.randn(2, 2, 5, 32, dtype=torch.float64)
    return theirs.double(), ours.double(), x, position


@pytest.mark.parametrize("slots", [0, 2, 4, 5])
def test_self_attention_is_torchs_where_the_queries_behind_the_mask_see_each_other(slots: int):
    theirs, ours, x, position = attentions()
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    blocked[slots:, :slots] = True
    blocked[: slots // 2, slots // 2 : slots] = blocked[slots // 2 : slots, : slots // 2] = True
    expected, _ = theirs(x + position, x + position, x, attn_mask=blocked)
    torch.testing.assert_close(ours(x, position, blocked[:slots]), expected)
    torch.testing.assert_close(ours(x, position, blocked), expected)


def test_self_attention_without_a_mask_is_torchs():
    theirs, ours, x, position = attentions()
    torch.testing.assert_close(ours(x, position), theirs(x + position, x + position, x)[0])


def test_self_attention_in_half_precision_is_nearly_torchs_in_full():
    theirs, ours, x, position = attentions()
    blocked = torch.eye(5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        answer = ours.float()(x.float(), position.float(), blocked)
        assert attend(*torch.randn(3, 1, 4, 5, 8, dtype=torch.bfloat16)).dtype == torch.float32
    expected, _ = theirs(x + position, x + position, x, attn_mask=blocked)
    torch.testing.assert_close(answer.double(), expected, atol=0.02, rtol=0)


# A layer


def test_all_of_a_layers_parts_add_to_what_is_there():
    """Where self-attention, cross-attention and feed-forward network are silent, only the three norms are left."""
    layer, norm = untrained().layers[0], nn.LayerNorm(32).double()
    for part in (layer.self_attention.out_proj, layer.feedforward[-1]):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    x, reference, memory, shapes = inputs()
    torch.testing.assert_close(layer(x, x, reference, 0 * memory, shapes), norm(norm(norm(x) / 2)))


def layer_answers(layer: DecoderLayer, queries: int) -> tuple[Tensor, Tensor]:
    """What a layer makes of the same content at two different positions."""
    x, reference, *memory = inputs(queries)
    return tuple(layer(x, torch.randn_like(x), reference, *memory) for _ in range(2))


def test_queries_look_by_position_but_do_not_speak_of_it():
    """Positions are part of queries and keys, not of values: a query that has only itself to listen to hears the same
    wherever it is. (Cross-attention does not look at its query before it is trained.)"""
    layer = untrained().layers[0]
    torch.testing.assert_close(*layer_answers(layer, queries=1))
    here, there = layer_answers(layer, queries=3)
    assert (here - there).abs().max() > 1e-3


def test_positions_tell_queries_apart_and_tell_where_the_others_are():
    """The first two of three queries hold the same at different positions: they hear differently. And they hear
    differently again when the third one moves."""
    layer, (x, reference, *memory) = untrained().layers[0], inputs(queries=3)
    x[:, 1], reference[:, 1] = x[:, 0], reference[:, 0]
    position = torch.randn_like(x)
    before = layer(x, position, reference, *memory)
    position[:, 2] += 1
    after = layer(x, position, reference, *memory)
    assert (before[:, 0] - before[:, 1]).abs().max() > 1e-3
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3


def test_cross_attention_looks_by_position_too():
    layer = untrained().layers[0]
    nn.init.normal_(layer.cross_attention.offsets.weight)
    here, there = layer_answers(layer, queries=1)
    assert (here - there).abs().max() > 1e-3


# The refinement loop


def test_all_layers_decode_their_edges_in_the_frame_of_the_initial_box():
    decoder = trained()
    refined, initial = decoder(*inputs())
    assert torch.equal(refined.initial_boxes, initial.boxes)
    for edge_logits, boxes in zip(refined.edge_logits, refined.boxes, strict=True):
        torch.testing.assert_close(boxes, decode(initial.boxes, expectation(edge_logits, decoder.w)))


def test_every_layer_adds_to_the_edge_logits_of_the_one_before():
    """Edge heads that always answer 1, 2 and 4."""
    decoder = untrained()
    for layer, head in enumerate(decoder.edge_heads):
        nn.init.constant_(head[-1].bias, 2**layer)
    edge_logits = decoder(*inputs())[0].edge_logits
    assert [layer.unique().item() for layer in edge_logits] == [1, 3, 7]


def test_edges_move_together_with_their_logits():
    """Sure of bin N on the right, W(N) = 1: the box grows by its own width to the right."""
    decoder = untrained(layers=1)
    with torch.no_grad():
        decoder.edge_heads[0][-1].bias.view(4, 9)[2, 8] = 100  # left, top, right, bottom
    x, reference, *memory = inputs()
    boxes = decoder(x, reference, *memory)[0].boxes[0]
    torch.testing.assert_close(boxes[..., 2], 2 * reference[..., 2])
    torch.testing.assert_close(boxes[..., 0], reference[..., 0] + reference[..., 2] / 2)
    torch.testing.assert_close(boxes[..., 1::2], reference[..., 1::2])


def test_the_initial_scores_are_layer_ones_without_its_quality_estimate():
    refined, initial = trained()(*inputs())
    quality = refined.logits[0] - initial.logits
    assert quality.abs().min() > 1e-3
    torch.testing.assert_close(quality, quality[..., :1].expand_as(quality))


# Who learns from whom


def gradient(total: Tensor, parameter: Tensor) -> Tensor:
    """Zeros where nothing leads from one to the other."""
    (found,) = torch.autograd.grad(total, parameter, allow_unused=True, retain_graph=True)
    return torch.zeros_like(parameter) if found is None else found


def test_an_edge_head_sees_the_layer_before_but_does_not_teach_it():
    """With layer 2 made to answer a constant, its edges still differ from query to query, by what layer 1 says."""
    decoder = trained(layers=2)
    nn.init.zeros_(decoder.layers[1].norm2.weight)
    refined, _ = decoder(*inputs())
    added = refined.edge_logits[1] - refined.edge_logits[0]
    assert (added[0, 0] - added[0, 1]).abs().max() > 1e-3
    assert (gradient(added.square().sum(), decoder.layers[0].norm2.weight) == 0).all()


def test_the_next_layers_reference_is_detached():
    """Layer 2 looks where layer 1's edges say, but does not teach them where to look."""
    decoder = trained(layers=2)
    for lqe in decoder.lqe:
        zero_last(lqe.mlp)  # it is a path of its own from edges to scores
    refined, _ = decoder(*inputs())
    bias = decoder.edge_heads[0][-1].bias
    assert (gradient(refined.logits[1].square().sum(), bias) == 0).all()
    with torch.no_grad():
        bias[8] += 1
    moved, _ = decoder(*inputs())
    assert (moved.logits[1] - refined.logits[1]).abs().max() > 1e-4  # it does look elsewhere


def test_edge_logits_of_earlier_layers_are_not_detached():
    """A later layer's box teaches all edge heads before it."""
    decoder = trained()
    refined, _ = decoder(*inputs())
    for head in decoder.edge_heads:
        assert gradient(refined.boxes[2].sum(), head[-1].bias).abs().max() > 1e-6


def test_the_frame_is_detached_and_the_initial_box_is_not():
    decoder = trained()
    refined, initial = decoder(*inputs())
    bias = decoder.initial_box[-1].bias
    assert (gradient(refined.boxes.sum(), bias) == 0).all()
    assert not refined.initial_boxes.requires_grad
    assert (gradient(initial.boxes.sum(), bias) != 0).all()


# What is computed


def test_the_last_layer_alone_answers_the_same():
    decoder = trained()
    every, _ = decoder(*inputs())
    last, initial = decoder(*inputs(), every_layer=False)
    assert initial is None
    for one, all_layers in zip(last[:3], every[:3], strict=True):
        assert len(one) == 1
        assert torch.equal(one[0], all_layers[-1])
    assert torch.equal(last.initial_boxes, every.initial_boxes)


def test_earlier_layers_scores_are_not_computed_for_the_last_layers_answer():
    decoder, called = untrained(), []
    for i, head in enumerate(decoder.class_heads):
        head.register_forward_hook(lambda *_, i=i: called.append(i))
    decoder(*inputs(), every_layer=False)
    assert called == [2]


def test_a_single_layer_is_enough():
    refined, initial = trained(layers=1)(*inputs())
    assert refined.logits.shape == (1, 2, 5, 3)
    assert initial.logits.shape == (2, 5, 3)


def test_answers_follow_their_queries():
    x, reference, *memory = inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    decoder = trained()
    plain, permuted = decoder(x, reference, *memory)[0], decoder(x[:, order], reference[:, order], *memory)[0]
    torch.testing.assert_close(permuted.logits, plain.logits[:, :, order])
    torch.testing.assert_close(permuted.boxes, plain.boxes[:, :, order])


def test_a_group_behind_a_mask_is_answered_as_in_a_call_of_its_own():
    x, reference, *memory = inputs()
    blocked = torch.ones(5, 5, dtype=torch.bool)
    blocked[:2, :2] = blocked[2:, 2:] = False
    decoder = trained()
    together, alone = decoder(x, reference, *memory, mask=blocked)[0], decoder(x[:, :2], reference[:, :2], *memory)[0]
    torch.testing.assert_close(together.logits[:, :, :2], alone.logits)
    torch.testing.assert_close(together.boxes[:, :, :2], alone.boxes)


def test_padding_the_memory_changes_nothing():
    """The 4x6 and 2x3 cells of the page as the corner of maps of 6x8 and 3x4, zeros around."""
    x, reference, memory, _ = inputs()
    padded = []
    for level, (h, w) in zip(memory.split([24, 6], dim=1), SHAPES, strict=True):
        grid = torch.zeros(2, h * 3 // 2, w * 4 // 3, 32, dtype=torch.float64)
        grid[:, :h, :w] = level.unflatten(1, (h, w))
        padded.append(grid.flatten(1, 2))
    valid_ratio = torch.tensor([[6 / 8, 4 / 6]] * 2, dtype=torch.float64)
    decoder = trained()
    plain, _ = decoder(x, reference, memory, SHAPES)
    on_canvas, _ = decoder(x, reference, torch.cat(padded, dim=1), [(6, 8), (3, 4)], valid_ratio)
    torch.testing.assert_close(on_canvas.logits, plain.logits)
    torch.testing.assert_close(on_canvas.boxes, plain.boxes)


def test_positions_are_cut_off_at_ten():
    decoder, seen = trained(), []
    with torch.no_grad():
        decoder.position[-1].weight *= 100
    decoder.layers[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    decoder(*inputs())
    assert (seen[0].min(), seen[0].max()) == (-10, 10)


def test_boxes_whose_edges_cross_are_refined_on_without_nan():
    decoder = trained()
    with torch.no_grad():
        decoder.edge_heads[0][-1].bias.view(4, 9)[:, 0] = 100  # every edge moves inwards by the whole box
    refined, _ = decoder(*inputs())
    assert (refined.boxes[0, ..., 2:] < 0).all()
    assert all(x.isfinite().all() for x in refined)


def test_boxes_and_scores_stay_in_single_precision_under_autocast():
    x, reference, memory, shapes = inputs()
    decoder = trained().float()
    with torch.autocast("cpu", torch.bfloat16):
        refined, initial = decoder(x.float(), reference.float(), memory.float(), shapes)
    assert {x.dtype for x in (*refined, *initial)} == {torch.float32}
