"""Contrastive denoising: queries that start from noised truth.

With M the most boxes of a page, a group is M positives, then M negatives. Positives start near their box and must
find it; negatives start farther off and must answer "nothing".
"""

import pytest
import torch
from tiny import random_boxes, target

from dfine.boxes import cxcywh_to_xyxy
from dfine.config import DenoisingConfig
from dfine.model.denoising import (
    Noise,
    attention_mask,
    draw_noise,
    freshly_noised,
    group_count,
    match_denoising,
    most_boxes,
    noised_truth,
)
from dfine.structures import NoisedTruth, Target

BOX = [0.5, 0.5, 0.2, 0.4]  # half sizes 0.1, 0.2; corners 0.4, 0.3, 0.6, 0.7
TWO_AND_ONE = [target([BOX, [0.2, 0.2, 0.1, 0.1]], labels=[4, 7]), target([[0.7, 0.6, 0.2, 0.2]], labels=[2])]


def still(targets: list[Target], queries: int = 1, size: float = 0.0, sign: int = 1, coin: float = 0.9) -> Noise:
    """Noise that is the same everywhere: every corner is moved by `size`, new labels are 9."""
    slots = (len(targets), 2 * most_boxes(targets) * group_count(targets, queries))
    full = torch.full((*slots, 4), 1.0)
    return Noise(torch.full(slots, coin), torch.full(slots, 9), (sign * full).long(), size * full)


def replay(targets: list[Target], noise: Noise, queries: int = 1, box_noise: float = 1.0) -> NoisedTruth:
    return noised_truth(targets, noise, queries, classes=10, label_noise=0.25, box_noise=box_noise)


def random_noise(targets: list[Target], queries: int, label_noise: float = 0.25, classes: int = 10) -> NoisedTruth:
    torch.manual_seed(0)
    return noised_truth(targets, draw_noise(targets, queries, classes), queries, classes, label_noise, 1.0)


# How many


@pytest.mark.parametrize(("boxes", "groups"), [(1, 100), (3, 33), (60, 1), (150, 1)])
def test_there_are_as_many_groups_as_fit_into_a_hundred_positives_but_at_least_one(boxes: int, groups: int):
    assert group_count([target([BOX] * boxes), target([BOX])], queries=100) == groups


def test_every_group_has_a_positive_and_a_negative_for_each_box_of_the_fullest_page():
    noised = random_noise(TWO_AND_ONE, queries=6)  # M = 2, so 3 groups
    assert noised.groups == 3
    assert noised.labels.shape == (2, 3 * 2 * 2)
    assert noised.boxes.shape == (2, 12, 4)


def test_no_boxes_in_the_whole_batch_make_no_slots():
    empty = [target([]), target([])]
    noised = random_noise(empty, queries=100)
    assert noised.labels.shape == (2, 0)
    assert noised.boxes.shape == (2, 0, 4)
    assert len(match_denoising(empty, noised.groups).query) == 0


# Boxes


def test_positives_move_by_their_draw_times_the_half_size():
    positive = replay([target([BOX])], still([target([BOX])], size=0.5)).boxes[0, 0]
    assert cxcywh_to_xyxy(positive).tolist() == pytest.approx([0.45, 0.4, 0.65, 0.8])


def test_negatives_move_one_half_size_further():
    negative = replay([target([BOX])], still([target([BOX])], size=0.25)).boxes[0, 1]
    assert cxcywh_to_xyxy(negative).tolist() == pytest.approx([0.525, 0.55, 0.725, 0.95])


def test_the_sign_decides_the_direction():
    positive = replay([target([BOX])], still([target([BOX])], size=0.5, sign=-1)).boxes[0, 0]
    assert cxcywh_to_xyxy(positive).tolist() == pytest.approx([0.35, 0.2, 0.55, 0.6])


def test_box_noise_scales_the_move():
    moved = replay([target([BOX])], still([target([BOX])], size=0.25), box_noise=0.4).boxes[0]
    assert (moved[:, 0] - 0.5).tolist() == pytest.approx([0.4 * 0.25 * 0.1, 0.4 * 1.25 * 0.1])


def test_corners_of_positives_stay_within_the_half_size_and_those_of_negatives_within_one_to_two():
    """The two halves of the contrast; the box is small and central, so nothing is clipped."""
    small = [target([[0.5, 0.5, 0.1, 0.2]])]
    torch.manual_seed(0)
    noise = draw_noise(small, 100, 10)
    noise.sign[..., 2:] = noise.sign[..., :2]  # corners that move together cannot cross
    moved = cxcywh_to_xyxy(replay(small, noise, queries=100).boxes[0]) - cxcywh_to_xyxy(small[0].boxes)
    halves = (moved / torch.tensor([0.05, 0.1, 0.05, 0.1])).abs().unflatten(0, (100, 2))  # groups, positive/negative
    assert 0 <= halves[:, 0].min() < 0.05
    assert 0.95 < halves[:, 0].max() <= 1
    assert 1 <= halves[:, 1].min() < 1.05
    assert 1.95 < halves[:, 1].max() <= 2


def test_corners_leave_in_both_directions_equally_often():
    torch.manual_seed(0)
    signs = draw_noise([target([BOX])], 1000, 10).sign
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.float().mean()) < 0.05


def test_corners_are_clipped_to_the_page():
    corner = [target([[0.1, 0.9, 0.2, 0.2]])]
    down_left = still(corner, size=0.5)
    down_left.sign[..., 0::2] = -1
    corners = cxcywh_to_xyxy(replay(corner, down_left).boxes[0])
    assert corners[0].tolist() == pytest.approx([0, 0.85, 0.15, 1])
    assert corners[1].tolist() == pytest.approx([0, 0.95, 0.05, 1])


def test_sizes_are_made_positive_where_corners_cross():
    crossing = still([target([BOX])], size=0.5)
    crossing.sign[..., 2:] = -1  # all corners move inwards: the negative's by 1.5 half sizes, past each other
    negative = replay([target([BOX])], crossing).boxes[0, 1]
    assert negative.tolist() == pytest.approx([0.5, 0.5, 0.1, 0.2])
    assert (random_noise(TWO_AND_ONE, queries=200).boxes[0, :, 2:] > 0).all()


# Labels


def test_a_label_is_redrawn_where_its_coin_is_below_the_rate():
    page = [target([BOX], labels=[4])]
    assert replay(page, still(page, coin=0.24)).labels.tolist() == [[9, 9]]
    assert replay(page, still(page, coin=0.26)).labels.tolist() == [[4, 4]]


def test_a_quarter_of_the_labels_is_redrawn():
    labels = random_noise([target([BOX], labels=[4])] * 20, queries=200, classes=10_000).labels  # 8000 slots
    assert (labels != 4).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_redrawn_labels_are_uniform_over_the_classes():
    labels = random_noise([target([BOX])] * 20, queries=200, label_noise=1.0, classes=4).labels
    shares = labels.flatten().bincount() / labels.numel()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)


# Padding


def test_slots_of_shorter_pages_have_no_box_and_the_label_behind_the_last_class():
    noised = replay(TWO_AND_ONE, still(TWO_AND_ONE, coin=0.0))  # even where the coin says redraw
    assert noised.labels.tolist() == [[9, 9, 9, 9], [9, 10, 9, 10]]
    assert noised.boxes[1, 1::2].tolist() == [[0, 0, 0, 0]] * 2
    assert (noised.boxes[1, 0::2, 2:] > 0).all()


# Replay


def test_recorded_draws_give_the_same_queries_again():
    torch.manual_seed(0)
    noise = draw_noise(TWO_AND_ONE, 6, 10)
    first = replay(TWO_AND_ONE, noise, queries=6)
    torch.rand(17)  # the generator moves on
    second = replay(TWO_AND_ONE, noise, queries=6)
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.boxes, second.boxes)


def test_the_same_seed_draws_the_same_noise():
    torch.manual_seed(3)
    first = draw_noise(TWO_AND_ONE, 6, 10)
    torch.manual_seed(3)
    for ours, theirs in zip(first, draw_noise(TWO_AND_ONE, 6, 10), strict=True):
        assert torch.equal(ours, theirs)


def test_without_denoising_queries_there_is_no_denoising():
    assert freshly_noised(TWO_AND_ONE, 10, DenoisingConfig(queries=0)) is None
    assert freshly_noised(TWO_AND_ONE, 10, DenoisingConfig(queries=1)).groups == 1


# Pages with more boxes than are noised


def crowded(boxes: int, label: int = 4) -> Target:
    torch.manual_seed(9)
    return target(random_boxes(boxes).tolist(), [label] * boxes)


def test_of_a_crowded_page_some_boxes_are_noised_in_their_order_and_others_the_next_time():
    pages = [crowded(50), target([BOX, BOX])]
    still = DenoisingConfig(queries=6, max_boxes=7, label_noise=0.0, box_noise=0.0)
    torch.manual_seed(0)
    first, second = freshly_noised(pages, 10, still), freshly_noised(pages, 10, still)
    assert first.labels.shape == (2, 2 * 7)
    assert first.groups == 1
    for noised in (first, second):
        assert [len(boxes) for boxes in noised.chosen] == [7, 2]
        assert noised.chosen[0].tolist() == sorted(set(noised.chosen[0].tolist()))
        matches = match_denoising(pages, noised.groups, noised.chosen)
        assert len(matches.query) == 9
        truth = torch.cat([page.boxes for page in pages])
        torch.testing.assert_close(noised.boxes[matches.batch, matches.query], truth[matches.target])
        assert matches.target[matches.batch == 1].tolist() == [50, 51]
    assert first.chosen[0].tolist() != second.chosen[0].tolist()
    drawn = {int(i) for _ in range(100) for i in freshly_noised(pages, 10, still).chosen[0]}
    assert drawn == set(range(50))


def test_as_long_as_all_boxes_are_noised_the_limit_changes_no_draw():
    for limit in (2, 300):
        torch.manual_seed(5)
        noised = freshly_noised(TWO_AND_ONE, 10, DenoisingConfig(queries=6, max_boxes=limit))
        torch.manual_seed(5)
        assert noised.chosen is None
        replayed = replay(TWO_AND_ONE, draw_noise(TWO_AND_ONE, 6, 10), queries=6)
        assert torch.equal(noised.boxes, replayed.boxes)


# Who sees whom


def test_a_group_sees_itself_and_the_matching_queries_which_see_no_group():
    """Two groups of two slots, then three matching queries; x is blocked."""
    drawn = [
        ". . x x . . .",
        ". . x x . . .",
        "x x . . . . .",
        "x x . . . . .",
        "x x x x . . .",
        "x x x x . . .",
        "x x x x . . .",
    ]
    blocked = [[mark == "x" for mark in row.split()] for row in drawn]
    assert attention_mask(slots=4, groups=2, queries=3, device=torch.device("cpu")).tolist() == blocked


def test_without_slots_nothing_is_blocked():
    mask = attention_mask(slots=0, groups=100, queries=3, device=torch.device("cpu"))
    assert mask.tolist() == [[False] * 3] * 3


# Who must find what


def test_the_jth_positive_of_every_group_belongs_to_the_jth_box():
    """Groups of two positives and two negatives; page 0 has boxes 0 and 1, page 1 has box 2 and a padded slot."""
    matches = match_denoising(TWO_AND_ONE, groups=2)
    assert matches.layer is None
    assert matches.batch.tolist() == [0, 0, 0, 0, 1, 1]
    assert matches.query.tolist() == [0, 1, 4, 5, 0, 4]
    assert matches.target.tolist() == [0, 1, 0, 1, 2, 2]


def test_matched_slots_start_from_the_box_they_must_find():
    noised = replay(TWO_AND_ONE, still(TWO_AND_ONE, queries=6), queries=6)  # positives do not move
    matches = match_denoising(TWO_AND_ONE, noised.groups)
    truth = torch.cat([page.boxes for page in TWO_AND_ONE])
    torch.testing.assert_close(noised.boxes[matches.batch, matches.query], truth[matches.target])
    assert noised.labels[matches.batch, matches.query].tolist() == [4, 7] * 3 + [2] * 3
