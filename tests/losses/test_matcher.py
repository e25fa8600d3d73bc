"""Hungarian matching: every box of a page gets one query, at the least total cost; all heads at once."""

from itertools import permutations
from math import log

import pytest
import torch
from tiny import random_boxes, target
from torch import Tensor

from dfine import distributed
from dfine.config import MatcherConfig
from dfine.losses.matcher import match, matching_cost
from dfine.structures import Matches, Target

CONFIG = MatcherConfig()
BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2]], dtype=torch.float64)


def cost(probability: float, box: Tensor = BOX, config: MatcherConfig = CONFIG) -> float:
    """Of one query with one box of the only class, truth being BOX."""
    logits = torch.logit(torch.tensor([[probability]], dtype=torch.float64))
    return matching_cost(logits, box, torch.tensor([0]), BOX, config).item()


def random_pages(*boxes: int, classes: int = 3) -> list[Target]:
    return [
        Target(torch.randint(0, classes, (n,)), random_boxes(n), image_id, (100, 100))
        for image_id, n in enumerate(boxes, start=41)
    ]


def random_heads(heads: int, pages: int, queries: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(heads, pages, queries, classes, dtype=torch.float64), random_boxes(heads, pages, queries)


def as_set(matches: Matches) -> set[tuple[int, ...]]:
    """{(head, page, query, box)}"""
    return set(zip(*(index.tolist() for index in matches), strict=True))


# The cost of a pair


def test_the_class_cost_is_what_being_right_saves_in_focal_loss():
    """At p = 1/2, 2 (alpha - (1 - alpha)) (1/2)^2 ln 2 with alpha = 1/4."""
    only_class = MatcherConfig(l1=0, giou=0)
    assert cost(0.5, config=only_class) == pytest.approx(2 * (1 / 4 - 3 / 4) * log(2) / 4)
    assert cost(0.9, config=only_class) < cost(0.5, config=only_class) < cost(0.1, config=only_class)


def test_a_perfect_box_saves_the_weight_of_its_giou():
    assert cost(0.5) - cost(0.5, config=MatcherConfig(l1=0, giou=0)) == pytest.approx(-2)


def test_the_l1_cost_is_five_times_the_distance():
    moved = BOX + torch.tensor([0.1, 0.0, 0.0, 0.05], dtype=torch.float64)
    only_l1 = MatcherConfig(classes=0, giou=0)
    assert cost(0.5, moved, only_l1) == pytest.approx(5 * 0.15)


def test_the_giou_cost_grows_with_distance():
    only_giou = MatcherConfig(classes=0, l1=0)
    moved = BOX + torch.tensor([0.4, 0.0, 0.0, 0.0], dtype=torch.float64)  # two squares a side apart: GIoU -1/3
    assert cost(0.5, moved, only_giou) == pytest.approx(2 / 3)


def test_the_class_cost_is_that_of_the_boxs_class():
    logits = torch.tensor([[5.0, -5.0]])
    same, other = matching_cost(logits, BOX.float(), torch.tensor([0, 1]), BOX.float().repeat(2, 1), CONFIG)[0]
    assert same < other


# The assignment


def test_a_query_on_a_box_gets_that_box():
    page = target([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]], labels=[0, 0])
    boxes = torch.tensor([[[[0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9], [0.2, 0.2, 0.1, 0.1]]]])
    assert as_set(match(torch.zeros(1, 1, 3, 1), boxes, [page], CONFIG)) == {(0, 0, 2, 0), (0, 0, 0, 1)}


def test_no_assignment_is_cheaper():
    """All 60 ways to give 3 boxes different queries out of 5."""
    torch.manual_seed(0)
    for page in random_pages(3, 3, 3, 3, 3):
        logits, boxes = random_heads(1, 1, 5)
        costs = matching_cost(logits[0, 0], boxes[0, 0], page.labels, page.boxes, CONFIG)  # (5, 3)
        cheapest = min(permutations(range(5), 3), key=lambda query: sum(costs[q, t] for t, q in enumerate(query)))
        found = match(logits, boxes, [page], CONFIG)
        assert as_set(found) == {(0, 0, query, box) for box, query in enumerate(cheapest)}


def test_every_box_is_matched_once_and_no_query_twice():
    torch.manual_seed(0)
    pages = random_pages(4, 2)
    matches = match(*random_heads(3, 2, 6), pages, CONFIG)
    for head in range(3):
        of_head = [m for m in as_set(matches) if m[0] == head]
        assert sorted(box for *_, box in of_head) == [0, 1, 2, 3, 4, 5]
        assert len({(page, query) for _, page, query, _ in of_head}) == 6


def test_boxes_are_numbered_through_the_batch():
    torch.manual_seed(0)
    pages = random_pages(2, 0, 3)
    matches = match(*random_heads(1, 3, 6), pages, CONFIG)
    assert {(page, box) for _, page, _, box in as_set(matches)} == {(0, 0), (0, 1), (2, 2), (2, 3), (2, 4)}


def test_permuted_queries_get_the_same_boxes():
    torch.manual_seed(0)
    pages, (logits, boxes), order = random_pages(4), random_heads(2, 1, 6), torch.randperm(6)
    plain = match(logits, boxes, pages, CONFIG)
    permuted = match(logits[:, :, order], boxes[:, :, order], pages, CONFIG)
    assert {(h, p, order[q].item(), t) for h, p, q, t in as_set(permuted)} == as_set(plain)


def test_the_order_of_a_pages_boxes_does_not_matter():
    torch.manual_seed(0)
    [page], heads, order = random_pages(4), random_heads(2, 1, 6), torch.randperm(4)
    plain = match(*heads, [page], CONFIG)
    permuted = match(*heads, [page._replace(labels=page.labels[order], boxes=page.boxes[order])], CONFIG)
    assert {(h, p, q, order[t].item()) for h, p, q, t in as_set(permuted)} == as_set(plain)


def test_all_heads_at_once_are_matched_as_each_alone():
    torch.manual_seed(0)
    pages, (logits, boxes) = random_pages(4, 0, 2), random_heads(3, 3, 6)
    together = as_set(match(logits, boxes, pages, CONFIG))
    alone = {
        (head, *pair[1:])
        for head in range(3)
        for pair in as_set(match(logits[head : head + 1], boxes[head : head + 1], pages, CONFIG))
    }
    assert together == alone


def test_more_cores_change_neither_the_matches_nor_their_order(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    pages, heads, found = random_pages(4, 0, 7, 2, 5), random_heads(3, 5, 9), []
    for cores in (1, 4):
        monkeypatch.setattr(distributed, "cores", lambda cores=cores: cores)
        found.append(match(*heads, pages, CONFIG))
    assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))
    assert found[0].batch.tolist() == sorted(found[0].batch.tolist())


def test_pages_are_matched_as_each_alone():
    """A page's boxes are padded to the most of the batch; padding must not be matched."""
    torch.manual_seed(0)
    pages, (logits, boxes) = random_pages(1, 5), random_heads(1, 2, 6)
    together = as_set(match(logits, boxes, pages, CONFIG))
    first, second = (as_set(match(logits[:, i : i + 1], boxes[:, i : i + 1], [pages[i]], CONFIG)) for i in (0, 1))
    assert together == first | {(h, 1, q, t + 1) for h, _, q, t in second}


def test_more_boxes_than_queries_leave_boxes_unmatched():
    torch.manual_seed(0)
    matches = match(*random_heads(2, 1, 3), random_pages(5), CONFIG)
    assert len(as_set(matches)) == 2 * 3
    assert len(matches.query[matches.layer == 0].unique()) == 3


def test_an_empty_page_has_no_matches():
    torch.manual_seed(0)
    matches = match(*random_heads(2, 2, 3), random_pages(0, 0), CONFIG)
    assert as_set(matches) == set()
    assert all(index.dtype == torch.int64 for index in matches)


def test_negative_widths_have_a_finite_cost():
    boxes = torch.tensor([[[[0.5, 0.5, -0.1, -0.1], [0.5, 0.5, 0.2, 0.2]]]])
    assert as_set(match(torch.zeros(1, 1, 2, 1), boxes, [target([[0.5, 0.5, 0.2, 0.2]])], CONFIG)) == {(0, 0, 1, 0)}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_stops_and_names_head_and_image(broken: float):
    torch.manual_seed(0)
    pages, (logits, boxes) = random_pages(2, 2), random_heads(3, 2, 4)
    boxes[1, 1, 2, 0] = broken
    with pytest.raises(FloatingPointError, match=r"head 1 .* image 42"):
        match(logits, boxes, pages, CONFIG)


# Several queries for a box, in the last head


def test_with_copies_every_box_of_the_last_head_has_as_many_queries_and_the_other_heads_keep_theirs():
    torch.manual_seed(0)
    pages, (logits, boxes) = random_pages(3, 0, 5), random_heads(3, 3, 20)
    plain, copied = match(logits, boxes, pages, CONFIG), match(logits, boxes, pages, CONFIG, last_copies=4)
    assert {pair for pair in as_set(copied) if pair[0] < 2} == {pair for pair in as_set(plain) if pair[0] < 2}
    last = [pair for pair in as_set(copied) if pair[0] == 2]
    assert sorted(box for *_, box in last) == sorted([*range(8)] * 4)
    assert len({(page, query) for _, page, query, _ in last}) == len(last)


def test_copies_take_no_box_its_only_query():
    torch.manual_seed(0)
    logits, boxes = random_heads(1, 1, 7)
    matches = match(logits, boxes, random_pages(5), CONFIG, last_copies=4)
    assert sorted(matches.target.tolist()) == [0, 1, 2, 3, 4]


def test_queries_that_may_not_be_matched_are_not_although_boxes_stay_without_a_query():
    torch.manual_seed(0)
    logits, boxes = random_heads(2, 2, 4)
    valid = torch.tensor([[False, True, False, True], [False] * 4])
    pages = random_pages(3, 1)
    matches = match(logits, boxes, pages, CONFIG, last_copies=2, valid=valid)
    for head in range(2):
        assert sorted(matches.query[(matches.layer == head) & (matches.batch == 0)].tolist()) == [1, 3]
    assert not (matches.batch == 1).any()
    boxes[1, 0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="head 1"):
        match(logits, boxes, pages, CONFIG, valid=valid)
