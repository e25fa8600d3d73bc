"""Where we depart from the original implementation on purpose: what it does, and why ours differs."""

from itertools import permutations

import pytest
import torch
from recorded import Given, column_major_positions
from tiny import noised, shaken, target, tiny_model
from torch import Tensor, nn

from dfine import distributed
from dfine.config import ClassDistillConfig, DistillConfig, LossConfig, MatcherConfig
from dfine.losses.criterion import criterion
from dfine.losses.distillation import active, distillation
from dfine.losses.golsd import union
from dfine.losses.matcher import match, matching_cost
from dfine.model.detector import detect
from dfine.model.hybrid_encoder import sincos_positions
from dfine.model.query_selection import QuerySelection
from dfine.structures import Batch, DFineOutput, Matches, Prediction, Queries, Refinement
from dfine.training.metrics import finite_means


def test_row_major_positions():
    """The original counts tokens along rows and positions down columns: on 3 x 5 a row has no position of its own.

    On squares both are the same numbers (tests/test_golden.py has more of either kind).
    """
    ours = sincos_positions(3, 5, 8).view(3, 5, 2, 4)  # the last but one: half of the row, half of the column
    theirs = column_major_positions(3, 5, 8).view(3, 5, 2, 4)
    assert all(row[:, 0].unique(dim=0).shape[0] == 1 for row in ours)
    assert not any(row[:, 0].unique(dim=0).shape[0] == 1 for row in theirs)
    assert theirs[0, 3].equal(ours[1, 0])  # its 4th token in the first row says "second row, first column"
    assert column_major_positions(4, 4, 8).equal(sincos_positions(4, 4, 8))


def test_page_frame_under_padding():
    """In the original boxes are fractions of the canvas, so a page's answer changes with the padding of its batch."""
    model = shaken(tiny_model())
    page, canvas, share = (64, 96), (96, 160), torch.tensor([96 / 160, 64 / 96] * 2)
    torch.manual_seed(0)
    maps = [torch.randn(1, 32, page[0] // stride, page[1] // stride) for stride in (8, 16, 32)]
    alone = answer_to(model, maps, page)
    padded = answer_to(model, [padded_map(x, canvas, s) for x, s in zip(maps, (8, 16, 32), strict=True)], canvas, page)
    assert torch.allclose(padded.boxes, alone.boxes, atol=1e-5)
    assert torch.allclose(padded.logits, alone.logits, atol=1e-4)
    theirs = answer_to(model, [padded_map(x, canvas, s) for x, s in zip(maps, (8, 16, 32), strict=True)], canvas)
    assert (theirs.boxes / share - alone.boxes).abs().max() > 0.01


def padded_map(x: Tensor, canvas: tuple[int, int], stride: int) -> Tensor:
    """The map in the upper left corner of the canvas's."""
    height, width = canvas[0] // stride, canvas[1] // stride
    return nn.functional.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def answer_to(
    model: nn.Module, maps: list[Tensor], canvas: tuple[int, int], page: tuple[int, int] | None = None
) -> Refinement:
    """The model's answer to given maps of the encoder."""
    model.backbone = model.encoder = Given(maps)
    return model(torch.zeros(1, 3, *canvas), None if page is None else torch.tensor([page])).refined


def test_queries_without_a_cell_do_not_count():
    """The original fills up with empty cells, which attend, match and are averaged over: a page learns otherwise then.

    A page of 126 cells and 200 queries, alone and on a canvas of more cells.
    """
    model = shaken(tiny_model(queries=200))
    model.encode_apart = model.encode  # the maps are given
    page, canvas = (64, 96), (96, 160)
    truth = [target([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]], labels=[0, 2])]
    torch.manual_seed(0)
    maps = [torch.randn(1, 32, page[0] // stride, page[1] // stride) for stride in (8, 16, 32)]
    noise, outputs, losses = noised(truth), [], []
    for size in (page, canvas):
        model.backbone = model.encoder = Given([padded_map(x, size, s) for x, s in zip(maps, (8, 16, 32), strict=True)])
        images = torch.zeros(1, 3, *size)
        teacher = model.eval()(images, torch.tensor([page]), dense=True)
        output = model.train()(images, torch.tensor([page]), noise, teacher.queries, dense=True)
        outputs.append(output)
        w, distill = model.decoder.w, DistillConfig(classes=ClassDistillConfig(loss="mse"))
        terms = distillation(output, teacher, w, w, truth, active(distill, 0), distill, MatcherConfig())
        losses.append(criterion(output, truth, w, LossConfig()) | terms)
    alone, padded = outputs
    assert alone.queries.valid.shape == (1, 126)
    assert padded.queries.valid.shape == (1, 200)
    assert alone.queries.valid.sum() == padded.queries.valid.sum() == 126
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    found, expected = (detect(output, [page], top=500)[0] for output in (padded, alone))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


class Emptiness(nn.Module):
    """A class head that prefers tokens which say nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        return -tokens.abs().sum(-1, keepdim=True)


def test_invalid_anchors_cannot_win():
    """The original empties the memory of invalid cells but lets their scores compete; their boxes are (1, 1, 1, 1)."""
    torch.manual_seed(0)
    selection = QuerySelection(dim=32, classes=1, strides=(8,), queries=4)
    selection.project.bias.data.zero_()
    selection.class_head = Emptiness()
    memory, shapes = torch.randn(1, 120, 32), [(2, 60)]  # the first and the last column are too near to the border
    _, valid = selection.anchors(shapes, None, memory)
    theirs = selection.class_head(selection.norm(selection.project(memory * valid[..., None]))).amax(-1).topk(4).indices
    assert not valid[0, theirs].any()
    _, queries, *_ = selection(memory, shapes, None)
    assert valid[0, queries.cells].all()


def test_stable_vote_ties():
    """The original sorts pairs by votes, in no order among equals, and keeps the first: one tie has two outcomes.

    Ours gives it to the last layer's choice, then to the lower index, whatever the order of the votes.
    """
    votes = [(0, 5, 2), (1, 5, 0), (2, 7, 0)]  # layer, query, box: boxes 0 and 2 have one vote each for query 5
    theirs = {originals_choice(order) for order in permutations(votes)}
    assert theirs == {0, 2}
    for order in permutations(votes):
        layer, query, box = torch.tensor(order).T
        voters = Matches(layer, torch.zeros_like(layer), query, box)
        assert union(voters, queries=10, last=1).target.tolist() == [0, 0]
        assert union(voters, queries=10, last=0).target.tolist() == [2, 0]
        assert union(voters, queries=10, last=3).target.tolist() == [0, 0]


def originals_choice(votes: tuple[tuple[int, int, int], ...]) -> int:
    """The box of query 5, all pairs having equally many votes: the first in the order that the sort happens to give."""
    return next(box for _, query, box in votes if query == 5)


def test_sums_instead_of_mean_times_count():
    """A mean over no queries is NaN, which the original hides; its denoising embedding gets no gradient then.

    With sums no queries give 0, and every parameter has a gradient, which training on many GPUs waits for.
    """
    assert torch.empty(0).mean().isnan()
    model, pages = tiny_model(), [target([]), target([])]
    losses = criterion(model(torch.rand(2, 3, 64, 64), noised=noised(pages)), pages, model.decoder.w, LossConfig())
    assert all(not loss.any() for name, loss in losses.items() if "denoising" in name)
    total = torch.stack([loss.sum() for loss in losses.values()]).sum()
    total.backward()
    assert total.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_nothing_passes_through_nan_to_num_a_cost_that_is_not_finite_stops():
    """The original counts NaN as 1, which can be the cheapest: a broken query then takes a box from a good one."""
    page = target([[0.5, 0.5, 0.2, 0.2]], image_id=17)
    logits, boxes = torch.full((1, 1, 2, 1), -4.0), torch.tensor([0.2, 0.2, 0.1, 0.1]).repeat(1, 1, 2, 1)
    logits[..., 1, :] = torch.nan
    cost = matching_cost(logits[0, 0], boxes[0, 0], page.labels, page.boxes, MatcherConfig())
    assert cost.nan_to_num(nan=1.0).argmin() == 1
    with pytest.raises(FloatingPointError, match=r"head 0 .* image 17"):
        match(logits, boxes, [page], MatcherConfig())


def test_nothing_passes_through_nan_to_num_a_loss_that_is_not_finite_stops():
    """The original counts it as 0 and trains on."""
    model, page = tiny_model(), target([[0.5, 0.5, 0.2, 0.2]], image_id=17)
    output = model(torch.rand(1, 3, 64, 64))
    edges = torch.full_like(output.refined.edge_logits, torch.nan)
    broken = output._replace(refined=output.refined._replace(edge_logits=edges))
    batch = Batch(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]), [page])
    losses = criterion(broken, [page], model.decoder.w, LossConfig())
    with pytest.raises(FloatingPointError, match=r"step 3: .*fgl.*ddf.*17"):
        finite_means(3, [batch], [losses], torch.tensor(1.0))


def test_global_normalisers(monkeypatch: pytest.MonkeyPatch):
    """Two processes give what one gives that has all pages; in the original DDF is a mean of each process's own."""
    crowded, sparse = target([[x, 0.5, 0.1, 0.3] for x in (0.2, 0.4, 0.6, 0.8)]), target([[0.5, 0.5, 0.2, 0.2]])
    model = shaken(tiny_model())
    output = model(torch.rand(2, 3, 64, 64))
    shares = [(page_of(output, slice(0, 1)), [crowded]), (page_of(output, slice(1, 2)), [sparse])]
    one = criterion(output, [crowded, sparse], model.decoder.w, LossConfig())

    alone, counts = [], []
    monkeypatch.setattr(distributed, "sum_over_processes", lambda count: counts.append(count) or count)
    for share in shares:
        alone.append(criterion(*share, model.decoder.w, LossConfig()))
    assert not torch.allclose(mean_of(alone, "ddf"), one["ddf"], rtol=1e-3)  # the original's

    monkeypatch.setattr(distributed, "sum_over_processes", lambda _: counts[0] + counts[1])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    both = [criterion(*share, model.decoder.w, LossConfig()) for share in shares]
    for name, loss in one.items():
        assert torch.allclose(mean_of(both, name), loss, rtol=1e-4), name


def page_of(output: DFineOutput, page: slice) -> DFineOutput:
    """What a process that has only these pages says (no denoising)."""
    refined = Refinement(*(x[:, page] for x in output.refined[:3]), output.refined.initial_boxes[page])
    heads = [Prediction(*(x[page] for x in head)) for head in (output.initial, output.encoder)]
    return DFineOutput(refined, Queries(*(x[page] for x in output.queries)), *heads)


def mean_of(processes: list[dict[str, Tensor]], name: str) -> Tensor:
    """What averaging gradients over processes makes of a term."""
    return torch.stack([losses[name] for losses in processes]).mean(0)


def test_detections_clipped_to_the_page():
    """The original reports boxes beyond the page, and a negative width as two crossed edges."""
    boxes = torch.tensor([[[0.1, 0.5, 0.4, 0.2], [0.9, 0.9, 0.4, 0.4], [0.5, 0.5, -0.2, 0.2]]])
    output = DFineOutput(Refinement(torch.tensor([[[[3.0], [2.0], [1.0]]]]), boxes[None], boxes, boxes), None)
    (page,) = detect(output, [(200, 100)])
    expected = torch.tensor([[0.0, 80, 30, 120], [70, 140, 100, 200], [50, 80, 50, 120]])
    assert torch.allclose(page.boxes, expected, atol=1e-4)
