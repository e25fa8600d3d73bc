"""The whole detector: pages in, boxes out. Most pages are 64x96: 8x12, 4x6 and 2x3 cells of strides 8, 16 and 32."""

import copy
from math import log, sqrt

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock
from tiny import freeze_batch_norms, noised, shaken, target, tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfine.config import LossConfig
from dfine.losses.criterion import criterion
from dfine.model.decoder import DecoderLayer
from dfine.model.deploy import compile_parts, merge_backbone
from dfine.model.detector import DFine, attended_to, detect
from dfine.model.fdr import decode, expectation
from dfine.model.hybrid_encoder import AIFI, RepNCSPELAN4, RepVGG
from dfine.model.query_selection import QuerySelection, gather
from dfine.structures import DFineOutput, Queries, Refinement, Target

WITH_BOXES, EMPTY = target([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]], labels=[0, 2]), target([])


def pages(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    """uint8 noise."""
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def trained(**config: object) -> DFine:
    """In training mode, but batch norm uses its running statistics, as in evaluation mode."""
    return freeze_batch_norms(shaken(tiny_model(**config)))


def xavier_uniform(weight: Tensor) -> bool:
    bound = sqrt(6 / (weight.shape[0] + weight.shape[1]))
    return bool(weight.abs().max() <= bound) and weight.std().item() == pytest.approx(bound / sqrt(3), rel=0.1)


def anchor(cell: int, height: int, width: int, canvas: tuple[int, int] | None = None) -> list[float]:
    """The anchor of a memory cell, for a page of height x width on its canvas."""
    canvas = canvas or (height, width)
    for level, stride in enumerate((8, 16, 32)):
        rows, columns = canvas[0] // stride, canvas[1] // stride
        if cell < rows * columns:
            x, y = (cell % columns + 0.5) * stride / width, (cell // columns + 0.5) * stride / height
            return [x, y, 0.05 * 2**level, 0.05 * 2**level]
        cell -= rows * columns
    raise AssertionError("no such cell")


def same(ours: Refinement, theirs: Refinement) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


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


def selection(queries: int) -> QuerySelection:
    """Of 4 channels and 2 classes on strides 8 and 16; the first channel is the score of class 1."""
    chooser = QuerySelection(4, 2, (8, 16), queries)
    with torch.no_grad():
        chooser.project.weight.copy_(torch.eye(4))
        chooser.project.bias.zero_()
        chooser.class_head.weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    return chooser


def memory_of(height: int, width: int, loud: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Memory of a canvas on strides 8 and 16, and its shapes; the first channel is large in the loud cells."""
    shapes = [(height // 8, width // 8), (height // 16, width // 16)]
    memory = torch.zeros(1, sum(h * w for h, w in shapes), 4)
    memory[0, loud, 0] = 1
    return memory, shapes


def test_the_cells_with_the_best_class_become_queries():
    memory, shapes = memory_of(32, 48, loud=[3, 17, 26])  # 4x6 cells, then 2x3
    head, queries, *_ = selection(3)(memory, shapes, None)
    assert set(queries.cells[0].tolist()) == {3, 17, 26}
    assert head.logits.argmax(-1).tolist() == [[1, 1, 1]]
    boxes = dict(zip(queries.cells[0].tolist(), queries.proposal[0].tolist(), strict=True))
    assert boxes[17] == pytest.approx([5.5 / 6, 2.5 / 4, 0.05, 0.05])  # row 2, column 5
    assert boxes[26] == pytest.approx([2.5 / 3, 0.5 / 2, 0.1, 0.1])  # of the second level: row 0, column 2


def test_a_proposal_is_its_own_cells_answer():
    """All cells but one hold the same, so all boxes but one move by the same from their anchors, in logits."""
    chooser, (memory, shapes) = selection(30), memory_of(32, 48, loud=[17])
    torch.nn.init.normal_(chooser.box_head[-1].weight)
    _, queries, *_ = chooser(memory, shapes, None)
    anchors = torch.tensor([anchor(cell, 32, 48) for cell in queries.cells[0].tolist()])
    moved = (queries.proposal[0].logit() - anchors.logit()).abs().sum(-1)
    assert queries.cells[0, 0] == 17
    assert moved[0] > 0.01
    torch.testing.assert_close(moved[1:], moved[1:2].expand(29), atol=1e-4, rtol=0)
    assert (moved[0] - moved[1]).abs() > 0.01


def test_cells_in_the_padding_cannot_be_selected():
    """Of 4x6 cells the page covers 2x3; the cells right of it and below are much louder, those on it very quiet."""
    memory, shapes = memory_of(32, 48, loud=[3, 4, 5, 12, 13, 18, 25, 26, 27, 28, 29])
    memory[0, [0, 1, 2, 6, 7, 8, 24], 0] = -1
    chooser = selection(7)
    with torch.no_grad():
        chooser.class_head.bias.fill_(-100)
    _, queries, *_ = chooser(memory, shapes, torch.tensor([[16, 24]]))
    assert set(queries.cells[0].tolist()) == {0, 1, 2, 6, 7, 8, 24}
    assert ((queries.proposal > 0) & (queries.proposal < 1)).all()


def test_cells_whose_anchor_touches_the_border_cannot_be_selected():
    """On a page 640 wide the first column's centre lies at 4 / 640 < 0.01, the second's at 12 / 640."""
    anchors, valid = selection(1).anchors([(10, 80), (5, 40)], None, torch.zeros(1))
    finest = valid[0, :800].view(10, 80)
    assert anchors[0, 0].tolist() == pytest.approx([4 / 640, 4 / 80, 0.05, 0.05])
    assert finest[:, 0].tolist() == finest[:, -1].tolist() == [False] * 10
    assert finest[:, 1:-1].all()
    memory, shapes = memory_of(80, 640, loud=[0, 80, 160])
    memory[0, 5, 0] = 0.1
    assert selection(1)(memory, shapes, None)[1].cells.tolist() == [[5]]


def test_memory_of_cells_that_cannot_be_selected_is_not_looked_at():
    """Another model may ask for any cell; what this one has zeroed stays a constant."""
    memory, shapes = memory_of(32, 48, loud=[5])
    tokens = selection(1)(memory, shapes, torch.tensor([[16, 24]]))[2]
    assert torch.equal(tokens[0, 5], tokens[0, 4])


def test_padding_a_page_further_moves_no_anchor():
    chooser = selection(1)
    tight, valid = chooser.anchors([(4, 6), (2, 3)], torch.tensor([[32, 48]]), torch.zeros(1))
    wide, still_valid = chooser.anchors([(8, 10), (4, 5)], torch.tensor([[32, 48]]), torch.zeros(1))
    corner = [row * 10 + column for row in range(4) for column in range(6)]
    corner += [80 + row * 5 + column for row in range(2) for column in range(3)]
    torch.testing.assert_close(wide[:, corner], tight)
    assert still_valid[:, corner].tolist() == valid.tolist()
    assert still_valid.sum() == valid.sum()  # and what was added is not valid


def test_fewer_cells_than_queries_give_fewer_queries():
    memory, shapes = memory_of(16, 16, loud=[])
    assert selection(100)(memory, shapes, None)[1].cells.shape == (1, 5)


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


# Deployed


def settled(**config: object) -> DFine:
    """Trained, in evaluation mode, with running statistics away from 0 and 1."""
    model = trained(**config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet", "test_efficientnet", "test_byobnet"])
def test_the_deployed_model_gives_the_same_answers_without_a_batch_norm(backbone: str):
    """The second has torch's batch norms, the others timm's, which hold their activation, or none."""
    model = settled(backbone=backbone)
    with torch.no_grad():
        expected, answer = model(pages()), copy.deepcopy(model).deploy()(pages())
    assert torch.equal(answer.queries.cells, expected.queries.cells)
    for ours, theirs in zip(answer.refined, expected.refined, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.deploy().modules())


def test_a_deployed_repvgg_block_is_one_convolution():
    blocks = [module for module in settled().deploy().modules() if isinstance(module, RepVGG)]
    assert blocks
    for block in blocks:
        assert [type(module) for module in block.modules() if isinstance(module, nn.Conv2d)] == [nn.Conv2d]


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_deployed_fast_it_is_in_half_precision_where_that_is_faster_and_answers_nearly_the_same(
    multiplies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Every cell is a query, in whatever order: bf16 ranks them otherwise."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    model = settled(queries=8 * 12 + 4 * 6 + 2 * 3)
    fast, computed = copy.deepcopy(model).deploy(fast=True), []
    fast.decoder.layers[0].feedforward.register_forward_hook(lambda module, x, y: computed.append(y.dtype))
    with torch.no_grad():
        expected, answer = model(pages()), fast(pages())
    assert computed == [dtype]
    assert fast.decoder.layers[0].feedforward[0].weight.dtype == dtype
    assert fast.backbone.body.stem_0.weight.is_contiguous(memory_format=torch.channels_last)
    assert answer.refined.logits.dtype == answer.refined.boxes.dtype == torch.float32
    ours, theirs = (gather(torch.cat(x.refined[:2], -1)[0], x.queries.cells.argsort(1)) for x in (answer, expected))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_the_narrower_decoder_can_be_deployed_too():
    model = settled(encoder_dim=48)
    with torch.no_grad():
        expected, answer = model(pages()), copy.deepcopy(model).deploy()(pages())
    torch.testing.assert_close(answer.refined.boxes, expected.refined.boxes, atol=1e-4, rtol=0)


def test_a_norm_whose_convolution_speaks_to_others_as_well_stays():
    """Otherwise the others would hear the norm."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.conv(x)
            return [x + self.norm(x)]

    backbone = settled().backbone
    backbone.body, backbone.indices = Forked().eval(), [0]
    x = torch.rand(1, 3, 8, 8)
    expected = backbone.body(x)
    merge_backbone(backbone)
    torch.testing.assert_close(backbone.body(x), expected)
    assert isinstance(backbone.body.norm, nn.BatchNorm2d)


# Compilation


def test_compiled_blocks_serve_every_size_of_pages_and_answer_the_same(monkeypatch: pytest.MonkeyPatch):
    """Nothing is traced anew after the second canvas, and no graph is broken; one code serves all equal blocks."""
    compiler = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiler(self, backend="eager", **how))
    torch._dynamo.reset()
    counters.clear()
    model = trained(layers=2).eval()
    plain, graphs = copy.deepcopy(model), []
    compile_parts(model)
    with torch.inference_mode():
        for height, width in ((64, 96), (96, 64), (64, 160), (96, 96)):
            page, size = pages(1, height, width), torch.tensor([[height, width]])
            same(model(page, size).refined, plain(page, size).refined)
            graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[0] > 0
    assert set(graphs[1:]) == {graphs[1]}
    blocks = sum(isinstance(module, ConvNeXtBlock | RepNCSPELAN4 | AIFI | DecoderLayer) for module in model.modules())
    assert graphs[-1] < blocks


def test_the_answers_of_training_are_tensors_of_their_own():
    """Of slices of one tensor `torch.compile` mistakes one for another where they are answers of a model."""
    output = tiny_model()(pages(), SIZES, noised([WITH_BOXES] * 2))
    split = (*output.refined, *output.initial, *output.denoising.refined, *output.denoising.initial)
    assert len({answer.untyped_storage().data_ptr() for answer in split}) == len(split)
