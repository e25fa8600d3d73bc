"""Boxes are (centre x, centre y, width, height); overlaps use no epsilon, and sizes below zero count as zero."""

import math

import pytest
import torch
from tiny import random_boxes

from dfine.boxes import cxcywh_to_xyxy, full_precision, iou, iou_and_giou, logit, xyxy_to_cxcywh


def test_a_box_is_its_centre_and_its_size():
    box = torch.tensor([0.5, 0.5, 0.5, 0.25])
    assert cxcywh_to_xyxy(box).tolist() == [0.25, 0.375, 0.75, 0.625]
    assert xyxy_to_cxcywh(cxcywh_to_xyxy(box)).tolist() == box.tolist()


def test_corners_and_centres_are_inverse():
    torch.manual_seed(0)
    boxes = random_boxes(50)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-15, rtol=0)


def test_crossed_corners_give_a_negative_size():
    assert xyxy_to_cxcywh(torch.tensor([0.75, 0.0, 0.25, 1.0])).tolist() == [0.5, 0.5, -0.5, 1.0]


def test_a_negative_width_counts_as_zero_area():
    inside_out, truth = torch.tensor([0.5, 0.5, -0.2, 0.4]), torch.tensor([0.5, 0.5, 0.2, 0.4])
    assert cxcywh_to_xyxy(inside_out)[[0, 2]].tolist() == [0.5, 0.5]
    assert iou(inside_out, truth) == 0


def test_iou_of_two_squares_that_share_half_is_a_third():
    a, b = torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, 2.0, 2.0])
    assert iou(a, b).item() == pytest.approx(1 / 3)


def test_giou_subtracts_the_empty_share_of_the_hull():
    a, b = torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([2.5, 0.5, 1.0, 1.0])  # unit squares, a unit apart
    overlap, generalised = iou_and_giou(a, b)
    assert overlap == 0
    assert generalised.item() == pytest.approx(-1 / 3)


def test_giou_is_iou_where_the_hull_is_full():
    outer, inner = torch.tensor([0.5, 0.5, 0.8, 0.8]), torch.tensor([0.5, 0.5, 0.4, 0.4])
    overlap, generalised = iou_and_giou(outer, inner)
    assert overlap.item() == pytest.approx(0.25)
    assert generalised.item() == pytest.approx(0.25)


def test_giou_of_far_points_approaches_minus_one():
    corners = torch.tensor([[0.0005, 0.0005, 0.001, 0.001], [0.9995, 0.9995, 0.001, 0.001]])
    assert -1 < iou_and_giou(corners[0], corners[1])[1] < -0.99999


def test_overlap_is_symmetric():
    torch.manual_seed(0)
    a, b = random_boxes(50), random_boxes(50)
    for ours, theirs in zip(iou_and_giou(a, b), iou_and_giou(b, a), strict=True):
        assert torch.equal(ours, theirs)


def test_overlap_does_not_change_with_the_unit():
    torch.manual_seed(0)
    a, b = random_boxes(50), random_boxes(50)
    for fractions, pixels in zip(iou_and_giou(a, b), iou_and_giou(640 * a, 640 * b), strict=True):
        torch.testing.assert_close(fractions, pixels, atol=1e-12, rtol=0)


def test_an_eight_pixel_box_on_a_large_page_has_iou_exactly_one_with_itself():
    """Its area is 6e-5 of a page of 1025 pixels: an epsilon of 1e-7 in the quotient would cost more than 0.1 %."""
    torch.manual_seed(0)
    boxes = torch.cat([torch.rand(1000, 2), torch.full((1000, 2), 8 / 1025)], dim=-1)
    overlap, generalised = iou_and_giou(boxes, boxes)
    assert (overlap == 1).all()
    assert (generalised == 1).all()


def test_overlap_broadcasts_to_all_pairs():
    torch.manual_seed(0)
    a, b = random_boxes(3), random_boxes(2)
    pairs = iou(a[:, None], b)
    assert pairs.shape == (3, 2)
    assert pairs[2, 1] == iou(a[2], b[1])


def test_logit_inverts_sigmoid():
    fractions = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    assert logit(fractions)[1] == 0
    torch.testing.assert_close(logit(fractions).sigmoid(), fractions)


def test_logit_stays_finite_at_the_borders():
    lowest, highest = logit(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert highest.item() == pytest.approx(math.log((1 - 1e-5) / 1e-5))
    assert lowest.item() == pytest.approx(-highest.item())


def test_full_precision_raises_halves_and_leaves_the_rest():
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    raised = [full_precision(torch.zeros(1, dtype=dtype)).dtype for dtype in dtypes]
    assert raised == [torch.float32, torch.float32, torch.float32, torch.float64]
