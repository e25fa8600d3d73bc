"""The losses of detection and FGL. Every function sums; what a sum is divided by is the criterion's business.

Most numbers use a logit of 0: its probability is 1/2 and its binary cross-entropy with any target is ln 2.
"""

from math import log

import pytest
import torch
from tiny import random_boxes
from torch import Tensor

from dfine.losses.detection import box_losses, fgl, vfl
from dfine.model.fdr import weighting_function
from dfine.structures import Matches

LN2 = log(2)


def matches(*pairs: tuple[int, int, int, int]) -> Matches:
    """(head, page, query, box) each."""
    return Matches(*torch.tensor(pairs, dtype=torch.int64).view(-1, 4).T)


# VFL: classes


def one_match(logits: Tensor, iou: float, label: int = 0) -> Tensor:
    """VFL of logits (1, 1, Q, C) where query 0 is matched to a box of the given class."""
    ious = torch.tensor([iou], dtype=logits.dtype)
    return vfl(logits, matches((0, 0, 0, 0)), torch.tensor([label]), ious)


def test_a_match_weighs_its_iou():
    assert one_match(torch.zeros(1, 1, 1, 1), iou=0.8).item() == pytest.approx(0.8 * LN2)


def test_an_unmatched_class_weighs_alpha_p_to_the_gamma():
    """alpha = 3/4, gamma = 2, p = 1/2: 3/16; surer mistakes weigh more."""
    background = one_match(torch.zeros(1, 1, 1, 2), iou=0.8) - one_match(torch.zeros(1, 1, 1, 1), iou=0.8)
    assert background.item() == pytest.approx(3 / 16 * LN2)
    surer = torch.tensor([3.0]).log().view(1, 1, 1, 1)  # p = 3/4, binary cross-entropy -ln(1/4)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = vfl(surer, matches(), nothing, torch.zeros(0))
    assert loss.item() == pytest.approx(3 / 4 * (3 / 4) ** 2 * 2 * LN2)


def test_alpha_and_gamma_shape_the_background():
    loss = vfl(torch.zeros(1, 1, 1, 1), matches(), torch.zeros(0, dtype=torch.int64), torch.zeros(0), alpha=1, gamma=3)
    assert loss.item() == pytest.approx(LN2 / 8)


def test_the_target_of_a_match_is_its_iou():
    """The gradient, weight times (p - target), vanishes where the score is the IoU: neither higher nor lower pays."""
    for score, direction in ((0.7, -1), (0.8, 0), (0.9, 1)):
        logit = torch.logit(torch.full((1, 1, 1, 1), score, dtype=torch.float64)).requires_grad_()
        one_match(logit, iou=0.8).sum().backward()
        assert logit.grad.item() == pytest.approx(0.8 * 0.1 * direction)


def test_the_gradient_takes_the_weights_as_constants():
    logits = torch.zeros(1, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    one_match(logits, iou=0.8).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([0.8 * (0.5 - 0.8), 3 / 16 * 0.5])


def test_a_match_without_overlap_weighs_nothing():
    logits = torch.zeros(1, 1, 1, 1, requires_grad=True)
    loss = one_match(logits, iou=0.0)
    loss.sum().backward()
    assert loss == 0
    assert logits.grad == 0


def test_only_the_class_of_the_box_is_raised():
    logits = torch.zeros(1, 1, 2, 3, requires_grad=True)
    one_match(logits, iou=0.8, label=2).sum().backward()
    assert (logits.grad < 0).nonzero().tolist() == [[0, 0, 0, 2]]


def test_without_matches_everything_is_background():
    logits = torch.zeros(1, 2, 3, 4)  # 24 pairs of query and class
    loss = vfl(logits, matches(), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert loss.item() == pytest.approx(24 * 3 / 16 * LN2)


def test_each_head_has_its_own_matches_and_its_own_sum():
    logits = torch.zeros(2, 1, 2, 1)
    both = matches((0, 0, 0, 0), (1, 0, 1, 0))
    loss = vfl(logits, both, torch.tensor([0, 0]), torch.tensor([1.0, 0.5]))
    assert loss.tolist() == pytest.approx([(1 + 3 / 16) * LN2, (0.5 + 3 / 16) * LN2])


# L1 and GIoU: boxes


def test_equal_boxes_cost_nothing():
    torch.manual_seed(0)
    boxes = random_boxes(20)
    l1, giou, iou = box_losses(boxes[None], boxes)
    assert l1.tolist() == [0]
    assert giou.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(iou, torch.ones(1, 20, dtype=torch.float64))


def test_l1_adds_up_the_differences_of_centre_and_size():
    boxes, truth = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.tensor([[0.6, 0.3, 0.5, 0.2]])
    assert box_losses(boxes, truth)[0].item() == pytest.approx(0.1 + 0.2 + 0.3)


def test_l1_sees_a_negative_width_as_it_is():
    """GIoU counts it as zero, so L1 is what pulls crossed edges back."""
    boxes, truth = torch.tensor([[[0.5, 0.5, -0.1, 0.2]]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    l1, giou, iou = box_losses(boxes, truth)
    assert l1.item() == pytest.approx(0.3)
    assert giou.item() == pytest.approx(1)
    assert iou.tolist() == [[0]]


def test_the_giou_loss_of_two_squares_a_side_apart_is_four_thirds():
    boxes, truth = torch.tensor([[[0.1, 0.5, 0.2, 0.2]]]), torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert box_losses(boxes, truth)[1].item() == pytest.approx(4 / 3)


def test_the_giou_loss_grows_up_to_two_with_distance():
    truth = torch.tensor([[0.01, 0.5, 0.02, 0.02]])
    losses = [box_losses(torch.tensor([[[x, 0.5, 0.02, 0.02]]]), truth)[1].item() for x in (0.01, 0.02, 0.1, 0.9, 90)]
    assert losses == sorted(losses)
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert 1.999 < losses[-1] < 2


def test_the_iou_that_weighs_other_losses_carries_no_gradient():
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]], requires_grad=True)
    l1, giou, iou = box_losses(boxes, torch.tensor([[0.55, 0.5, 0.2, 0.2]]))
    assert iou.item() == pytest.approx(0.6)  # 3 of 5 quarters
    assert l1.requires_grad
    assert giou.requires_grad
    assert not iou.requires_grad


def test_box_losses_are_summed_for_each_head_alone():
    torch.manual_seed(0)
    boxes, truth = random_boxes(3, 5), random_boxes(5)
    together = box_losses(boxes, truth)
    for head in range(3):
        alone = box_losses(boxes[head : head + 1], truth)
        for all_heads, one_head in zip(together, alone, strict=True):
            torch.testing.assert_close(all_heads[head], one_head[0])


def test_gradients_of_the_box_losses_agree_with_finite_differences():
    torch.manual_seed(0)
    boxes, truth = random_boxes(2, 4).requires_grad_(), random_boxes(4)
    assert torch.autograd.gradcheck(lambda x: box_losses(x, truth)[:2], boxes)


def test_zero_pairs_cost_zero():
    boxes = torch.zeros(3, 0, 4, requires_grad=True)
    l1, giou, _ = box_losses(boxes, torch.zeros(0, 4))
    assert l1.tolist() == giou.tolist() == [0, 0, 0]
    (l1 + giou).sum().backward()  # a process without boxes must not fall out of step


# FGL: edges. With W = -1, 0, 1 there are three bins, and offset -1/2 lies half-way between the first two.

W = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)


def one_edge(probabilities: list[float], offset: float, weight: float = 1) -> float:
    """FGL of one pair whose four edges are alike, divided by four."""
    edge_logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(1, 1, 4, 3)
    offsets = torch.full((1, 4), offset, dtype=torch.float64)
    return fgl(edge_logits, offsets, W, torch.full((1, 1), weight, dtype=torch.float64)).item() / 4


def test_fgl_at_a_bins_value_is_plain_cross_entropy():
    probabilities = [1 / 8, 1 / 4, 5 / 8]
    assert one_edge(probabilities, offset=-1) == pytest.approx(log(8))
    assert one_edge(probabilities, offset=0) == pytest.approx(log(4))
    assert one_edge(probabilities, offset=1) == pytest.approx(log(8 / 5))


def test_fgl_between_two_bins_is_cross_entropy_with_both():
    """1/2 ln 8 + 1/2 ln 4 half-way; three quarters of the way to 0 the share of ln 4 is 3/4."""
    assert one_edge([1 / 8, 1 / 4, 5 / 8], offset=-0.5) == pytest.approx(2.5 * LN2)
    assert one_edge([1 / 8, 1 / 4, 5 / 8], offset=-0.25) == pytest.approx(2.25 * LN2)


def test_fgl_of_an_offset_out_of_reach_is_cross_entropy_with_the_last_bin():
    assert one_edge([1 / 8, 1 / 4, 5 / 8], offset=17) == pytest.approx(log(8 / 5))


def test_fgl_is_least_where_the_two_bins_share_as_the_offset_lies():
    edge_logits = torch.tensor([0.5, 0.5, 1e-30], dtype=torch.float64).log().expand(1, 1, 4, 3).clone().requires_grad_()
    fgl(edge_logits, torch.full((1, 4), -0.5, dtype=torch.float64), W, torch.ones(1, 1)).sum().backward()
    torch.testing.assert_close(edge_logits.grad, torch.zeros_like(edge_logits))


def test_fgl_is_weighted_by_the_iou_of_the_pair():
    assert one_edge([1 / 8, 1 / 4, 5 / 8], offset=0, weight=0.3) == pytest.approx(0.3 * log(4))


def test_fgl_adds_up_edges_and_pairs_but_not_layers():
    """Uniform over nine bins costs ln 9 an edge, wherever the truth lies; two layers, three pairs."""
    torch.manual_seed(0)
    offsets = torch.rand(3, 4, dtype=torch.float64) * 2 - 1
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 0.0]], dtype=torch.float64)
    loss = fgl(torch.zeros(2, 3, 4, 9, dtype=torch.float64), offsets, weighting_function(8, 0.5, 0.25), weight)
    assert loss.tolist() == pytest.approx([12 * log(9), 3 * log(9)])


def test_gradients_of_fgl_agree_with_finite_differences():
    torch.manual_seed(0)
    edge_logits = torch.randn(2, 3, 4, 9, dtype=torch.float64, requires_grad=True)
    offsets, weight = torch.rand(3, 4, dtype=torch.float64) * 3 - 1.5, torch.rand(2, 3, dtype=torch.float64)
    w = weighting_function(8, 0.5, 0.25)
    assert torch.autograd.gradcheck(lambda x: fgl(x, offsets, w, weight), edge_logits)


def test_fgl_of_zero_pairs_is_zero():
    loss = fgl(torch.zeros(3, 0, 4, 9), torch.zeros(0, 4), weighting_function(8, 0.5, 0.25).float(), torch.zeros(3, 0))
    assert loss.tolist() == [0, 0, 0]
