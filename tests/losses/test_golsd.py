"""GO-LSD: the union of all heads' matchings, and DDF, which teaches every layer the last layer's edge distributions."""

from collections import Counter
from math import log, sqrt

import pytest
import torch

from dfine.losses.golsd import ddf, kl_of_edges, union
from dfine.structures import Matches

LN2 = log(2)


# The union: one vote per head for each (query, box)


def votes(*heads: dict[int, int]) -> Matches:
    """The matches of one page: for each head, query -> box."""
    rows = [(head, 0, query, box) for head, pairs in enumerate(heads) for query, box in pairs.items()]
    return Matches(*torch.tensor(rows, dtype=torch.int64).view(-1, 4).T)


def elected(*heads: dict[int, int], last: int = 0) -> dict[int, int]:
    """query -> box of the union."""
    pairs = union(votes(*heads), queries=10, last=last)
    return dict(zip(pairs.query.tolist(), pairs.target.tolist(), strict=True))


def test_heads_that_agree_elect_what_they_agree_on():
    assert elected({3: 0, 5: 1}, {3: 0, 5: 1}) == {3: 0, 5: 1}


def test_a_query_takes_the_box_with_most_votes():
    assert elected({3: 0}, {3: 1}, {3: 1}) == {3: 1}


def test_the_last_layers_vote_does_not_outweigh_a_majority():
    assert elected({3: 0}, {3: 1}, {3: 1}, last=0) == {3: 1}
    assert elected({3: 0}, {3: 0}, {3: 0}, {3: 1}, {3: 1}, last=4) == {3: 0}


def test_a_tie_goes_to_the_last_layers_choice():
    assert elected({3: 0}, {3: 1}, last=1) == {3: 1}
    assert elected({3: 0}, {3: 1}, last=0) == {3: 0}


def test_a_tie_without_the_last_layer_goes_to_the_lower_index():
    assert elected({3: 2}, {3: 1}, {5: 0}, last=2) == {3: 1, 5: 0}


def test_a_box_keeps_every_query_that_any_head_matched_to_it():
    """That is the point: localisation learns from more pairs than one head's one-to-one matching has."""
    assert elected({3: 0}, {4: 0}, {5: 0}) == {3: 0, 4: 0, 5: 0}


def test_queries_that_no_head_matched_stay_out():
    assert set(elected({3: 0}, {4: 0})) == {3, 4}


def test_no_matches_make_an_empty_union():
    assert elected({}, {}) == {}


def test_pages_vote_apart():
    """Query 3 of page 0 and query 3 of page 1 are different queries; boxes are numbered through the batch."""
    heads, pages = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    pairs = union(Matches(heads, pages, torch.tensor([3, 3, 3, 3]), torch.tensor([0, 1, 0, 1])), queries=10, last=0)
    assert pairs.layer is None
    assert pairs.batch.tolist() == [0, 1]
    assert pairs.query.tolist() == [3, 3]
    assert pairs.target.tolist() == [0, 1]


def test_the_order_in_which_votes_are_cast_does_not_matter():
    torch.manual_seed(0)
    cast = votes({0: 1, 1: 0, 2: 2}, {0: 2, 1: 0, 4: 1}, {0: 0, 2: 1, 4: 2}, {0: 1, 2: 1, 7: 2})
    shuffled = torch.randperm(len(cast.query))
    for ours, theirs in zip(
        union(cast, 10, last=2)[1:], union(Matches(*(x[shuffled] for x in cast)), 10, last=2)[1:], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_union_is_a_vote_count():
    """A ballot box of dictionaries says the same, on 20 random elections with many ties."""
    torch.manual_seed(0)
    for _ in range(20):
        heads = [dict(zip(torch.randperm(6).tolist(), torch.randperm(4).tolist(), strict=False)) for _ in range(5)]
        expected = {}
        for query in range(6):
            count = Counter(head[query] for head in heads if query in head)
            if count:
                expected[query] = max(count, key=lambda box: (count[box], heads[2].get(query) == box, -box))
        assert elected(*heads, last=2) == expected


# DDF: T^2 KL(teacher || student) of the four edges


def test_a_student_that_equals_its_teacher_has_no_divergence():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 9, dtype=torch.float64)
    kl = kl_of_edges((logits / 5).softmax(-1), logits, temperature=5)
    torch.testing.assert_close(kl, torch.zeros(2, 5, dtype=torch.float64))


def test_divergence_of_a_sure_teacher_from_an_undecided_student_is_ln_2_an_edge():
    teacher, student = torch.tensor([1.0, 0.0]).expand(4, 2), torch.zeros(4, 2)
    assert kl_of_edges(teacher, student, temperature=1).item() == pytest.approx(4 * LN2)


def test_the_teacher_comes_first_in_the_divergence():
    """KL((3/4, 1/4) || (1/2, 1/2)) = 3/4 ln 3/2 + 1/4 ln 1/2; the other way round it is 1/2 ln 4/3."""
    kl = kl_of_edges(torch.tensor([0.75, 0.25]).expand(4, 2), torch.zeros(4, 2), temperature=1)
    assert kl.item() / 4 == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))


def test_a_temperature_scales_divergence_by_its_square():
    """So that gradients keep their size: softening by T shrinks them by T^2."""
    teacher = torch.tensor([1.0, 0.0]).expand(4, 2)
    assert kl_of_edges(teacher, torch.zeros(4, 2), temperature=5).item() == pytest.approx(25 * 4 * LN2)


def test_a_temperature_softens_the_student():
    teacher = torch.tensor([0.75, 0.25]).expand(4, 2)
    student = torch.tensor([5 * log(3), 0.0]).expand(4, 2)  # at T = 5 it has odds of 3 to 1 as well
    assert kl_of_edges(teacher, student, temperature=5).item() == pytest.approx(0, abs=1e-5)
    assert kl_of_edges(teacher, student, temperature=1).item() > 0.1


def test_gradients_of_the_divergence_agree_with_finite_differences():
    torch.manual_seed(0)
    teacher = torch.randn(3, 4, 9, dtype=torch.float64).softmax(-1)
    student = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kl_of_edges(teacher, x, temperature=5), student)


# DDF: matched and unmatched queries are averaged apart, then weighted by the roots of their numbers

ONE_OF_FIVE = torch.tensor([[True, False, False, False, False]])
COUNTS = torch.tensor([1.0, 4.0])


def test_matched_and_unmatched_queries_are_averaged_apart():
    """Divergence of 4 (1 an edge) on the match, mean 1/2 on the rest: (1 * 1 + 2 * 1/2) / (1 + 2)."""
    kl = torch.tensor([[[4.0, 8.0, 0.0, 0.0, 0.0]]])
    loss = ddf(kl, torch.ones(1, 1, 5), ONE_OF_FIVE, normalisers=COUNTS, shares=COUNTS)
    assert loss.tolist() == pytest.approx([2 / 3])


def test_many_unmatched_queries_do_not_drown_the_match():
    """Of 1 match and n unmatched queries the match has a share of 1 / (1 + sqrt n), not 1 / (1 + n)."""
    for n in (1, 4, 99):
        kl = torch.zeros(1, 1, 1 + n)
        kl[..., 0] = 4
        counts, matched = torch.tensor([1.0, n]), torch.arange(1 + n)[None] == 0
        loss = ddf(kl, torch.ones(1, 1, 1 + n), matched, normalisers=counts, shares=counts)
        assert loss.item() == pytest.approx(1 / (1 + sqrt(n)))


def test_each_query_has_its_own_weight():
    kl = torch.full((1, 1, 5), 4.0)
    weight = torch.tensor([[[0.9, 0.1, 0.2, 0.3, 0.0]]])
    loss = ddf(kl, weight, ONE_OF_FIVE, normalisers=COUNTS, shares=COUNTS)
    assert loss.item() == pytest.approx((0.9 + 2 * 0.6 / 4) / 3)


def test_every_layer_has_its_own_mean():
    kl = torch.full((2, 1, 5), 4.0) * torch.tensor([1.0, 3.0])[:, None, None]
    assert ddf(kl, torch.ones(2, 1, 5), ONE_OF_FIVE, COUNTS, COUNTS).tolist() == pytest.approx([1, 3])


def test_without_matches_ddf_is_the_mean_over_unmatched_queries():
    """The normaliser of the matched is clamped to 1 by the criterion; their share stays 0, and nothing is 0 / 0."""
    kl = torch.full((1, 1, 5), 4.0)
    none = torch.zeros(1, 5, dtype=torch.bool)
    loss = ddf(kl, torch.ones(1, 1, 5), none, normalisers=torch.tensor([1.0, 5.0]), shares=torch.tensor([0.0, 5.0]))
    assert loss.item() == pytest.approx(1)
