"""The hybrid encoder: AIFI on the coarsest map, then fusion top-down and bottom-up."""

from math import cos, sin

import pytest
import torch
from tiny import shaken
from torch import Tensor, nn

from dfine.model.hybrid_encoder import AIFI, CSP, HybridEncoder, RepVGG, sincos_positions

CHANNELS = [4, 6, 8]


def encoder(depth_mult: float = 0.34, expansion: float = 1.0) -> HybridEncoder:
    """Of width 8, with everything away from its initial values; batch norm uses its running statistics."""
    torch.manual_seed(0)
    return shaken(HybridEncoder(CHANNELS, 8, 2, 16, depth_mult, expansion).eval()).double()


def maps(height: int = 2, width: int = 3, pages: int = 2) -> list[Tensor]:
    """Maps of strides 8, 16 and 32; `height` and `width` are the coarsest's."""
    torch.manual_seed(0)
    return [
        torch.randn(pages, c, height * k, width * k, dtype=torch.float64)
        for c, k in zip(CHANNELS, (4, 2, 1), strict=True)
    ]


def silence(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)


# Positions


def test_a_position_is_two_waves_of_the_row_then_two_of_the_column():
    """Of width 4 there is a single frequency, 1. Row 1, column 3 of a 3x5 grid is token 1 * 5 + 3."""
    assert sincos_positions(3, 5, 4)[8].tolist() == pytest.approx([sin(1), cos(1), sin(3), cos(3)])


def test_frequencies_fall_from_1_towards_one_in_ten_thousand():
    """Of width 8 there are two of them, 1 and 1/100."""
    row_5 = sincos_positions(6, 1, 8)[5]
    assert row_5[:4].tolist() == pytest.approx([sin(5), sin(0.05), cos(5), cos(0.05)])


def test_on_3x5_tokens_of_a_row_share_its_half_and_tokens_of_a_column_theirs():
    """Pages are not squares. The original flattens this grid the other way round than its tokens, which mixes up the
    cells of all maps but squares."""
    grid = sincos_positions(3, 5, 16).view(3, 5, 16)
    assert torch.equal(grid[:, :, :8], grid[:, :1, :8].expand(3, 5, 8))
    assert torch.equal(grid[:, :, 8:], grid[:1, :, 8:].expand(3, 5, 8))


def test_on_3x5_no_two_cells_share_a_position():
    positions = sincos_positions(3, 5, 16)
    assert (torch.cdist(positions, positions) + torch.eye(15)).min() > 0.1


def test_on_squares_exchanging_rows_and_columns_exchanges_the_halves():
    """So on squares the original's positions are ours up to a permutation of channels."""
    grid = sincos_positions(4, 4, 16).view(4, 4, 16)
    assert torch.equal(grid.transpose(0, 1), grid.roll(8, dims=-1))


def test_a_larger_grid_keeps_the_positions_of_its_corner():
    """So padding a page further changes nothing."""
    assert torch.equal(sincos_positions(4, 7, 16).view(4, 7, 16)[:3, :5], sincos_positions(3, 5, 16).view(3, 5, 16))


# AIFI


def aifi() -> AIFI:
    torch.manual_seed(0)
    return shaken(AIFI(8, 2, 16), scale=0.5).double()


def test_every_cell_attends_to_every_other():
    x = maps()[2].requires_grad_()
    aifi()(x)[0, 0, 0, 0].backward()
    assert (x.grad[0] != 0).any(0).all()
    assert (x.grad[1] == 0).all()  # but not to other pages


def test_positions_tell_cells_apart_and_tell_where_the_others_are():
    """Two cells that hold the same hear differently. And a cell hears differently when two others change places."""
    layer, x = aifi(), maps()[2]
    x[..., 1, 1] = x[..., 0, 0]
    swapped = x.clone()
    swapped[..., 1, 2], swapped[..., 0, 1] = x[..., 0, 1], x[..., 1, 2]
    assert (layer(x)[..., 0, 0] - layer(x)[..., 1, 1]).abs().max() > 1e-3
    assert (layer(x)[..., 0, 0] - layer(swapped)[..., 0, 0]).abs().max() > 1e-3


def test_attention_and_feedforward_network_add_to_what_is_there():
    """Where both are silent, only the two norms are left."""
    layer, norm, x = AIFI(8, 2, 16).double(), nn.LayerNorm(8).double(), maps(1, 1)[2]
    silence(layer.attention.out_proj, layer.feedforward[-1])
    torch.testing.assert_close(layer(x).flatten(1), norm(norm(x.flatten(1))))


def test_cells_say_what_they_hold_but_not_where_they_are():
    """Positions are part of queries and keys, not of values: a single cell hears itself, here word for word."""
    layer, eye = AIFI(8, 2, 16).double(), torch.eye(8, dtype=torch.float64)
    silence(layer.feedforward[-1])
    with torch.no_grad():
        layer.attention.in_proj_weight[16:] = layer.attention.out_proj.weight[:] = eye
    x = maps(1, 1)[2]
    norm = nn.LayerNorm(8).double()
    expected = norm(norm(2 * x.flatten(1)))
    torch.testing.assert_close(layer(x).flatten(1), expected)


def test_padding_does_not_influence_the_page():
    """A page of 2x3 cells on a canvas of 4x5, with anything in the padding."""
    layer, page = aifi(), maps()[2]
    canvas = 100 * torch.randn(2, 8, 4, 5, dtype=torch.float64)
    canvas[..., :2, :3] = page
    on_page = torch.zeros(2, 4, 5, dtype=torch.bool)
    on_page[:, :2, :3] = True
    torch.testing.assert_close(layer(canvas, on_page.flatten(1))[..., :2, :3], layer(page))


# Fusion


@pytest.mark.parametrize(("height", "width"), [(2, 3), (3, 2), (1, 1)])
def test_outputs_keep_their_sizes_and_have_one_width(height: int, width: int):
    outputs = encoder()(maps(height, width))
    assert [tuple(x.shape) for x in outputs] == [(2, 8, height * k, width * k) for k in (4, 2, 1)]


def test_every_output_is_informed_by_every_input():
    model, inputs = encoder(), [x.requires_grad_() for x in maps()]
    for output in model(inputs):
        gradients = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
        assert all(gradient.abs().max() > 1e-9 for gradient in gradients)


def test_all_three_maps_are_not_needed():
    two = HybridEncoder(CHANNELS[1:], 8, 2, 16, 1.0, 1.0).eval().double()
    assert [x.shape[-1] for x in two(maps()[1:])] == [6, 3]


def test_the_lateral_output_replaces_the_upper_map_on_the_way_down_again():
    """With the first lateral silenced nobody hears of the coarsest map, not even the coarsest output."""
    silenced = encoder()
    silence(silenced.laterals[0])
    inputs = [x.requires_grad_() for x in maps()]
    total = sum(output.sum() for output in silenced(inputs))
    coarsest, *others = torch.autograd.grad(total, inputs[::-1])
    assert (coarsest == 0).all()
    assert all((gradient != 0).any() for gradient in others)


def test_downsampling_has_no_activation():
    down = encoder().downsamples[0]
    a, b = torch.randn(2, 1, 8, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(down((a + b) / 2), (down(a) + down(b)) / 2)


def test_the_encoder_tells_aifi_what_is_padding():
    model, on_page = encoder(), torch.tensor([[True, True, False] * 2] * 2)
    with_padding, without = model(maps(), on_page)[2], model(maps())[2]
    assert (with_padding - without)[..., :2].abs().max() > 1e-6


@pytest.mark.parametrize(("depth_mult", "blocks"), [(0.34, 1), (0.5, 2), (5 / 6, 2), (1.0, 3)])
def test_depth_is_three_times_the_multiplier_halves_rounded_to_even(depth_mult: float, blocks: int):
    """Four fusion blocks of two CSPs each."""
    model = encoder(depth_mult)
    assert sum(isinstance(module, RepVGG) for module in model.modules()) == 4 * 2 * blocks


@pytest.mark.parametrize(("expansion", "hidden"), [(1.0, 4), (0.5, 2), (0.34, 1)])
def test_the_inner_width_of_fusion_is_half_the_width_times_expansion_rounded_down(expansion: float, hidden: int):
    fusion = encoder(expansion=expansion).top_down[0]
    assert fusion.first(torch.randn(1, 8, 2, 3, dtype=torch.float64)).shape == (1, hidden, 2, 3)


def test_a_repvgg_block_is_silu_of_a_3x3_plus_a_1x1_convolution():
    """Of a single cell the 3x3 convolution sees its middle alone."""
    block = RepVGG(1).eval().double()
    with torch.no_grad():
        block.conv3[0].weight.fill_(0.75)
        block.conv1[0].weight.fill_(0.25)
    seen = block(torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)).item()
    assert seen == pytest.approx(2 / (1 + torch.tensor(-2.0).exp().item()), rel=1e-4)  # batch norm divides by 1.000005


@pytest.mark.parametrize("silent", ["deep", "shallow"])
def test_a_csp_is_the_sum_of_its_two_branches(silent: str):
    torch.manual_seed(0)
    block, x = shaken(CSP(4, 2, 1).eval()).double(), torch.randn(1, 4, 2, 3, dtype=torch.float64)
    silence(getattr(block, silent))
    other = block.shallow if silent == "deep" else block.deep
    assert (other(x) != 0).any()
    assert torch.equal(block(x), other(x))
