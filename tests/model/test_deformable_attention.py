"""Deformable attention: a query reads the memory at a few points of its reference box, between cells bilinearly."""

from collections.abc import Callable
from math import floor

import pytest
import torch
from torch import Tensor

from dfine.model.deformable_attention import (
    DeformableAttention,
    by_embedding_bag,
    by_gather,
    by_grid_sample,
    deformable_attention,
)

ROW = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)  # a map of one row and three cells


def read(x: float, y: float = 0.5, row: Tensor = ROW) -> float:
    """What a single point sees of the row."""
    location = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 2)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return deformable_attention(row.view(1, -1, 1, 1), [(1, len(row))], location, weight, (1,)).item()


# The function


def test_a_point_at_a_cells_centre_reads_that_cell():
    assert [read(1 / 6), read(3 / 6), read(5 / 6)] == pytest.approx([10, 20, 40])


def test_a_point_between_two_cells_reads_both_by_closeness():
    assert read(2 / 6) == pytest.approx(15)
    assert read(4.5 / 6) == pytest.approx(20 * 1 / 4 + 40 * 3 / 4)


def test_a_point_on_the_border_of_the_map_reads_half_a_cell_and_half_nothing():
    assert read(0) == pytest.approx(5)
    assert read(0.5, y=1) == pytest.approx(10)


def test_a_point_outside_the_map_reads_zero():
    assert [read(-0.5), read(1.5), read(0.5, y=2)] == [0, 0, 0]


def test_x_comes_before_y():
    tall = ROW.view(3, 1)
    location = torch.tensor([1 / 2, 5 / 6], dtype=torch.float64).view(1, 1, 1, 1, 2)
    seen = deformable_attention(tall.view(1, 3, 1, 1), [(3, 1)], location, torch.ones(1, 1, 1, 1), (1,))
    assert seen.item() == pytest.approx(40)


def test_points_are_added_up_by_weight():
    locations = torch.tensor([[1 / 6, 0.5], [5 / 6, 0.5]], dtype=torch.float64).view(1, 1, 1, 2, 2)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64).view(1, 1, 1, 2)
    seen = deformable_attention(ROW.view(1, 3, 1, 1), [(1, 3)], locations, weights, (2,))
    assert seen.item() == pytest.approx(0.25 * 10 + 0.75 * 40)


def test_heads_read_their_own_channels_at_their_own_points():
    value = torch.stack([ROW, -ROW], dim=-1).view(1, 3, 2, 1)
    locations = torch.tensor([[1 / 6, 0.5], [5 / 6, 0.5]], dtype=torch.float64).view(1, 1, 2, 1, 2)
    seen = deformable_attention(value, [(1, 3)], locations, torch.ones(1, 1, 2, 1), (1,))
    assert seen.flatten().tolist() == pytest.approx([10, -40])


def slow(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]):
    """The same, point by point and cell by cell."""
    pages, _, heads, width = value.shape
    queries = locations.shape[1]
    level_of = [level for level, p in enumerate(points) for _ in range(p)]
    first = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    out = torch.zeros(pages, queries, heads, width, dtype=value.dtype)
    for b, q, head, p in torch.cartesian_prod(*map(torch.arange, (pages, queries, heads, sum(points)))).tolist():
        h, w = shapes[level_of[p]]
        x, y = locations[b, q, head, p].tolist()
        x, y = x * w - 0.5, y * h - 0.5  # in cells, 0 being the first cell's centre
        for row in (floor(y), floor(y) + 1):
            for column in (floor(x), floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, head, p]
                    out[b, q, head] += share * value[b, first[level_of[p]] + row * w + column, head]
    return out.flatten(2)


@pytest.mark.parametrize("form", [by_embedding_bag, by_gather, by_grid_sample])
def test_it_is_what_a_loop_over_points_and_cells_gives(form: Callable[..., Tensor]):
    torch.manual_seed(0)
    shapes, points = [(5, 3), (2, 4)], (2, 3)
    value = torch.randn(2, 23, 3, 2, dtype=torch.float64)
    locations = torch.rand(2, 4, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2  # some outside
    weights = torch.rand(2, 4, 3, 5, dtype=torch.float64)
    arguments = (value, shapes, locations, weights, points)
    torch.testing.assert_close(form(*arguments), slow(*arguments))


def test_the_form_for_cpus_has_the_gradients_of_the_plain_one_also_at_the_centres_of_cells():
    """Points start at cells' centres, where reading bilinearly has a kink."""
    torch.manual_seed(0)
    shapes, points = [(5, 3), (2, 4)], (2, 3)
    value = torch.randn(2, 23, 3, 2, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, 4, 3, 5, 2, dtype=torch.float64) * 1.4 - 0.2
    locations[:, 0, :, :2] = (torch.tensor([1, 2]) + 0.5) / torch.tensor([3, 5])  # of the first level
    locations.requires_grad_()
    weights = torch.rand(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, 6, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(form(value, shapes, locations, weights, points), (value, locations, weights), upstream)
        for form in (by_embedding_bag, by_grid_sample)
    ]
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain)


def test_places_stay_exact_where_the_memory_is_in_half_precision():
    """bf16 has 8 bits: a place of a map of 100 cells would be off by up to a fifth of a cell."""
    row = torch.arange(100, dtype=torch.bfloat16)
    assert read(0.777, row=row) == pytest.approx(0.777 * 100 - 0.5, abs=1e-9)


def test_its_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    value = torch.randn(1, 8, 2, 1, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(1, 2, 2, 2, 2, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    weights = torch.rand(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    shapes = [(2, 3), (1, 2)]
    assert torch.autograd.gradcheck(lambda *x: deformable_attention(x[0], shapes, *x[1:], (1, 1)), (
        value, locations, weights,
    ))  # fmt: skip


# The module. The memory holds each cell's own centre (x, y), so a head answers with the place it looks at.

SHAPES = [(32, 32), (16, 16)]
BOX = torch.tensor([[[0.5, 0.5, 0.4, 0.2]]], dtype=torch.float64)


def coordinates(shapes: list[tuple[int, int]], heads: int) -> Tensor:
    """(1, S, 2 heads)"""
    levels = []
    for h, w in shapes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        levels.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(levels)[None].repeat(1, 1, heads).double()


def look(module: DeformableAttention, box: Tensor = BOX, valid_ratio: Tensor | None = None) -> list[list[float]]:
    """The mean place (x, y) of each head's points, for a query of zeros."""
    query = torch.zeros(1, 1, 2 * module.heads, dtype=torch.float64)
    seen = module(query, box, coordinates(SHAPES, module.heads), SHAPES, valid_ratio)
    return [pytest.approx(place) for place in seen.view(module.heads, 2).tolist()]


def test_each_head_first_looks_in_its_own_direction():
    """Four heads: right, down, left, up; one point a level, on the edge of the box."""
    module = DeformableAttention(dim=8, heads=4, points=(1, 1)).double()
    assert look(module) == [[0.7, 0.5], [0.5, 0.6], [0.3, 0.5], [0.5, 0.4]]


def test_slanted_heads_look_at_the_corners():
    """Eight heads: directions are normalised to a square, not to a circle."""
    module = DeformableAttention(dim=16, heads=8, points=(1, 1)).double()
    assert look(module)[1::2] == [[0.7, 0.6], [0.3, 0.6], [0.3, 0.4], [0.7, 0.4]]


def test_the_points_of_a_level_first_stand_in_equal_steps_from_the_centre_to_the_edge():
    """With 4 points at 1/4, 2/4, 3/4 and 4/4 of the way the mean is 5/8 of it; with 1 and 2 points see their mean."""
    module = DeformableAttention(dim=8, heads=4, points=(4, 4)).double()
    assert look(module)[0] == [0.5 + 5 / 8 * 0.2, 0.5]
    module = DeformableAttention(dim=8, heads=4, points=(1, 2)).double()
    assert look(module)[0] == [0.5 + (1 + 1 / 2 + 1) / 3 * 0.2, 0.5]


def test_one_softmax_weighs_the_points_of_all_levels():
    module = DeformableAttention(dim=8, heads=4, points=(1, 2)).double()
    with torch.no_grad():
        module.weights.bias.view(4, 3)[0] = torch.tensor([3.0, 2.0, 1.0]).log()  # 3/6, 2/6, 1/6 for head 0
    assert look(module)[0] == [0.5 + (3 / 6 * 1 + 2 / 6 * 1 / 2 + 1 / 6 * 1) * 0.2, 0.5]


def test_points_move_with_the_box_and_scale_with_its_size():
    module = DeformableAttention(dim=8, heads=4, points=(1, 1)).double()
    box = torch.tensor([[[0.4, 0.6, 0.1, 0.3]]], dtype=torch.float64)
    assert look(module, box) == [[0.45, 0.6], [0.4, 0.75], [0.35, 0.6], [0.4, 0.45]]


def test_a_box_without_size_is_read_at_its_centre():
    module = DeformableAttention(dim=8, heads=4, points=(1, 1)).double()
    assert look(module, torch.tensor([[[0.4, 0.6, 0.0, 0.0]]], dtype=torch.float64)) == [[0.4, 0.6]] * 4


def test_places_on_the_page_are_found_on_the_padded_canvas():
    """The page is the left 3/4 and the upper half of the canvas."""
    module = DeformableAttention(dim=8, heads=4, points=(1, 1)).double()
    valid_ratio = torch.tensor([[0.75, 0.5]], dtype=torch.float64)
    assert look(module, valid_ratio=valid_ratio)[:2] == [[0.75 * 0.7, 0.5 * 0.5], [0.75 * 0.5, 0.5 * 0.6]]


def test_the_query_moves_the_points_and_their_weights_once_trained():
    torch.manual_seed(0)
    module = DeformableAttention(dim=8, heads=4, points=(1, 1)).double()
    query, memory = torch.randn(1, 2, 8, dtype=torch.float64), torch.randn(1, 32 * 32 + 16 * 16, 8, dtype=torch.float64)
    before = module(query, BOX.repeat(1, 2, 1), memory, SHAPES, None)
    assert torch.equal(before[:, 0], before[:, 1])
    for layer in (module.offsets, module.weights):
        torch.nn.init.normal_(layer.weight)
        after = module(query, BOX.repeat(1, 2, 1), memory, SHAPES, None)
        assert (after[:, 0] - after[:, 1]).abs().max() > 0.01
        torch.nn.init.zeros_(layer.weight)
