"""Query selection: which cells become queries, and from where they start."""

import pytest
import torch
from tiny import anchor
from torch import Tensor

from dfine.model.query_selection import QuerySelection


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
