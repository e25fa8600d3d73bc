"""Distillation: the teacher's distributions in the student's frame, three losses on shared queries, and who learns."""

from math import inf, log, sqrt
from typing import Any

import pytest
import torch
from tiny import noised, random_boxes, shaken, target, tiny_config, tiny_model
from torch import Tensor, nn

from dfine import distributed
from dfine.boxes import iou
from dfine.config import (
    BoxDistillConfig,
    CellsDistillConfig,
    ClassDistillConfig,
    DistillConfig,
    GoLsdConfig,
    LossConfig,
    MatcherConfig,
    MemoryDistillConfig,
    ModelConfig,
)
from dfine.losses.criterion import criterion
from dfine.losses.distillation import (
    CELLS,
    DENOISING,
    TEACHER_QUERIES,
    active,
    box_distance,
    class_kl,
    class_mse,
    distillation,
    end_epoch,
    go_lsd,
    memory_distance,
    memory_projection,
    on_labelled_pages,
    project,
    student_forward,
    teacher_forward,
    teacher_matches,
)
from dfine.losses.golsd import kl_of_edges
from dfine.model.detector import DFine
from dfine.model.fdr import decode, expectation, weighting_function
from dfine.structures import (
    Batch,
    Cells,
    Denoising,
    DFineOutput,
    Matches,
    NoisedTruth,
    Prediction,
    Queries,
    Refinement,
    Target,
)

W = weighting_function(8, 0.5, 0.25)
EVERY = {"class": 1.0, "box": 1.0, "go_lsd": 1.0}
CONFIG, LOSS, MATCHER = DistillConfig(), LossConfig(), MatcherConfig()


def page(*boxes: list[float]) -> Target:
    return target(list(boxes), dtype=torch.float64)


PAGES = [page([0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]), page([0.5, 0.5, 0.4, 0.2])]


def refinement(layers: int = 3, bins: int = 8, w: Tensor = W) -> Refinement:
    """Answers to 5 queries on 2 pages: boxes as the edges say, scores as they come; 3 classes."""
    edge_logits = torch.randn(layers, 2, 5, 4, bins + 1, dtype=torch.float64)
    frame = random_boxes(2, 5)
    logits = torch.randn(layers, 2, 5, 3, dtype=torch.float64)
    return Refinement(logits, decode(frame, expectation(edge_logits, w)), edge_logits, frame)


def answers(seed: int = 0) -> tuple[Refinement, Refinement]:
    """A student's, of three layers, and a teacher's."""
    torch.manual_seed(seed)
    return refinement(), refinement(layers=1)


def losses(student: Refinement, teacher: Refinement, targets: list[Target] = PAGES, **terms: object) -> dict:
    config = DistillConfig(**dict(CONFIG) | terms)
    return distillation(*as_outputs(student, teacher), W, W, targets, EVERY, config, MATCHER)


def as_outputs(student: Refinement, teacher: Refinement) -> tuple[DFineOutput, DFineOutput]:
    """Answers to the teacher's queries as parts of what the models say."""
    pages, queries = teacher.initial_boxes.shape[:2]
    start = Queries(torch.zeros(0), torch.zeros(0), torch.ones(pages, queries, dtype=torch.bool))
    return DFineOutput(student, start, on_teacher_queries=student), DFineOutput(teacher, start)


def edges(student: Refinement, teacher: Refinement, temperature: float, targets: list[Target], w: Tensor = W) -> Tensor:
    """GO-LSD where all queries are valid."""
    valid = torch.ones(2, 5, dtype=torch.bool)
    pairs = teacher_matches(teacher, targets, MATCHER, valid)
    return go_lsd(student, teacher, w, W, targets, temperature, pairs, valid)


# Projection: edge distributions in another frame


def distributions(*shape: int, bins: int = 8) -> Tensor:
    return (2 * torch.randn(*shape, 4, bins + 1, dtype=torch.float64)).softmax(-1)


def test_in_the_same_frame_a_distribution_stays_as_it_is():
    torch.manual_seed(0)
    p, frame = distributions(100), random_boxes(100)
    torch.testing.assert_close(project(p, frame, W, frame, W), p)


def test_single_precision_is_enough_for_that():
    torch.manual_seed(0)
    p, frame, w = distributions(100, bins=32).float(), random_boxes(100).float(), weighting_function(32, 0.5, 0.25)
    torch.testing.assert_close(project(p, frame, w.float(), frame, w.float()), p, atol=1e-4, rtol=0)


def test_a_projected_distribution_is_a_distribution():
    torch.manual_seed(0)
    projected = project(distributions(100), random_boxes(100), W, random_boxes(100), weighting_function(16, 1.0, 0.1))
    assert (projected >= 0).all()
    torch.testing.assert_close(projected.sum(-1), torch.ones(100, 4, dtype=torch.float64))


def test_the_decoded_box_stays_where_the_new_frame_reaches_all_of_it():
    """Every place that the old frame's bins stand for lies inside the new frame's outermost bins."""
    torch.manual_seed(0)
    old = random_boxes(100)
    new = torch.cat([old[:, :2] + 0.1 * old[:, 2:], 3 * old[:, 2:]], dim=-1)
    for w in (W, weighting_function(32, 0.5, 0.25), weighting_function(6, 0.8, 0.3)):
        p = distributions(100)
        torch.testing.assert_close(decode(new, project(p, old, W, new, w) @ w), decode(old, p @ W))


def test_what_lies_beyond_the_outermost_bins_is_moved_onto_them():
    """The new frame is half as wide, with the same right edge: what was 1 width to the right is 2 now, and becomes 1.
    The left edge, 1/2 of the new width to the left at W = 0, is in reach."""
    sure = torch.zeros(4, 9, dtype=torch.float64)
    sure[0, 4] = sure[1, 4] = sure[2, 8] = sure[3, 4] = 1
    old = torch.tensor([0.5, 0.5, 0.2, 0.2], dtype=torch.float64)  # 0.4 to 0.6
    new = torch.tensor([0.55, 0.5, 0.1, 0.2], dtype=torch.float64)  # 0.5 to 0.6
    offsets = project(sure, old, W, new, W) @ W
    assert offsets.tolist() == pytest.approx([1, 0, 1, 0])
    assert decode(old, sure @ W)[0].item() == pytest.approx(0.6)  # 0.4 to 0.8
    assert decode(new, offsets)[0].item() == pytest.approx(0.55)  # 0.4 to 0.7


def test_a_place_between_two_bins_is_shared_by_them():
    """The frame moves right by half a bin: the sure edge at W(4) = 0 now lies between two bins on either side."""
    step = W[5].item() / 2
    sure = torch.nn.functional.one_hot(torch.full((4,), 4), 9).double()
    old = torch.tensor([0.5, 0.5, 0.2, 0.2], dtype=torch.float64)
    new = old + torch.tensor([step * 0.2, 0, 0, 0], dtype=torch.float64)
    left, top, right, bottom = project(sure, old, W, new, W)
    half = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(left[4:6], half.expand(2))  # the left edge is to the left of the new frame's
    torch.testing.assert_close(right[3:5], half.expand(2))
    torch.testing.assert_close(torch.stack([top, bottom]), sure[:2])


def test_bin_by_bin_two_models_distributions_would_mean_other_boxes():
    """Why there is a projection: two guesses of the same box, one of them read in the other's frame."""
    torch.manual_seed(0)
    truth = random_boxes(200)
    guess, other = (decode(truth, 0.4 * torch.rand_like(truth) - 0.2) for _ in range(2))
    p = (torch.randn(200, 4, 9, dtype=torch.float64) - 8 * W.abs()).softmax(-1)
    box = decode(guess, p @ W)
    assert iou(decode(other, p @ W), box).mean() < 0.75
    assert iou(decode(other, project(p, guess, W, other, W) @ W), box).mean() > 0.99


# Classes and boxes


def test_the_divergence_of_a_sure_score_from_an_undecided_one_is_ln_2():
    teacher, student = torch.tensor([[[100.0, -100.0]]]), torch.zeros(3, 1, 1, 2)
    assert class_kl(teacher, student, temperature=1).tolist() == pytest.approx([2 * log(2)] * 3)


def test_the_teacher_comes_first_and_the_temperature_softens_both():
    """At T = 2 the odds are 3 to 1 and 1 to 1: T^2 (3/4 ln 3/2 + 1/4 ln 1/2)."""
    teacher, student = torch.full((1, 1, 1), 2 * log(3)), torch.zeros(1, 1, 1, 1)
    expected = 4 * (0.75 * log(1.5) + 0.25 * log(0.5))
    assert class_kl(teacher, student, temperature=2).item() == pytest.approx(expected, rel=1e-5)


def test_the_class_divergence_pulls_scores_towards_the_teachers():
    """Its gradient is T (sigmoid(student / T) - sigmoid(teacher / T))."""
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 3).double(), torch.randn(3, 2, 5, 3).double().requires_grad_()
    class_kl(teacher, student, temperature=2).sum().backward()
    torch.testing.assert_close(student.grad, 2 * ((student.detach() / 2).sigmoid() - (teacher / 2).sigmoid()))


def test_mse_compares_probabilities():
    teacher, student = torch.tensor([[[100.0, -100.0]]]), torch.zeros(3, 1, 1, 2)
    assert class_mse(teacher, student).tolist() == [0.5] * 3


def test_box_distances_weigh_the_teachers_confidence():
    """One query is off by 0.1 in each of four numbers, the other by 0.2 in one."""
    teacher = torch.full((1, 2, 4), 0.5)
    student = teacher + torch.tensor([[0.1, 0.1, -0.1, -0.1], [0, 0, 0, 0.2]])
    student, confidence = student.expand(3, -1, -1, -1), torch.tensor([[0.5, 0.25]])
    l1, mse = (box_distance(teacher, student, confidence, squared) for squared in (False, True))
    assert l1.tolist() == pytest.approx([0.5 * 0.4 + 0.25 * 0.2] * 3)
    assert mse.tolist() == pytest.approx([0.5 * 0.04 + 0.25 * 0.04] * 3)


def test_classes_are_divided_by_the_number_of_boxes_and_boxes_by_the_confidences():
    student, teacher = answers()
    terms = losses(student, teacher)
    confidence = teacher.logits[-1].sigmoid().amax(-1)
    sums = box_distance(teacher.boxes[-1], student.boxes, confidence, squared=False)
    torch.testing.assert_close(terms["distill_class"], class_kl(teacher.logits[-1], student.logits, 1.0) / 3)
    torch.testing.assert_close(terms["distill_box"], sums / confidence.sum())


def test_the_kinds_of_loss_are_the_configs():
    student, teacher = answers()
    terms = losses(student, teacher, classes=ClassDistillConfig(loss="mse"), boxes=BoxDistillConfig(loss="mse"))
    confidence = teacher.logits[-1].sigmoid().amax(-1)
    sums = box_distance(teacher.boxes[-1], student.boxes, confidence, squared=True)
    torch.testing.assert_close(terms["distill_class"], class_mse(teacher.logits[-1], student.logits) / 3)
    torch.testing.assert_close(terms["distill_box"], sums / confidence.sum())


# GO-LSD across models


def test_go_lsd_is_ddf_against_the_projected_distributions():
    """Query by query: T^2 KL a quarter, weighted; matched and unmatched apart; roots of their numbers."""
    student, teacher = answers()
    logits, boxes = teacher.logits[-1], teacher.boxes[-1]
    boxes[0, 1], boxes[0, 4], boxes[1, 2] = PAGES[0].boxes[0], PAGES[0].boxes[1] + 0.02, PAGES[1].boxes[0]
    logits[0, 1, 0] = logits[0, 4, 0] = logits[1, 2, 0] = 3  # so that these are the teacher's matches
    matched = {(0, 1): PAGES[0].boxes[0], (0, 4): PAGES[0].boxes[1], (1, 2): PAGES[1].boxes[0]}
    p = (teacher.edge_logits[-1] / 5).softmax(-1)
    kl = kl_of_edges(project(p, teacher.initial_boxes, W, student.initial_boxes, W), student.edge_logits, 5)
    sums = {True: 0, False: 0}
    for place in ((i, q) for i in range(2) for q in range(5)):
        truth = matched.get(place)
        weight = logits[place].sigmoid().max() if truth is None else iou(boxes[place], truth)
        sums[truth is not None] += weight * kl[:, *place] / 4
    expected = (sums[True] / 3 * sqrt(3) + sums[False] / 7 * sqrt(7)) / (sqrt(3) + sqrt(7))
    torch.testing.assert_close(edges(student, teacher, 5, PAGES), expected)


def test_go_lsd_leads_the_student_to_the_teachers_boxes_whatever_its_frame_and_bins():
    """Edge logits that minimise it, in the student's own frame of 12 bins, decode to the teacher's boxes."""
    torch.manual_seed(0)
    w = weighting_function(12, 0.6, 0.3)
    teacher, student = refinement(layers=1), refinement(bins=12, w=w)
    frame = teacher.initial_boxes * torch.tensor([1, 1, 1.3, 1.3], dtype=torch.float64)
    edge_logits = torch.zeros_like(student.edge_logits, requires_grad=True)
    optimizer = torch.optim.Adam([edge_logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        own = student._replace(edge_logits=edge_logits, initial_boxes=frame)
        edges(own, teacher, 1.0, PAGES, w).sum().backward()
        optimizer.step()
    boxes = decode(frame, expectation(edge_logits.detach(), w))
    assert iou(boxes, teacher.boxes.expand_as(boxes)).min() > 0.97


def test_why_the_temperature_is_1():
    """A student that agrees with the softened distribution at T = 5, and is then read at T = 1, has another box."""
    torch.manual_seed(0)
    frame, w = random_boxes(200), weighting_function(32, 0.5, 0.25)
    new = decode(frame, 0.2 * torch.rand_like(frame) - 0.1)
    edge_logits = torch.randn(200, 4, 33, dtype=torch.float64) - 10 * (w - 0.1).abs()
    box = decode(frame, expectation(edge_logits, w))

    def agreeing(temperature: float) -> Tensor:
        p = project((edge_logits / temperature).softmax(-1), frame, w, new, w)
        return iou(decode(new, expectation(temperature * p.clamp(min=1e-30).log(), w)), box).mean()

    assert agreeing(1) > 0.999
    assert agreeing(5) < 0.9


# What counts, and when


def test_every_term_has_its_weight_times_alpha():
    config = DistillConfig(
        alpha=0.5,
        classes=ClassDistillConfig(weight=2),
        boxes=BoxDistillConfig(weight=3),
        go_lsd=GoLsdConfig(weight=4),
    )
    assert active(config, epoch=0) == {"class": 1, "box": 1.5, "go_lsd": 2, "cell_class": 0.5, "memory": 1}


def test_terms_without_weight_are_left_out():
    assert active(DistillConfig(alpha=0), epoch=0) == {}
    without_boxes = DistillConfig(boxes=BoxDistillConfig(weight=0))
    assert active(without_boxes, epoch=0).keys() == {"class", "go_lsd", "cell_class", "memory"}


def test_go_lsd_waits_for_its_epoch():
    config = DistillConfig(go_lsd=GoLsdConfig(start_epoch=1.5))
    assert [epoch for epoch in (0, 1, 1.49, 1.5, 2) if "go_lsd" in active(config, epoch)] == [1.5, 2]


def test_shared_and_denoising_weigh_the_three_terms_of_their_queries():
    config = DistillConfig(
        shared=0.5, denoising=2, cells=CellsDistillConfig(classes=0), memory=MemoryDistillConfig(weight=0)
    )
    once = {"class": 1, "box": 5, "go_lsd": 1.5}
    expected = {term: 0.5 * weight for term, weight in once.items()}
    assert active(config, epoch=0) == expected | {f"{term}_denoising": 2 * weight for term, weight in once.items()}


def test_cells_and_memory_fade_linearly_until_their_epoch():
    config = DistillConfig(
        shared=0, cells=CellsDistillConfig(boxes=5, end_epoch=4), memory=MemoryDistillConfig(weight=2, end_epoch=2)
    )
    assert active(config, epoch=0) == {"cell_class": 1, "cell_box": 5, "memory": 2}
    assert active(config, epoch=1) == {"cell_class": 0.75, "cell_box": 3.75, "memory": 1}
    assert active(config, epoch=2) == {"cell_class": 0.5, "cell_box": 2.5}
    assert active(config, epoch=4) == active(config, epoch=9) == {}
    assert active(DistillConfig(), epoch=1000)["cell_class"] == 1


def test_weights_scale_their_own_terms_and_the_rest_is_not_computed():
    student, teacher = answers()
    once = losses(student, teacher)
    assert {name: tuple(loss.shape) for name, loss in once.items()} == dict.fromkeys(
        ("distill_class", "distill_box", "distill_go_lsd"), (3,)
    )
    for term in EVERY:
        twice = distillation(*as_outputs(student, teacher), W, W, PAGES, {term: 2.0}, CONFIG, MATCHER)
        assert twice.keys() == {f"distill_{term}"}
        torch.testing.assert_close(twice[f"distill_{term}"], 2 * once[f"distill_{term}"])


# Empty pages, several processes, what goes wrong


def test_empty_pages_are_distilled_like_others_and_nothing_is_nan():
    student, teacher = answers()
    edge_logits = student.edge_logits.requires_grad_()
    terms = losses(student, teacher, [page(), page()])
    assert all((term > 0).all() for term in terms.values())
    assert torch.autograd.grad(terms["distill_go_lsd"].sum(), edge_logits)[0].isfinite().all()


def test_on_pages_without_boxes_classes_are_divided_by_what_the_teacher_finds_there():
    student, teacher = answers()
    found = [int((scores > 0.5).sum()) for scores in teacher.logits[-1].sigmoid().amax(-1)]
    assert min(found) > 0
    annotated = [page(*[[0.5, 0.5, 0.2, 0.2]] * count) for count in found]
    torch.testing.assert_close(
        losses(student, teacher, [annotated[0], page()])["distill_class"],
        losses(student, teacher, annotated)["distill_class"],
    )


def test_where_the_teacher_matches_nothing_go_lsd_is_the_mean_over_all_queries():
    student, teacher = answers()
    p = (teacher.edge_logits[-1] / 5).softmax(-1)
    kl = kl_of_edges(project(p, teacher.initial_boxes, W, student.initial_boxes, W), student.edge_logits, 5)
    mean = (kl / 4 * teacher.logits[-1].sigmoid().amax(-1)).mean((1, 2))
    torch.testing.assert_close(edges(student, teacher, 5.0, [page(), page()]), mean)


def test_equal_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch):
    student, teacher = answers()
    alone = losses(student, teacher)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda count: 3 * count)
    torch.testing.assert_close(losses(student, teacher), alone)


def test_beside_a_process_without_boxes_each_box_counts_twice(monkeypatch: pytest.MonkeyPatch):
    student, teacher = answers()
    alone = losses(student, teacher)["distill_class"]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda count: count)
    torch.testing.assert_close(losses(student, teacher)["distill_class"], 2 * alone)


def test_a_teacher_that_answers_nan_is_stopped_with_the_image():
    student, teacher = answers()
    teacher.logits[-1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the teacher's answer: .* image 7"):
        losses(student, teacher, [PAGES[0], PAGES[1]._replace(image_id=7)])


# Denoising queries


def test_denoising_queries_are_compared_like_the_teachers():
    """Two pages of at most two boxes, one group: four slots, of which the second page's box leaves two empty."""
    student, teacher = answers()
    labels = torch.tensor([[0, 1, 0, 1], [2, 3, 2, 3]])  # 3: an empty slot
    start = NoisedTruth(labels, torch.zeros(2, 4, 4), groups=1)
    both = []
    for output in (student, teacher):
        four = Refinement(*(x[:, :, :4] for x in output[:3]), output.initial_boxes[:, :4])
        both.append(DFineOutput(output, None, denoising=Denoising(four, None, start)))
    weights = {f"{term}_denoising": weight for term, weight in EVERY.items()}
    terms = distillation(*both, W, W, PAGES, weights, CONFIG, MATCHER)
    assert terms.keys() == {"distill_class_denoising", "distill_box_denoising", "distill_go_lsd_denoising"}

    valid, (ours, theirs) = labels < 3, (output.denoising.refined for output in both)
    kl = sum(
        class_kl(theirs.logits[0, i, valid[i]][None], ours.logits[:, i, valid[i]][:, None], temperature=1)
        for i in (0, 1)
    )
    torch.testing.assert_close(terms["distill_class_denoising"], kl / 3)
    confidence = theirs.logits[0].sigmoid().amax(-1) * valid
    distance = box_distance(theirs.boxes[0], ours.boxes, confidence, squared=False) / confidence.sum()
    torch.testing.assert_close(terms["distill_box_denoising"], distance)
    fixed = Matches(None, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    theirs.logits[:, ~valid] = -1e4  # so that empty slots have no weight
    expected = go_lsd(ours, theirs, W, W, PAGES, 1.0, fixed, valid)
    torch.testing.assert_close(terms["distill_go_lsd_denoising"], expected)


# Memory cells


def cells(*valid: bool, classes: int = 3, width: int = 4) -> Cells:
    """Two pages with as many cells as there are values."""
    count = len(valid)
    shape, mask = (2, count), torch.tensor([valid] * 2)
    logits = torch.randn(*shape, classes, dtype=torch.float64)
    memory = torch.randn(*shape, width, dtype=torch.float64)
    return Cells(logits, random_boxes(*shape), random_boxes(*shape), mask, memory)


def of_cells(student: Cells, teacher: Cells, **weights: float) -> dict[str, Tensor]:
    outputs = [DFineOutput(None, None, cells=x) for x in (student, teacher)]
    return distillation(*outputs, W, W, PAGES, weights or dict.fromkeys(CELLS, 1.0), CONFIG, MATCHER)


def test_every_cell_learns_the_teachers_score_of_every_class():
    torch.manual_seed(0)
    student, teacher = cells(True, True), cells(True, True)
    loss = of_cells(student, teacher, cell_class=2.0)
    assert loss.keys() == {"distill_cell_class"}
    kl = class_kl(teacher.logits, student.logits[None], temperature=1)[0]
    torch.testing.assert_close(loss["distill_cell_class"], 2 * kl / 3)  # boxes


def test_boxes_and_memory_count_where_the_teacher_sees_something():
    """Sure of the first cell, sure that there is nothing in the second."""
    torch.manual_seed(0)
    student, teacher = cells(True, True), cells(True, True)
    teacher.logits[:, 0], teacher.logits[:, 1] = 100, -100
    losses = of_cells(student, teacher)
    first = (student.boxes - teacher.boxes).abs().sum(-1)[:, 0].mean()
    torch.testing.assert_close(losses["distill_cell_box"], first)
    normed = [torch.nn.functional.layer_norm(x.memory[:, 0], (4,)) for x in (student, teacher)]
    torch.testing.assert_close(losses["distill_memory"], (normed[0] - normed[1]).square().mean())


def test_cells_that_are_not_valid_have_no_part():
    torch.manual_seed(0)
    student, teacher = cells(True, False, True), cells(True, False, True)
    for x in (student.logits, student.boxes, student.memory):
        x.requires_grad_()
    losses = of_cells(student, teacher)
    kept = [Cells(*(x[:, ::2] for x in side)) for side in (student, teacher)]
    for name, loss in of_cells(*kept).items():
        torch.testing.assert_close(losses[name], loss)
    sum(losses.values()).backward()
    assert all((x.grad[:, 1] == 0).all() for x in (student.logits, student.boxes, student.memory))
    assert all((x.grad[:, ::2] != 0).any(-1).all() for x in (student.logits, student.boxes, student.memory))


def test_of_a_memory_neither_mean_nor_scale_matter():
    torch.manual_seed(0)
    memory, other = torch.randn(2, 3, 16).double(), torch.randn(2, 3, 16).double()
    weight = torch.ones(2, 3).double()
    assert memory_distance(memory, 5 * memory + 3, weight).item() == pytest.approx(0, abs=1e-4)
    assert memory_distance(memory, -memory, weight).item() == pytest.approx(6 * 4, rel=1e-3)
    torch.testing.assert_close(memory_distance(memory, other, 2 * weight), 2 * memory_distance(memory, other, weight))


def test_a_teacher_that_sees_nothing_on_any_page_teaches_boxes_and_memory_nothing():
    torch.manual_seed(0)
    student, teacher = cells(True, True), cells(False, False)
    assert all(loss == 0 for loss in of_cells(student, teacher).values())


# With models


WHOLE = DistillConfig(denoising=1, cells=CellsDistillConfig(boxes=5), memory=MemoryDistillConfig(weight=2))
TERMS = {f"distill_{term}" for term in (*TEACHER_QUERIES, *DENOISING, *CELLS)}
ONE_EACH = [target([[0.3, 0.3, 0.2, 0.2]]), target([[0.6, 0.5, 0.4, 0.2]])]


def batch(targets: list[Target] = ONE_EACH) -> Batch:
    """Two pages, of which the second is smaller than the canvas."""
    torch.manual_seed(2)
    return Batch(torch.rand(2, 3, 64, 96), torch.tensor([[64, 96], [40, 50]]), targets)


def both(
    student: DFine, teacher: DFine, config: DistillConfig = WHOLE, targets: list[Target] = ONE_EACH
) -> tuple[DFineOutput, DFineOutput]:
    """The student's output and the teacher's; the projection between their memories changes nothing."""
    pages, start, weights = batch(targets), noised(targets), active(config, 0)
    projection = memory_projection(student, teacher)
    nn.init.eye_(projection.weight)
    nn.init.zeros_(projection.bias)
    taught = teacher_forward(teacher, pages, start, weights)
    return student_forward(student, projection, pages, start, taught, weights), taught


def distilled(
    student: DFine, teacher: DFine, config: DistillConfig = WHOLE, targets: list[Target] = ONE_EACH
) -> dict[str, Tensor]:
    outputs, w = both(student, teacher, config, targets), (student.decoder.w, teacher.decoder.w)
    return distillation(*outputs, *w, targets, active(config, 0), config, MATCHER)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
    """In evaluation mode, where both answer with their last layers."""
    model = shaken(tiny_model()).eval()
    for kind, boxes in (("kl", "l1"), ("mse", "mse")):
        same = {"classes": ClassDistillConfig(loss=kind), "boxes": BoxDistillConfig(loss=boxes)}
        terms = distilled(model, model, WHOLE.model_copy(update=same))
        assert {name: loss.sum().item() for name, loss in terms.items()} == {
            name: pytest.approx(0, abs=1e-5) for name in TERMS
        }
    other = distilled(shaken(tiny_model(), 0.2).eval(), model)
    assert all(loss.item() > 1e-3 for loss in other.values())


def test_both_models_have_the_same_cells_anchors_and_page_frames():
    """Whatever their widths; the student is in training mode, the teacher sees each page on a canvas of its own."""
    student, teacher = DFine(narrow(), 3), shaken(tiny_model()).eval()
    ours, theirs = (output.cells for output in both(student, teacher))
    assert torch.equal(ours.anchors, theirs.anchors)
    assert torch.equal(ours.valid, theirs.valid)
    assert ours.memory.shape == theirs.memory.shape  # as projected


def test_what_is_not_compared_is_not_computed(monkeypatch: pytest.MonkeyPatch):
    """The decoder's second pass, the teacher's denoising queries, the answers of every cell, the projection."""
    student, teacher = tiny_model(), shaken(tiny_model()).eval()
    calls = []
    decoder = student.decoder.forward
    monkeypatch.setattr(student.decoder, "forward", lambda *a, **k: calls.append("decoder") or decoder(*a, **k))
    queries_alone = DistillConfig(cells=CellsDistillConfig(classes=0), memory=MemoryDistillConfig(weight=0))
    for config, passes in ((queries_alone, 2), (WHOLE, 2), (WHOLE.model_copy(update={"shared": 0.0}), 1)):
        calls.clear()
        output, taught = both(student, teacher, config)
        assert len(calls) == passes
        assert (output.on_teacher_queries is None) == (passes == 1)
        assert (output.cells is None) == (taught.cells is None) == (config is queries_alone)
        assert (taught.denoising is None) == (config is queries_alone)
    memory_alone = DistillConfig(shared=0, cells=CellsDistillConfig(classes=0), memory=MemoryDistillConfig(weight=1))
    assert distilled(student, teacher, memory_alone).keys() == {"distill_memory"}
    assert teacher_forward(teacher, batch(), None, {}) is None


def test_gradients_never_reach_the_teacher():
    """Even if nobody froze it."""
    student, teacher = tiny_model(), shaken(tiny_model()).eval()
    terms = distilled(student, teacher)
    sum(loss.sum() for loss in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())


def test_the_teacher_alone_teaches_the_student_also_from_pages_without_boxes():
    """As with beta = 0: every parameter gets a gradient, those of encoder and query selection one that moves them."""
    student, teacher, empty = shaken(tiny_model(), 0.2), shaken(tiny_model()).eval(), [target([])] * 2
    outputs, w = both(student, teacher, targets=empty), (student.decoder.w, teacher.decoder.w)
    terms = distillation(*outputs, *w, empty, active(WHOLE, 0), WHOLE, MATCHER)
    assert terms.keys() == TERMS
    assert all(loss.isfinite().all() for loss in terms.values())
    own = criterion(outputs[0], empty, w[0], LOSS)
    sum(loss.sum() for loss in (*terms.values(), *(0 * loss for loss in own.values()))).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []
    assert all((grad != 0).any() for name, grad in gradients.items() if name.startswith(("encoder", "selection")))


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({}, inf),
        ({"shared": 0, "cells": {"end_epoch": 2}, "memory": {"end_epoch": 0.5}}, 2),
        ({"shared": 0, "cells": {"end_epoch": 0.2}, "memory": {"end_epoch": 0.5}}, 0.5),
        ({"shared": 0, "cells": {"classes": 0}, "memory": {"end_epoch": 0.5}}, 0.5),
        ({"shared": 0, "cells": {"end_epoch": 2}, "memory": {}}, inf),
        ({"shared": 0, "denoising": 1, "cells": {"end_epoch": 2}, "memory": {"weight": 0}}, inf),
        ({"alpha": 0}, 0),
    ],
)
def test_when_the_last_term_ends(changes: dict[str, Any], end: float):
    assert end_epoch(DistillConfig.model_validate(changes)) == end


def test_the_truth_teaches_nothing_on_pages_without_boxes():
    """Which may hold everything and wait for their annotations: the losses are those of the other pages."""
    student, teacher = shaken(tiny_model()), shaken(tiny_model(), 0.2).eval()
    targets = [target([[0.3, 0.3, 0.2, 0.2]]), target([])]
    output, _ = both(student, teacher, targets=targets)
    answers = [x for head in (output.refined, output.denoising.refined) for x in (head.logits, head.edge_logits)]
    first = output.denoising.initial.logits
    for answer in (*answers, first):
        answer.retain_grad()
    own = criterion(on_labelled_pages(output, targets), targets, student.decoder.w, LOSS)

    def first_page(refined: Refinement) -> Refinement:
        return Refinement(*(x[:, :1] for x in refined[:3]), refined.initial_boxes[:1])

    noised = output.denoising.queries
    alone = output._replace(
        refined=first_page(output.refined),
        initial=Prediction(*(x[:1] for x in output.initial)),
        encoder=Prediction(*(x[:1] for x in output.encoder)),
        queries=Queries(*(x[:1] for x in output.queries)),
        denoising=Denoising(
            first_page(output.denoising.refined),
            Prediction(*(x[:1] for x in output.denoising.initial)),
            NoisedTruth(noised.labels[:1], noised.boxes[:1], noised.groups),
        ),
    )
    expected = criterion(alone, targets[:1], student.decoder.w, LOSS)
    assert own.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(own[name], loss)
    sum(loss.sum() for loss in own.values()).backward()
    for answer in answers:
        assert (answer.grad[:, 0] != 0).any()
        assert (answer.grad[:, 1] == 0).all()
    assert (first.grad[0] != 0).any()
    assert (first.grad[1] == 0).all()


def test_what_the_teacher_finds_on_pages_without_boxes_does_not_count_for_denoising_queries():
    student, teacher = shaken(tiny_model()), shaken(tiny_model(), 0.2).eval()
    targets, w = [target([[0.3, 0.3, 0.2, 0.2]]), target([])], (student.decoder.w, teacher.decoder.w)
    output, taught = both(student, teacher, targets=targets)
    sure = taught._replace(refined=taught.refined._replace(logits=torch.full_like(taught.refined.logits, 5)))
    weights = dict.fromkeys(DENOISING, 1.0)
    found = distillation(output, sure, *w, targets, weights, WHOLE, MATCHER)
    torch.testing.assert_close(found, distillation(output, taught, *w, targets, weights, WHOLE, MATCHER))


def test_where_no_page_has_boxes_the_truth_teaches_nothing_at_all():
    student, empty = shaken(tiny_model()), [target([]), target([])]
    output, _ = both(student, shaken(tiny_model(), 0.2).eval(), targets=empty)
    own = criterion(on_labelled_pages(output, empty), empty, student.decoder.w, LOSS)
    assert all((loss == 0).all() for loss in own.values())
    sum(loss.sum() for loss in own.values()).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is not None and (gradient != 0).any()] == []


def test_the_ordinary_losses_do_not_notice_the_teacher():
    student, teacher = shaken(tiny_model()), shaken(tiny_model(), 0.2).eval()
    targets = [target([[0.3, 0.3, 0.2, 0.2]]), target([])]
    shared, _ = both(student, teacher, targets=targets)
    pages, noise = batch(targets), noised(targets)
    plain = criterion(student(pages.images, pages.sizes, noise), targets, student.decoder.w, LOSS)
    for name, loss in criterion(shared, targets, student.decoder.w, LOSS).items():
        torch.testing.assert_close(loss, plain[name])


def narrow() -> ModelConfig:
    small = tiny_config(layers=2, queries=5, bins=6, a=0.6, heads=2)
    return ModelConfig(**dict(small) | {"hidden_dim": 16, "encoder": small.encoder.model_copy(update={"heads": 2})})


def test_any_widths_layers_queries_and_bins_go_together():
    torch.manual_seed(0)
    terms = distilled(shaken(DFine(narrow(), 3)), shaken(tiny_model()).eval())
    assert terms.keys() == TERMS
    of_layers = {name for name, loss in terms.items() if loss.shape == (2,)}
    assert of_layers == {f"distill_{term}" for term in (*TEACHER_QUERIES, *DENOISING)}
    assert all(loss.isfinite().all() for loss in terms.values())


def test_losses_are_in_single_precision_under_autocast():
    student, teacher = tiny_model(), shaken(tiny_model()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = both(student, teacher)
    w = (student.decoder.w, teacher.decoder.w)
    terms = distillation(*outputs, *w, ONE_EACH, active(WHOLE, 0), WHOLE, MATCHER)
    assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in terms.values())


def test_autocast_changes_no_loss():
    student, teacher = tiny_model(), shaken(tiny_model()).eval()
    arguments = (*both(student, teacher), student.decoder.w, teacher.decoder.w, ONE_EACH, active(WHOLE, 0), WHOLE)
    plain = distillation(*arguments, MATCHER)
    with torch.autocast("cpu", torch.bfloat16):
        cast = distillation(*arguments, MATCHER)
    for name, loss in plain.items():
        torch.testing.assert_close(cast[name], loss, msg=name)


def test_a_student_learns_from_its_teacher_alone():
    """No truth, only the distilled terms, each of which falls; the teacher stays as it is."""
    teacher = shaken(tiny_model()).eval().requires_grad_(False)
    student = tiny_model(layers=2)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    history = []
    for _ in range(20):
        optimizer.zero_grad()
        terms = distilled(student, teacher)
        sum(loss.sum() for loss in terms.values()).backward()
        optimizer.step()
        history.append({name: loss.sum().item() for name, loss in terms.items()})
    for name, first in history[0].items():
        assert history[-1][name] < 0.8 * first, name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
