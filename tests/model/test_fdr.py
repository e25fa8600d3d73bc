"""Fine-grained distribution refinement: an edge of a box is a distribution over offsets from an initial box.

The offsets are W(0) .. W(N), fine near 0 and coarse far away. Most tests use N = 8, a = 7, c = 1, where
a / c + 1 = 8 and all values are whole numbers: -14, -7, -3, -1, 0, 1, 3, 7, 14.
"""

import pytest
import torch
from tiny import random_boxes

from dfine.model.fdr import LQE, decode, encode, expectation, soft_bins, weighting_function

WHOLE = weighting_function(bins=8, a=7, c=1)
DEFAULT = weighting_function(bins=32, a=0.5, c=0.25)


# W(n), Eq. 3


def test_w_takes_whole_numbers_for_eight_bins_a_7_and_c_1():
    expected = torch.tensor([-14, -7, -3, -1, 0, 1, 3, 7, 14], dtype=torch.float64)
    torch.testing.assert_close(WHOLE, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("bins", "a", "c"), [(32, 0.5, 0.25), (8, 7, 1), (4, 1, 0.1)])
def test_w_runs_from_minus_2a_to_2a(bins: int, a: float, c: float):
    w = weighting_function(bins, a, c)
    assert len(w) == bins + 1
    assert w[0] == -2 * a
    assert w[-1] == 2 * a


def test_w_is_a_one_bin_before_its_end():
    assert DEFAULT[1].item() == pytest.approx(-0.5)
    assert DEFAULT[31].item() == pytest.approx(0.5)


def test_w_is_zero_at_the_middle_bin():
    assert DEFAULT[16] == 0


def test_w_is_odd_around_the_middle_bin():
    assert torch.equal(DEFAULT, -DEFAULT.flip(0))


def test_w_rises():
    assert (DEFAULT.diff() > 0).all()


def test_steps_of_w_grow_outwards():
    assert (DEFAULT[16:].diff().diff() > 0).all()


def test_a_smaller_c_makes_the_steps_near_zero_finer():
    steps = [weighting_function(32, 0.5, c)[17].item() for c in (1.0, 0.25, 0.05)]
    assert steps == sorted(steps, reverse=True)


def test_a_huge_c_makes_the_inner_steps_equal():
    w = weighting_function(8, 3, 1e6)  # between W(1) = -a and W(7) = a
    torch.testing.assert_close(w[1:-1], torch.arange(-3, 4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_scaling_a_and_c_scales_w():
    """So the original's W with a and c / c, divided by 1 / c when decoding, is the same as ours."""
    torch.testing.assert_close(weighting_function(8, 3.5, 0.5), WHOLE / 2)


# From edge distributions to a box, Eq. 1 and 2


def test_expectation_of_a_sure_edge_is_the_value_of_its_bin():
    edge_logits = torch.full((4, 9), -1e4, dtype=torch.float64)
    for edge, n in enumerate((0, 3, 4, 8)):
        edge_logits[edge, n] = 0
    torch.testing.assert_close(expectation(edge_logits, WHOLE).tolist(), [-14.0, -1.0, 0.0, 14.0])


def test_expectation_of_an_edge_torn_between_two_bins_lies_between_their_values():
    edge_logits = torch.full((1, 9), -1e4, dtype=torch.float64)
    edge_logits[0, 6:8] = torch.tensor([3.0, 1.0]).log()  # W(6) = 3 with 3/4, W(7) = 7 with 1/4
    assert expectation(edge_logits, WHOLE).item() == pytest.approx(4)


def test_expectation_of_uniform_logits_is_zero():
    logits = torch.full((4, 33), 0.7, dtype=torch.float64)
    torch.testing.assert_close(expectation(logits, DEFAULT), torch.zeros(4, dtype=torch.float64))


def test_expectation_of_half_precision_logits_is_single_precision():
    assert expectation(torch.zeros(4, 33, dtype=torch.bfloat16), DEFAULT.float()).dtype == torch.float32


def test_autocast_does_not_round_an_expectation():
    """In bf16 edges would be off by up to .0034 widths."""
    torch.manual_seed(0)
    edge_logits, w = torch.randn(100, 4, 33), weighting_function(32, 0.5, 0.25).float()
    with torch.autocast("cpu", torch.bfloat16):
        offsets = expectation(edge_logits, w)
    torch.testing.assert_close(offsets.double(), expectation(edge_logits.double(), w.double()), atol=1e-6, rtol=0)


def test_zero_offsets_decode_to_the_reference():
    reference = torch.tensor([0.5, 0.375, 0.25, 0.125])
    assert decode(reference, torch.zeros(4)).tolist() == reference.tolist()


def test_offsets_are_left_top_right_bottom_and_point_outwards():
    reference = torch.tensor([0.5, 0.5, 0.2, 0.2])  # 0.4 to 0.6
    for edge, (x1, y1, x2, y2) in enumerate([(0.3, 0.4, 0.6, 0.6), (0.4, 0.3, 0.6, 0.6), (0.4, 0.4, 0.7, 0.6)]):
        moved = decode(reference, 0.5 * torch.eye(4)[edge])
        expected = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        assert moved.tolist() == pytest.approx(expected)


def test_offsets_are_measured_in_widths_and_heights_of_the_reference():
    wide = torch.tensor([0.5, 0.5, 0.4, 0.1])
    box = decode(wide, torch.full((4,), 0.5))  # every edge moves out by half the box
    assert box.tolist() == pytest.approx([0.5, 0.5, 0.8, 0.2])


def test_opposite_edges_that_cross_give_a_negative_width():
    box = decode(torch.tensor([0.5, 0.5, 0.2, 0.2]), torch.tensor([-0.75, 0.0, -0.75, 0.0]))
    assert box.tolist() == pytest.approx([0.5, 0.5, -0.1, 0.2])


def test_encode_inverts_decode():
    torch.manual_seed(0)
    reference, offsets = random_boxes(200), torch.rand(200, 4, dtype=torch.float64) * 2 - 1  # as far as W reaches
    boxes = decode(reference, offsets)
    assert (boxes[:, 2:] < 0).any()  # some edges have crossed
    torch.testing.assert_close(encode(reference, boxes), offsets, atol=1e-12, rtol=0)


def test_decode_inverts_encode():
    torch.manual_seed(0)
    reference, boxes = random_boxes(200), random_boxes(200)
    torch.testing.assert_close(decode(reference, encode(reference, boxes)), boxes, atol=1e-12, rtol=0)


def test_encoding_the_reference_gives_zero_offsets():
    reference = torch.tensor([0.5, 0.5, 0.25, 0.125])
    assert encode(reference, reference).tolist() == [0, 0, 0, 0]


def test_encoding_in_a_box_without_area_stays_finite():
    assert encode(torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.2, 0.2])).isfinite().all()


# From a true offset to a distribution over two bins


def test_an_offset_between_two_bins_is_shared_by_closeness():
    left, left_weight, right_weight = soft_bins(torch.tensor([2.0, 4.0, -13.0], dtype=torch.float64), WHOLE)
    assert left.tolist() == [5, 6, 0]  # 2 lies between 1 and 3, 4 between 3 and 7, -13 between -14 and -7
    assert left_weight.tolist() == pytest.approx([1 / 2, 3 / 4, 6 / 7])
    assert right_weight.tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 7])


def test_an_offset_at_a_bins_value_is_all_that_bin():
    left, left_weight, right_weight = soft_bins(WHOLE[:-1], WHOLE)
    assert left.tolist() == list(range(8))
    assert left_weight.tolist() == [1] * 8
    assert right_weight.tolist() == [0] * 8


def test_offsets_below_w_0_are_all_on_the_first_bin():
    left, left_weight, right_weight = soft_bins(torch.tensor([-14.1, -1000.0], dtype=torch.float64), WHOLE)
    assert left.tolist() == [0, 0]
    assert left_weight.tolist() == [1, 1]
    assert right_weight.tolist() == [0, 0]


def test_offsets_from_w_n_on_are_all_on_the_last_bin():
    left, left_weight, right_weight = soft_bins(torch.tensor([14.0, 1000.0], dtype=torch.float64), WHOLE)
    assert left.tolist() == [7, 7]  # the right one of bins 7 and 8
    assert left_weight.tolist() == [0, 0]
    assert right_weight.tolist() == [1, 1]


def test_the_expectation_of_soft_bins_is_the_offset():
    torch.manual_seed(0)
    offsets = torch.rand(100, 4, dtype=torch.float64) * 2 - 1
    left, left_weight, right_weight = soft_bins(offsets, DEFAULT)
    torch.testing.assert_close(left_weight + right_weight, torch.ones_like(offsets))
    torch.testing.assert_close(left_weight * DEFAULT[left] + right_weight * DEFAULT[left + 1], offsets)


def test_a_box_survives_the_way_into_distributions_and_back():
    """encode -> soft bins -> logits -> expectation -> decode, for boxes that W(0) .. W(N) can reach."""
    torch.manual_seed(0)
    reference = random_boxes(50)
    boxes = decode(reference, torch.rand(50, 4, dtype=torch.float64) * 1.6 - 0.8)
    left, left_weight, right_weight = soft_bins(encode(reference, boxes), DEFAULT)
    probabilities = torch.zeros(50, 4, 33, dtype=torch.float64)
    probabilities.scatter_(-1, left[..., None], left_weight[..., None])
    probabilities.scatter_(-1, left[..., None] + 1, right_weight[..., None])
    offsets = expectation(probabilities.log(), DEFAULT)
    torch.testing.assert_close(decode(reference, offsets), boxes, atol=1e-12, rtol=0)


# LQE: sharp edge distributions raise a query's class scores


def trained_lqe() -> LQE:
    torch.manual_seed(0)
    lqe = LQE().double()
    torch.nn.init.normal_(lqe.mlp[-1].weight)
    return lqe


def test_lqe_changes_no_score_before_training():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3)
    assert torch.equal(LQE()(logits, torch.randn(2, 5, 4, 9)), logits)


def test_lqe_moves_all_class_scores_of_a_query_equally():
    edge_logits = 3 * torch.randn(2, 5, 4, 9, dtype=torch.float64)
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    moved = trained_lqe()(logits, edge_logits) - logits
    assert moved.abs().min() > 1e-3
    torch.testing.assert_close(moved, moved[..., :1].expand_as(moved))
    assert moved[0, 0, 0] != moved[0, 1, 0]


def test_lqe_does_not_care_which_bins_are_probable():
    edge_logits = torch.randn(1, 2, 4, 9, dtype=torch.float64)
    logits, lqe = torch.zeros(1, 2, 3, dtype=torch.float64), trained_lqe()
    torch.testing.assert_close(lqe(logits, edge_logits), lqe(logits, edge_logits[..., torch.randperm(9)]))


def test_lqe_looks_at_the_four_largest_probabilities_only():
    even = torch.tensor([0.3, 0.2, 0.15, 0.15, 0.04, 0.04, 0.04, 0.04, 0.04], dtype=torch.float64)
    uneven = torch.tensor([0.3, 0.2, 0.15, 0.15, 0.1, 0.07, 0.01, 0.01, 0.01], dtype=torch.float64)
    other = torch.tensor([0.3, 0.25, 0.15, 0.1, 0.04, 0.04, 0.04, 0.04, 0.04], dtype=torch.float64)  # same sum of four
    logits, lqe = torch.zeros(1, 1, 3, dtype=torch.float64), trained_lqe()
    score = [lqe(logits, p.log().expand(1, 1, 4, 9)) for p in (even, uneven, other)]
    torch.testing.assert_close(score[0], score[1])
    assert (score[0] - score[2]).abs().max() > 1e-3


def test_lqe_can_prefer_sharp_edges_to_flat_ones():
    """With weights that add up the statistics, a sure edge scores 1 + 1/4, a uniform one over 9 bins 4/9 + 1/9."""
    lqe = LQE().double()
    for linear in (lqe.mlp[0], lqe.mlp[-1]):
        torch.nn.init.ones_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    sharp, flat = torch.tensor([0.0] + 8 * [-1e4], dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    edge_logits = torch.stack([sharp, flat])[None, :, None].expand(1, 2, 4, 9)
    scores = lqe(torch.zeros(1, 2, 1, dtype=torch.float64), edge_logits).flatten()
    assert scores.tolist() == pytest.approx([64 * 4 * 5 / 4, 64 * 4 * 5 / 9])  # 64 hidden units, 4 edges
