"""The criterion: who is supervised by what, and what sums are divided by. The losses themselves are tested elsewhere.

Most outputs are made up: three layers with boxes, scores and edges that know nothing of each other.
"""

from math import log

import pytest
import torch
from outputs import made_up, with_denoising
from tiny import noised, target, tiny_model
from torch import Tensor

from dfine import distributed
from dfine.boxes import iou, xyxy_to_cxcywh
from dfine.config import LossConfig, MatcherConfig
from dfine.losses.criterion import criterion, scheduled
from dfine.model.denoising import match_denoising
from dfine.model.detector import detect
from dfine.model.fdr import encode, weighting_function
from dfine.structures import DFineOutput, Prediction, Target

W = weighting_function(8, 0.5, 0.25)
CONFIG = LossConfig()


def page(*boxes: list[float], labels: list[int] | None = None) -> Target:
    return target(list(boxes), labels, dtype=torch.float64)


PAGES = [page([0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2], labels=[0, 2]), page([0.5, 0.5, 0.4, 0.2], labels=[1])]
EMPTY = [page(), page()]


def total(losses: dict[str, Tensor]) -> Tensor:
    return sum(term.sum() for term in losses.values())


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")


# The terms


@pytest.mark.parametrize(("end", "epoch", "queries"), [(0, 9, 4), (0.5, 0.4, 4), (0.5, 0.5, 1), (0.5, 2, 1)])
def test_encoder_queries_end_in_their_epoch_if_they_have_one(end: float, epoch: float, queries: int):
    config = LossConfig(vfl=2, matcher=MatcherConfig(l1=3, encoder_queries=4, encoder_queries_end_epoch=end))
    now = scheduled(config, epoch)
    assert now.matcher == config.matcher.model_copy(update={"encoder_queries": queries})
    assert now.model_copy(update={"matcher": config.matcher}) == config


def test_every_head_has_its_terms():
    losses = criterion(with_denoising(made_up(), most=2, groups=3), PAGES, W, CONFIG)
    lengths = {name: tuple(term.shape) for name, term in losses.items()}
    refined = {"vfl": (3,), "l1": (3,), "giou": (3,), "fgl": (3,), "ddf": (2,)}
    plain = {"vfl": (), "l1": (), "giou": ()}
    expected = refined | {f"{term}_denoising": shape for term, shape in refined.items()}
    for head in ("initial", "encoder", "denoising_initial"):
        expected |= {f"{term}_{head}": shape for term, shape in plain.items()}
    assert lengths == expected


@pytest.mark.parametrize("term", ["vfl", "l1", "giou", "fgl", "ddf"])
def test_each_weight_scales_its_own_terms(term: str):
    output = with_denoising(made_up(), most=2, groups=3)
    once = criterion(output, PAGES, W, CONFIG)
    twice = criterion(output, PAGES, W, LossConfig(**{term: 2 * getattr(CONFIG, term)}))
    for name in once:
        torch.testing.assert_close(twice[name], once[name] * (2 if name.split("_")[0] == term else 1))


def test_the_total_is_the_sum_of_the_terms_and_teaches_every_head():
    output = with_denoising(made_up(), most=2, groups=1)
    losses = criterion(output, PAGES, W, CONFIG)
    assert all((term > 0).all() for term in losses.values())
    leaves = [*output.refined[:3], *output.initial, *output.encoder]
    assert all((gradient != 0).any() for gradient in torch.autograd.grad(total(losses), leaves))


def test_one_layer_has_nobody_to_teach():
    losses = criterion(made_up(layers=1), PAGES, W, CONFIG)
    assert losses["ddf"].shape == (0,)
    assert total(losses).isfinite()


# Matching: a single page with a box that the heads find with different queries

TRUTH = [0.5, 0.5, 0.2, 0.2]
HIT, MISS = torch.tensor(TRUTH, dtype=torch.float64), torch.tensor([0.1, 0.1, 0.1, 0.1], dtype=torch.float64)


def disagreement(*found_by: int) -> DFineOutput:
    """Layers 1, 2, 3, the initial and the encoder head each have TRUTH at the given query and MISS elsewhere."""
    boxes = MISS.repeat(5, 1, 4, 1)
    for head, query in enumerate(found_by):
        boxes[head, 0, query] = HIT
    output, scores = made_up(pages=1, queries=4), torch.zeros(1, 4, 3, dtype=torch.float64)
    refined = output.refined._replace(boxes=boxes[:3], logits=scores.repeat(3, 1, 1, 1))
    return output._replace(refined=refined, initial=Prediction(scores, boxes[3]), encoder=Prediction(scores, boxes[4]))


def test_boxes_of_every_head_are_supervised_at_every_query_of_the_union():
    """Three heads find the box at query 0, two at query 2; so each head has one of two right, and |HIT - MISS| = 1."""
    losses = criterion(disagreement(0, 0, 2, 0, 2), [page(TRUTH)], W, CONFIG)
    for term in (*losses["l1"], losses["l1_initial"], losses["l1_encoder"]):
        assert term.item() == pytest.approx(5 * (0 + 1) / 2)


def test_a_query_that_no_cell_stands_for_is_not_matched():
    """It has the box in every head; whoever is matched instead is on MISS, and |HIT - MISS| = 1."""
    output = disagreement(0, 0, 0, 0, 0)
    valid = torch.tensor([[False, True, True, True]])
    losses = criterion(output._replace(queries=output.queries._replace(valid=valid)), [page(TRUTH)], W, CONFIG)
    assert losses["l1"].tolist() == pytest.approx([5, 5, 5])


def test_the_union_breaks_ties_by_the_last_decoder_layer():
    """Query 0 is on the first box (A) for layer 1 and the initial head, on the second (B) for layer 3 and the encoder
    head; query 1 the other way round. Layer 2 finds both with queries 2 and 3, where layer 3 has them as well."""
    a, b = HIT, torch.tensor([0.2, 0.8, 0.1, 0.1], dtype=torch.float64)
    output = disagreement(0, 0, 0, 0, 0)
    places = [[a, b, MISS, MISS], [MISS, MISS, a, b], [b, a, a, b], [a, b, MISS, MISS], [b, a, MISS, MISS]]
    *refined, initial, encoder = torch.stack([torch.stack(row) for row in places])[:, None]
    output.refined.boxes.copy_(torch.stack(refined))
    output.initial.boxes.copy_(initial)
    output.encoder.boxes.copy_(encoder)
    output.refined.logits[2, 0, :2] = 2  # layer 3 is surer of queries 0 and 1
    assert criterion(output, [page(a.tolist(), b.tolist())], W, CONFIG)["l1"][2] == 0


def test_classes_are_supervised_by_each_heads_own_matching():
    """Layer 1's score must rise at query 0 and at no other, whatever the other heads found."""
    output = disagreement(0, 2, 2, 2, 2)
    output.refined.logits.requires_grad_()
    criterion(output, [page(TRUTH, labels=[1])], W, CONFIG)["vfl"].sum().backward()
    rises = (output.refined.logits.grad < 0).nonzero().tolist()
    assert rises == [[0, 0, 0, 1], [1, 0, 2, 1], [2, 0, 2, 1]]


def test_a_score_learns_the_iou_of_its_own_heads_match():
    """The heads' boxes at the match overlap half with the truth: the gradient vanishes at probability 1/2."""
    output = disagreement(0, 0, 0, 0, 0)
    half = torch.tensor([0.5, 0.5, 0.2, 0.1], dtype=torch.float64)
    output.refined.boxes[1, 0, 0] = half
    output.refined.logits.requires_grad_()
    criterion(output, [page(TRUTH, labels=[1])], W, CONFIG)["vfl"].sum().backward()
    wish = output.refined.logits.grad[:, 0, 0, 1].tolist()
    assert wish == pytest.approx([-0.5, 0, -0.5])  # p - 1, weight 1; p - 1/2; p - 1


def test_vfl_is_divided_by_the_number_of_boxes():
    """Background of 4 queries and 3 classes costs 3/16 ln 2 each; with the match at IoU 1, which costs ln 2."""
    for boxes in (1, 2):
        output = disagreement(0, 0, 0, 0, 0)
        output.refined.boxes[:, 0, 1] = output.initial.boxes[:, 1] = output.encoder.boxes[:, 1] = HIT
        losses = criterion(output, [page(*[TRUTH] * boxes)], W, CONFIG)
        expected = (boxes + (12 - boxes) * 3 / 16) * log(2) / boxes
        assert losses["vfl"].tolist() == pytest.approx([expected] * 3)


def test_edges_learn_the_way_from_the_initial_box_to_the_truth():
    """Offsets of W(5) on the left and 0 elsewhere; distributions that are sure of just that cost nothing."""
    output = disagreement(0, 0, 0, 0, 0)
    wide = W[5].item()
    frame = torch.tensor([0.55, 0.5, 0.1, 0.2], dtype=torch.float64)  # 0.5 to 0.6 and 0.4 to 0.6
    output.refined.initial_boxes[0, 0] = frame
    truth = xyxy_to_cxcywh(torch.tensor([0.5 - wide * 0.1, 0.4, 0.6, 0.6], dtype=torch.float64))
    assert encode(frame, truth).tolist() == pytest.approx([wide, 0, 0, 0])
    sure = torch.full((4, 9), -100.0, dtype=torch.float64)
    sure[0, 5] = sure[1:, 4] = 0
    with torch.no_grad():
        output.refined.edge_logits[0, 0, 0] = sure
        output.refined.edge_logits[1, 0, 0] = 0
        output.refined.boxes[:, 0, 0] = truth
    losses = criterion(output, [page(truth.tolist())], W, CONFIG)
    assert losses["fgl"][0].item() == pytest.approx(0, abs=1e-6)
    assert losses["fgl"][1].item() == pytest.approx(0.15 * 4 * log(9))


def test_fgl_weighs_the_iou_of_the_layers_own_box():
    output = disagreement(0, 0, 0, 0, 0)
    with torch.no_grad():
        output.refined.edge_logits.zero_()
    output.refined.boxes[1, 0, 0] = torch.tensor([0.5, 0.5, 0.2, 0.1])  # half of the truth
    losses = criterion(output, [page(TRUTH)], W, CONFIG)
    assert losses["fgl"].tolist() == pytest.approx([0.15 * 4 * log(9) * weight for weight in (1, 0.5, 1)])


# Self-distillation


def test_the_teacher_does_not_learn_from_its_students():
    output = made_up()
    criterion(output, PAGES, W, CONFIG)["ddf"].sum().backward()
    assert (output.refined.edge_logits.grad[2] == 0).all()
    assert (output.refined.edge_logits.grad[:2] != 0).any()
    assert output.refined.logits.grad is None
    assert output.refined.boxes.grad is None  # neither do the scores and boxes that only weigh


def test_students_that_agree_with_the_last_layer_learn_nothing_from_it():
    output = made_up()
    agreed = output.refined.edge_logits[2:].expand(3, -1, -1, -1, -1)
    losses = criterion(output._replace(refined=output.refined._replace(edge_logits=agreed)), PAGES, W, CONFIG)
    assert losses["ddf"].tolist() == pytest.approx([0, 0])


def test_ddf_weighs_a_match_by_its_iou_and_the_rest_by_the_teachers_best_class():
    """Every query has the divergence of layer 1 from layer 3 in common, so only weights and means are left."""
    output = disagreement(0, 0, 0, 0, 0)
    output.refined.boxes[0, 0, 0] = torch.tensor([0.5, 0.5, 0.2, 0.1])  # IoU 1/2
    output.refined.logits[2, 0, 1:, 2] = torch.logit(torch.tensor([0.6, 0.7, 0.8], dtype=torch.float64))
    with torch.no_grad():
        output.refined.edge_logits.copy_(output.refined.edge_logits[:, :, :1, :1])
    unit = disagreement(0, 0, 0, 0, 0)
    unit.refined.edge_logits.data.copy_(output.refined.edge_logits)
    unit.refined.logits[2, 0, 1:, 2] = 100  # weights of 1
    once = criterion(unit, [page(TRUTH)], W, CONFIG)["ddf"][0].item()
    root = 3**0.5
    expected = once * (1 * 0.5 + root * 0.7) / (1 + root)
    assert criterion(output, [page(TRUTH)], W, CONFIG)["ddf"][0].item() == pytest.approx(expected)


# Denoising


def test_the_number_of_denoising_groups_does_not_change_their_losses():
    """Groups that answer alike: each of them is divided by the number of groups."""
    one = criterion(with_denoising(made_up(), most=2, groups=1), PAGES, W, CONFIG)
    close(criterion(with_denoising(made_up(), most=2, groups=5), PAGES, W, CONFIG), one)


def test_boxes_that_are_not_noised_neither_count_nor_dilute_what_is():
    """Of a page's two boxes the second is noised: as if the page had no other."""
    output = with_denoising(made_up(), most=1, groups=3)
    queries = output.denoising.queries._replace(chosen=[torch.tensor([1]), torch.tensor([0])])
    some = criterion(output._replace(denoising=output.denoising._replace(queries=queries)), PAGES, W, CONFIG)
    alone = criterion(output, [page([0.7, 0.6, 0.3, 0.2], labels=[2]), PAGES[1]], W, CONFIG)
    for name in ("vfl", "l1", "giou", "fgl"):
        torch.testing.assert_close(some[f"{name}_denoising"], alone[f"{name}_denoising"])


def test_positives_that_find_their_boxes_cost_no_box_loss():
    output = with_denoising(made_up(), most=2, groups=3)
    fixed, truth = match_denoising(PAGES, 3), torch.cat([p.boxes for p in PAGES])
    with torch.no_grad():
        output.denoising.refined.boxes[:, fixed.batch, fixed.query] = truth[fixed.target]
    losses = criterion(output, PAGES, W, CONFIG)
    assert losses["l1_denoising"].tolist() == [0, 0, 0]
    assert losses["giou_denoising"].tolist() == pytest.approx([0, 0, 0])
    assert losses["l1_denoising_initial"] > 0


def test_positives_keep_their_box_even_where_another_is_nearer():
    """The assignment is fixed: exchanging two positives' boxes costs, though matching would not mind."""
    output = with_denoising(made_up(), most=2, groups=1)
    with torch.no_grad():
        output.denoising.refined.boxes[:, 0, :2] = PAGES[0].boxes.flip(0)
        output.denoising.refined.boxes[:, 1, 0] = PAGES[1].boxes[0]
    distance = (PAGES[0].boxes[0] - PAGES[0].boxes[1]).abs().sum()
    losses = criterion(output, PAGES, W, CONFIG)
    assert losses["l1_denoising"].tolist() == pytest.approx([5 * 2 * distance.item() / 3] * 3)


def test_negatives_and_padded_slots_must_answer_nothing():
    """Two positives and two negatives a page; page 1 has one box, so its second positive is padding."""
    output = with_denoising(made_up(), most=2, groups=1)
    logits, boxes = output.denoising.refined[:2]
    with torch.no_grad():
        boxes[:, 0] = PAGES[0].boxes.repeat(2, 1)  # everyone is on a box
        boxes[:, 1] = PAGES[1].boxes
    criterion(output, PAGES, W, CONFIG)["vfl_denoising"].sum().backward()
    raised = {(page, query) for _, page, query, _ in (logits.grad < 0).nonzero().tolist()}
    assert raised == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize(("queries", "negatives_count"), [(2, False), (20, True)])
def test_ddf_of_denoising_queries_is_combined_by_the_counts_of_the_matching_queries(
    queries: int, negatives_count: bool
):
    """As in the original. Where each matching query has a box, only the denoising queries with a box count."""
    output = with_denoising(made_up(pages=1, queries=queries), most=2, groups=1)
    with torch.no_grad():
        output.denoising.refined.boxes[:, 0, :2] = PAGES[0].boxes
    before = criterion(output, PAGES[:1], W, CONFIG)["ddf_denoising"]
    with torch.no_grad():
        output.denoising.refined.edge_logits[0, :, 2:] *= 2  # the negatives of layer 1
    after = criterion(output, PAGES[:1], W, CONFIG)["ddf_denoising"]
    assert before[0] > 0.01
    assert (after[0].item() != pytest.approx(before[0].item())) == negatives_count


# Empty pages


def test_an_empty_page_teaches_scores_alone():
    output = made_up()
    losses = criterion(output, [PAGES[0], EMPTY[1]], W, LossConfig(ddf=0))
    total(losses).backward()
    assert (output.refined.logits.grad[:, 1] > 0).all()
    assert (output.refined.boxes.grad[:, 1] == 0).all()
    assert (output.refined.edge_logits.grad[:, 1] == 0).all()
    assert (output.refined.boxes.grad[:, 0] != 0).any()


def test_a_wholly_empty_batch_costs_background_and_distillation_and_nothing_is_nan():
    output = with_denoising(made_up(), most=0, groups=100)
    losses = criterion(output, EMPTY, W, CONFIG)
    assert all(term.isfinite().all() for term in losses.values())
    assert {name for name, term in losses.items() if (term != 0).any()} == {
        "vfl", "vfl_initial", "vfl_encoder", "ddf",
    }  # fmt: skip
    leaves = [*output.refined[:3], *output.initial, *output.encoder]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total(losses), leaves))


def test_without_boxes_sums_are_divided_by_one():
    """Background of 2 pages, 6 queries, 3 classes at p = 1/2."""
    output = made_up()
    with torch.no_grad():
        output.refined.logits.zero_()
    losses = criterion(output, EMPTY, W, CONFIG)
    assert losses["vfl"].tolist() == pytest.approx([36 * 3 / 16 * log(2)] * 3)


# Several processes: gradients are averaged over them, so everything is divided by counts per process


def processes(monkeypatch: pytest.MonkeyPatch, count: int, others: list[float] | None = None) -> None:
    """Pretends to be one of several processes; the others have the same counts unless given."""

    def sum_over_processes(counts: Tensor) -> Tensor:
        return counts * count if others is None else counts + counts.new_tensor(others)

    monkeypatch.setattr(distributed, "world_size", lambda: count)
    monkeypatch.setattr(distributed, "sum_over_processes", sum_over_processes)


def test_equal_processes_give_what_one_gives(monkeypatch: pytest.MonkeyPatch):
    output = with_denoising(made_up(), most=2, groups=3)
    alone = criterion(output, PAGES, W, CONFIG)
    processes(monkeypatch, 3)
    close(criterion(output, PAGES, W, CONFIG), alone)


def test_beside_a_process_without_boxes_each_box_counts_twice(monkeypatch: pytest.MonkeyPatch):
    """So that their mean is the loss of all pages together."""
    alone = criterion(made_up(), PAGES, W, CONFIG)
    processes(monkeypatch, 2, others=[0, 0, 12, 0, 0])
    beside = criterion(made_up(), PAGES, W, CONFIG)
    for name in ("vfl", "l1", "giou", "fgl", "l1_initial", "vfl_encoder"):
        torch.testing.assert_close(beside[name], 2 * alone[name])


# What goes wrong


def test_a_model_that_answers_nan_is_stopped_with_the_image():
    output = made_up()
    with torch.no_grad():
        output.refined.logits[1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"head 1 .* image 7"):
        criterion(output, [PAGES[0], PAGES[1]._replace(image_id=7)], W, CONFIG)


def test_the_matching_weights_are_the_configs():
    """Matching by class alone takes the best score, by place alone the best box."""
    output = disagreement(0, 0, 0, 0, 0)
    output.refined.logits[:, 0, 3, 1] = 3
    truth = [page(TRUTH, labels=[1])]
    for matcher, query in ((MatcherConfig(classes=1, l1=0, giou=0), 3), (MatcherConfig(classes=0), 0)):
        refined = output.refined._replace(logits=output.refined.logits.detach().clone().requires_grad_())
        criterion(output._replace(refined=refined), truth, W, LossConfig(matcher=matcher))["vfl"].sum().backward()
        at_match = refined.logits.grad[0, 0, :, 1]
        assert at_match.argmin() == query


# All of it


def drawn_pages() -> tuple[Tensor, list[Target]]:
    """Two pages of 64x96 with three coloured rectangles."""
    images, pages = torch.full((2, 3, 64, 96), 255, dtype=torch.uint8), []
    colours = torch.tensor([[200, 30, 30], [30, 160, 30], [30, 30, 200]], dtype=torch.uint8)
    for image, drawn in zip(images, ({0: (8, 8, 40, 24), 1: (56, 16, 88, 56)}, {2: (16, 40, 80, 56)}), strict=True):
        for label, (x1, y1, x2, y2) in drawn.items():
            image[:, y1:y2, x1:x2] = colours[label, :, None, None]
        corners = torch.tensor(list(drawn.values())) / torch.tensor([96, 64, 96, 64])
        pages.append(target(xyxy_to_cxcywh(corners).tolist(), list(drawn)))
    return images, pages


def test_a_tiny_model_learns_one_batch_by_heart():
    images, pages = drawn_pages()
    model = tiny_model(layers=2, queries=60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=80, pct_start=0.1)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        output = model(images, noised=noised(pages, queries=8))
        loss = total(criterion(output, pages, model.decoder.w, CONFIG))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]

    with torch.no_grad():
        found = detect(model.eval()(images), [(64, 96)] * 2)
    for detections, truth in zip(found, pages, strict=True):
        best = {label: i for i, label in reversed(list(enumerate(detections.labels[: len(truth.labels)].tolist())))}
        assert best.keys() == set(truth.labels.tolist())  # the surest detections are of the right classes
        boxes = detections.boxes[[best[label] for label in truth.labels.tolist()]]
        fractions = xyxy_to_cxcywh(boxes / torch.tensor([96, 64, 96, 64]))
        assert iou(fractions, truth.boxes).min() > 0.8


def test_where_no_query_is_matched_ddf_is_the_mean_over_the_others():
    """An empty group has no share in it: clamped to one, it would take part of the weight."""
    output = made_up()
    logits, _, edges = output.refined[:3]
    p = (edges[-1] / CONFIG.temperature).softmax(-1)
    log_p = [(x / CONFIG.temperature).log_softmax(-1) for x in edges[:-1]]
    kl = torch.stack([CONFIG.temperature**2 * (p * (p.log() - x)).sum((-1, -2)) / 4 for x in log_p])  # (2, B, Q)
    mean = (kl * logits[-1].sigmoid().amax(-1)).mean((1, 2))
    torch.testing.assert_close(criterion(output, EMPTY, W, CONFIG)["ddf"], CONFIG.ddf * mean)
