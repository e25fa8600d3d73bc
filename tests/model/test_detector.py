"""The whole detector: pages in, boxes out. Most pages are 64x96: 8x12, 4x6 and 2x3 cells of strides 8, 16 and 32."""

import copy
from math import log, sqrt

import pytest
import torch
from tiny import anchor, noised, same, shaken, target, tiny_model, trained
from torch import Tensor, nn

from dfine.config import LossConfig
from dfine.losses.criterion import criterion
from dfine.model.detector import attended_to, detect
from dfine.model.fdr import decode, expectation
from dfine.model.query_selection import gather
from dfine.structures import DFineOutput, Queries, Refinement, Target

WITH_BOXES, EMPTY = target([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]], labels=[0, 2]), target([])


def pages(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    """uint8 noise."""
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def xavier_uniform(weight: Tensor) -> bool:
    bound = sqrt(6 / (weight.shape[0] + weight.shape[1]))
    return bool(weight.abs().max() <= bound) and weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)


# Before training


def test_at_step_0_every_layers_box_is_the_initial_box_is_the_proposal_is_the_anchor():
    output = tiny_model()(pages())
    anchors = torch.tensor([[anchor(cell, 64, 96) for cell in page] for page in output.queries.cells.tolist()])
    torch.testing.assert_close(output.queries.proposal, anchors)
    torch.testing.assert_close(output.encoder.boxes, anchors)
    torch.testing.assert_close(output.initial.boxes, anchors)
    torch.testing.assert_close(output.refined.initial_boxes, anchors)
    torch.testing.assert_close(output.refined.boxes, anchors.expand(3, 2, 8, 4))


def test_at_step_0_a_cell_belongs_to_each_class_with_one_percent():
    bias = tiny_model().selection.class_head.bias
    assert bias.tolist() == pytest.approx([-log(99)] * 3)


def test_query_selection_and_decoder_input_projections_start_xavier_uniform():
    model = tiny_model(encoder_dim=16)  # narrower than the decoder, so that there are projections
    assert xavier_uniform(model.selection.project.weight)
    assert len(model.projections) == 3
    assert all(xavier_uniform(projection[0].weight.flatten(1)) for projection in model.projections)


def test_where_encoder_and_decoder_are_equally_wide_there_is_no_projection():
    assert not list(tiny_model().projections.parameters())


def test_denoising_labels_start_as_unit_noise_and_zero_for_padding():
    embedding = tiny_model(classes=200).denoising_labels.weight
    assert embedding.shape == (201, 32)
    assert embedding[:200].std().item() == pytest.approx(1, abs=0.05)
    assert (embedding[200] == 0).all()


def test_the_content_of_padded_slots_stays_zero():
    model = trained()
    output = model(pages(), noised=noised([WITH_BOXES, EMPTY]))
    output.denoising.refined.logits.sum().backward()
    assert (model.denoising_labels.weight.grad[3] == 0).all()
    assert (model.denoising_labels.weight.grad[:3] != 0).any()


# What comes out


def test_training_answers_with_all_heads():
    output = tiny_model()(pages(), noised=noised([WITH_BOXES] * 2))
    assert output.refined.logits.shape == (3, 2, 8, 3)
    assert output.refined.boxes.shape == (3, 2, 8, 4)
    assert output.refined.edge_logits.shape == (3, 2, 8, 4, 9)
    assert output.initial.logits.shape == output.encoder.logits.shape == (2, 8, 3)
    assert output.denoising.refined.logits.shape == (3, 2, 2 * 2 * 2, 3)  # 2 groups of 2 positives and 2 negatives
    assert output.denoising.initial.boxes.shape == (2, 8, 4)
    assert output.denoising.refined.initial_boxes.shape == (2, 8, 4)


def test_evaluation_answers_with_the_last_layer_alone_and_it_is_the_same():
    model = trained()
    training = model(pages())
    evaluation = model.eval()(pages())
    assert evaluation.initial is None
    assert evaluation.encoder is None
    assert len(evaluation.refined.logits) == 1
    torch.testing.assert_close(evaluation.refined.logits[0], training.refined.logits[-1])
    torch.testing.assert_close(evaluation.refined.boxes[0], training.refined.boxes[-1])
    torch.testing.assert_close(evaluation.refined.edge_logits[0], training.refined.edge_logits[-1])


def test_evaluation_computes_nothing_that_the_last_layer_does_not_need():
    model, called = trained(), set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(pages())
    training = set(called)
    called.clear()
    model.eval()(pages())
    spared = {name.removesuffix(".mlp") for name in training - called if not name[-1].isdigit() or name.count(".") == 2}
    assert spared == {f"decoder.{part}.{layer}" for part in ("class_heads", "lqe") for layer in (0, 1)}


def test_pages_are_answered_apart_in_evaluation():
    model = trained().eval()
    together, alone = model(pages()).refined, model(pages()[1:]).refined
    torch.testing.assert_close(together.logits[:, 1:], alone.logits)
    torch.testing.assert_close(together.boxes[:, 1:], alone.boxes)


@torch.no_grad()
def test_in_evaluation_a_page_is_answered_as_alone_whatever_shape_its_neighbours_have():
    model = shaken(tiny_model()).eval()
    sizes = torch.tensor([[60, 90], [150, 40], [64, 96], [33, 200]])
    images = torch.randint(256, (4, 3, 160, 224), dtype=torch.uint8)
    together = model(images, sizes).refined
    for i, (height, width) in enumerate([(64, 96), (160, 64), (64, 96), (64, 224)]):
        alone = model(images[i : i + 1, :, :height, :width], sizes[i : i + 1]).refined
        torch.testing.assert_close(together.boxes[:, i : i + 1], alone.boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(together.logits[:, i : i + 1], alone.logits, atol=1e-3, rtol=0)


@torch.no_grad()
def test_in_evaluation_a_small_page_is_answered_as_alone_although_a_large_one_has_more_queries():
    """126 cells on the small page, 300 queries."""
    model = shaken(tiny_model(queries=300)).eval()
    sizes = torch.tensor([[64, 96], [160, 160]])
    images = torch.randint(256, (2, 3, 160, 160), dtype=torch.uint8)
    together = detect(model(images, sizes), [(64, 96), (160, 160)], top=2000)
    alone = detect(model(images[:1, :, :64, :96], sizes[:1]), [(64, 96)], top=2000)[0]
    assert [len(page.scores) for page in together] == [126 * 3, 300 * 3]
    for ours, theirs in zip(together[0], alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_on_a_page_too_thin_for_any_cell_nothing_is_found_and_nothing_learned():
    """Three pixels wide: the centre of its only column of cells lies beyond it."""
    model, sizes = trained(), torch.tensor([[64, 3], [64, 96]])
    output = model(pages(), sizes, noised([WITH_BOXES, EMPTY]))
    assert output.queries.valid.tolist() == [[False] * 8, [True] * 8]
    losses = criterion(output, [WITH_BOXES, EMPTY], model.decoder.w, LossConfig())
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        thin, full = detect(model.eval()(pages(), sizes), [(64, 3), (64, 96)])
    assert len(thin.scores) == 0
    assert len(full.scores) == 24


def test_a_page_without_a_single_real_query_has_something_to_attend_to():
    """Not every attention kernel answers where all is masked."""
    valid = torch.tensor([[True, False], [False, False]])
    assert attended_to(valid).tolist() == [[True, False], [True, True]]


def test_a_score_that_is_not_a_number_is_not_taken_for_none():
    [found] = detect(answer([[torch.nan], [-1e4], [0.0]], [[0.5] * 4] * 3), [(100, 100)])
    assert found.scores.isnan().tolist() == [True, False]


@pytest.mark.parametrize(("height", "width"), [(640, 480), (480, 640)])
def test_upright_and_lying_pages_work(height: int, width: int):
    model = tiny_model().eval()
    with torch.no_grad():
        output = model(pages(1, height, width))
    anchors = torch.tensor([[anchor(cell, height, width) for cell in output.queries.cells[0].tolist()]])
    torch.testing.assert_close(output.refined.boxes[0], anchors)


def test_two_strides_are_enough():
    output = tiny_model(strides=(16, 32), points=(2, 1))(pages())
    assert output.refined.boxes.shape == (3, 2, 8, 4)
    assert output.queries.cells.max() < 4 * 6 + 2 * 3


def test_boxes_and_scores_stay_in_single_precision_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        output = tiny_model()(pages(), noised=noised([WITH_BOXES] * 2))
    answers = (*output.refined, *output.initial, *output.encoder, *output.denoising.refined, *output.denoising.initial)
    assert {answer.dtype for answer in answers} == {torch.float32}


def test_autocast_rounds_no_box_and_no_position():
    """Each is what fp32 makes of the same features."""
    model, seen = trained().train(), {}
    heads = {"position": model.decoder.position, "initial": model.decoder.initial_box}
    heads |= {"encoder": model.selection.box_head, "edges": model.decoder.edge_heads[0]}
    for name, head in heads.items():
        head.register_forward_hook(lambda head, features, answer, name=name: seen.update({name: (features, answer)}))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pages(), SIZES, noised([WITH_BOXES] * 2))
    for name, head in copy.deepcopy(heads).items():
        (features,), answer = seen[name]
        torch.testing.assert_close(answer, nn.Sequential(*head)(features.float()), msg=name)
    for refined in (output.refined, output.denoising.refined):
        boxes = decode(refined.initial_boxes, expectation(refined.edge_logits, model.decoder.w))
        torch.testing.assert_close(refined.boxes, boxes, atol=1e-6, rtol=0)


def test_autocast_changes_no_loss():
    model = trained().train()
    output = model(pages(), SIZES, noised([WITH_BOXES, EMPTY]))
    plain = criterion(output, [WITH_BOXES, EMPTY], model.decoder.w, LossConfig())
    with torch.autocast("cpu", torch.bfloat16):
        cast = criterion(output, [WITH_BOXES, EMPTY], model.decoder.w, LossConfig())
    for name, loss in plain.items():
        torch.testing.assert_close(cast[name], loss, msg=name)


def test_ranking_leaves_autocast_no_weights_without_a_gradient():
    """Up to torch 2.10 it would use those that it cast under `no_grad` for the answer as well."""
    model, safe = trained(), []
    for layer in (model.selection.project, model.selection.class_head):
        layer.register_forward_pre_hook(
            lambda *_: safe.append(torch.is_grad_enabled() or not torch.is_autocast_cache_enabled())
        )
    with torch.autocast("cpu", torch.bfloat16):
        model(pages())
    assert safe == [True] * 4


@pytest.mark.parametrize("half", [False, True])
def test_the_selected_cells_teach_what_ranks_them(half: bool):
    """Ranking itself has no gradient; in half precision its cast weights must not be taken for those of the answer."""
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = model(pages())
    (output.encoder.logits.square().sum() + output.encoder.boxes.sum()).backward()
    selection = dict(model.selection.named_parameters())
    assert {name for name, weight in selection.items() if weight.grad is None} == set()
    assert all(weight.grad.abs().sum() > 0 for name, weight in selection.items() if not name.startswith("box_head"))


# Pixels


def test_bytes_and_fractions_are_the_same_page():
    model = trained().eval()
    same(model(pages()).refined, model(pages() / 255).refined)


def test_pages_are_normalised_by_the_models_mean_and_std():
    model = tiny_model()
    model.mean.fill_(0.5)
    model.std.fill_(0.25)
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert (model.normalise(white, None) == 2).all()
    assert {"mean", "std"} <= model.state_dict().keys()  # they travel with the weights


def test_padding_is_zero_after_normalisation():
    normalised = tiny_model().normalise(pages(1, 4, 4), torch.tensor([[3, 2]]))
    assert (normalised[..., :3, :2] != 0).all()
    assert (normalised[..., 3:, :] == 0).all()
    assert (normalised[..., 2:] == 0).all()


# Padding: everything is measured in the page's own frame

SIZES = torch.tensor([[64, 96], [40, 50]])  # the second page fills the upper left 5x7 (3x4, 2x2) cells


def test_no_sizes_means_that_pages_fill_the_canvas():
    model = trained()
    same(model(pages()).refined, model(pages(), torch.tensor([[64, 96]] * 2)).refined)


def test_what_is_in_the_padding_does_not_matter():
    model, other = trained(), pages()
    other[1, :, 40:], other[1, :, :, 50:] = 255, 0
    same(model(pages(), SIZES).refined, model(other, SIZES).refined)


def test_memory_of_padding_is_zero():
    model, seen = trained(), []
    model.selection.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0]))
    model(pages(), SIZES)
    finest = seen[0][:, : 8 * 12].unflatten(1, (8, 12))
    assert (finest[1, 5:] == 0).all()
    assert (finest[1, :, 7:] == 0).all()
    assert (finest[1, :5, :7] != 0).all()
    assert (finest[0] != 0).all()


# Who learns from whom


def test_the_decoder_does_not_teach_query_selection():
    """Content and reference are detached."""
    model = trained()
    output = model(pages())
    (output.refined.logits.sum() + output.refined.boxes.sum() + output.initial.boxes.sum()).backward()
    assert not output.queries.proposal.requires_grad
    assert all(parameter.grad is None for parameter in model.selection.parameters())
    assert model.backbone.body.stem_0.weight.grad.abs().max() > 0  # the memory is not detached


def test_the_encoder_head_teaches_query_selection():
    model = trained()
    output = model(pages())
    (output.encoder.logits.sum() + output.encoder.boxes.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.selection.parameters())


def gradients(targets: list[Target]) -> dict[str, Tensor | None]:
    model = trained()
    output = model(pages(), noised=noised(targets))
    sum(term.sum() for term in criterion(output, targets, model.decoder.w, LossConfig()).values()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_learns_from_pages_with_boxes():
    assert [name for name, grad in gradients([WITH_BOXES] * 2).items() if grad is None or (grad == 0).all()] == []


@pytest.mark.parametrize("targets", [[WITH_BOXES, EMPTY], [EMPTY, EMPTY]], ids=["partly empty", "wholly empty"])
def test_every_parameter_gets_a_finite_gradient_from_empty_pages(targets: list[Target]):
    """A process whose pages are blank must not leave the others waiting for its gradients."""
    assert [name for name, grad in gradients(targets).items() if grad is None or not grad.isfinite().all()] == []


# Every cell


@pytest.mark.parametrize("training", [True, False])
def test_asking_for_every_cell_changes_no_other_answer(training: bool):
    model = trained().train(training)
    plain, dense = model(pages(), SIZES), model(pages(), SIZES, dense=True)
    assert plain.cells is None
    same(dense.refined, plain.refined)
    assert torch.equal(dense.queries.cells, plain.queries.cells)
    assert torch.equal(dense.queries.valid, plain.queries.valid)
    if training:
        torch.testing.assert_close(dense.encoder, plain.encoder)
        torch.testing.assert_close(dense.encoder.logits, gather(dense.cells.logits, dense.queries.cells))


def test_every_cell_has_an_answer_an_anchor_and_its_memory():
    model = trained()
    cells = model(pages(), SIZES, dense=True).cells
    shapes = [tuple(x.shape) for x in cells]
    assert shapes == [(2, 126, 3), (2, 126, 4), (2, 126, 4), (2, 126), (2, 126, 32)]
    anchors, valid = model.selection.anchors([(8, 12), (4, 6), (2, 3)], SIZES, torch.zeros(1))
    assert torch.equal(cells.anchors, anchors)
    assert torch.equal(cells.valid, valid)
    assert 0 < valid[1].sum() < valid[0].sum()  # the second page is smaller


def test_pages_that_fill_the_canvas_have_one_answer_each():
    cells = trained()(pages(), dense=True).cells
    assert {x.shape[0] for x in cells} == {2}


def test_every_valid_cell_teaches_the_encoder_and_no_other_does():
    model = trained()
    cells = model(pages(), SIZES, dense=True).cells
    (gradient,) = torch.autograd.grad(cells.logits.sum() + cells.boxes.sum(), cells.memory)
    assert torch.equal((gradient != 0).any(-1), cells.valid)


def test_every_parameter_gets_a_gradient_where_every_cell_answers():
    model = trained()
    output = model(pages(), noised=noised([WITH_BOXES] * 2), dense=True)
    sum(term.sum() for term in criterion(output, [WITH_BOXES] * 2, model.decoder.w, LossConfig()).values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# Denoising and shared queries


def test_denoising_queries_do_not_change_the_matching_queries_answers():
    model = trained()
    plain, with_noise = model(pages()), model(pages(), noised=noised([WITH_BOXES] * 2))
    same(with_noise.refined, plain.refined)
    torch.testing.assert_close(with_noise.initial, plain.initial)
    torch.testing.assert_close(with_noise.encoder, plain.encoder)


def test_a_denoising_group_does_not_see_another():
    """Two groups of two positives and two negatives; the second group's labels change."""
    model, first = trained(), noised([WITH_BOXES] * 2)
    labels = first.labels.clone()
    labels[:, 4:] = (labels[:, 4:] + 1) % 3
    ours = model(pages(), noised=first).denoising.refined.logits
    theirs = model(pages(), noised=first._replace(labels=labels)).denoising.refined.logits
    torch.testing.assert_close(ours[:, :, :4], theirs[:, :, :4])
    assert (ours[:, :, 4:] - theirs[:, :, 4:]).abs().max() > 1e-3


def test_denoising_queries_start_from_the_noised_boxes():
    start = noised([WITH_BOXES] * 2)
    boxes = tiny_model()(pages(), noised=start).denoising.refined.boxes
    torch.testing.assert_close(boxes, start.boxes.clamp(1e-5, 1 - 1e-5).expand_as(boxes))


def test_another_models_queries_do_not_change_the_ordinary_answers():
    model = trained()
    theirs = Queries(torch.tensor([[3, 4, 5]] * 2), torch.full((2, 3, 4), 0.4), torch.ones(2, 3, dtype=torch.bool))
    plain, with_shared = model(pages()), model(pages(), teacher_queries=theirs)
    same(with_shared.refined, plain.refined)
    assert plain.on_teacher_queries is None
    assert with_shared.on_teacher_queries.logits.shape == (3, 2, 3, 3)


def test_shared_queries_are_answered_as_if_they_were_the_models_own():
    model = trained()
    output = model(pages())
    same(model(pages(), teacher_queries=output.queries).on_teacher_queries, output.refined)


def test_shared_queries_start_from_the_other_models_places():
    theirs = Queries(torch.tensor([[3, 4, 5]] * 2), torch.full((2, 3, 4), 0.4), torch.ones(2, 3, dtype=torch.bool))
    boxes = tiny_model()(pages(), teacher_queries=theirs).on_teacher_queries.boxes
    torch.testing.assert_close(boxes, torch.full_like(boxes, 0.4))


# Detections


def answer(logits: list[list[float]], boxes: list[list[float]]) -> DFineOutput:
    """Of one page, one layer."""
    unread = torch.zeros(0)
    refined = Refinement(torch.tensor(logits)[None, None], torch.tensor(boxes)[None, None], unread, unread)
    return DFineOutput(refined, Queries(unread, unread, unread))


def test_detections_are_the_best_pairs_of_query_and_class():
    """A query may answer with several classes; there is no suppression."""
    output = answer([[0.0, 2.0, -9.0], [-9.0, 1.0, -1.0]], [[0.5, 0.5, 0.2, 0.4], [0.25, 0.25, 0.5, 0.5]])
    [found] = detect(output, [(100, 200)], top=4)
    assert found.labels.tolist() == [1, 1, 0, 2]
    assert found.scores.tolist() == pytest.approx(torch.tensor([2.0, 1.0, 0.0, -1.0]).sigmoid().tolist())
    first, second = [80, 30, 120, 70], [0, 0, 100, 50]  # xyxy in pixels of a page 100 high and 200 wide
    for box, expected in zip(found.boxes.tolist(), (first, second, first, second), strict=True):
        assert box == pytest.approx(expected)


def test_detections_are_the_last_layers():
    earlier, last = answer([[5.0]], [[0.9, 0.9, 0.1, 0.1]]).refined, answer([[0.0]], [[0.5, 0.5, 0.5, 0.5]]).refined
    both = Refinement(*(torch.cat(pair) for pair in zip(earlier, last, strict=True)))
    [found] = detect(answer([[0.0]], [[0.0] * 4])._replace(refined=both), [(100, 100)])
    assert found.scores.tolist() == [0.5]
    assert found.boxes.tolist() == [[25, 25, 75, 75]]


def test_boxes_are_clipped_to_the_page():
    [found] = detect(answer([[0.0]], [[0.1, 0.9, 0.4, 0.4]]), [(100, 200)])
    assert found.boxes[0].tolist() == pytest.approx([0, 70, 60, 100])


def test_at_most_300_detections_are_kept():
    [found] = detect(answer([[0.0, 0.1]] * 200, [[0.5, 0.5, 0.2, 0.2]] * 200), [(100, 100)])
    assert len(found.scores) == len(found.labels) == len(found.boxes) == 300
    assert found.labels.bincount().tolist() == [100, 200]
    assert (found.scores.diff() <= 0).all()


def test_every_page_is_scaled_to_its_own_size():
    one = answer([[0.0]], [[0.5, 0.5, 0.5, 0.5]])
    two = one.refined._replace(logits=torch.zeros(1, 2, 1, 1), boxes=torch.full((1, 2, 1, 4), 0.5))
    small, large = detect(one._replace(refined=two), [(100, 100), (1000, 500)])
    assert small.boxes.tolist() == [[25, 25, 75, 75]]
    assert large.boxes.tolist() == [[125, 250, 375, 750]]


def test_the_answers_of_training_are_tensors_of_their_own():
    """Of slices of one tensor `torch.compile` mistakes one for another where they are answers of a model."""
    output = tiny_model()(pages(), SIZES, noised([WITH_BOXES] * 2))
    split = (*output.refined, *output.initial, *output.denoising.refined, *output.denoising.initial)
    assert len({answer.untyped_storage().data_ptr() for answer in split}) == len(split)
