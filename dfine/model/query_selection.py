"""Query selection: which memory cells the decoder's queries start from."""

from typing import Any

import torch
from torch import Tensor, nn

from dfine.boxes import full_precision, logit
from dfine.model.layers import FullPrecision, class_head, mlp, zero_last
from dfine.structures import Cells, Prediction, Queries


class QuerySelection(nn.Module):
    """Every memory cell proposes a class and a box; the best Q become the decoder's queries (arXiv 2304.08069)."""

    def __init__(self, dim: int, classes: int, strides: tuple[int, ...], queries: int) -> None:
        super().__init__()
        self.strides, self.queries = strides, queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = class_head(dim, classes)
        self.box_head = zero_last(FullPrecision(*mlp(dim, dim, dim, 4)))
        nn.init.xavier_uniform_(self.project.weight)

    def forward(
        self, memory: Tensor, shapes: list[tuple[int, int]], sizes: Tensor | None, dense: bool = False
    ) -> tuple[Prediction | None, Queries, Tensor, Cells | None]:
        """(B, S, D) -> in training mode the answer at the selected cells; where they are; all tokens (B, S, D).

        The tokens have no gradient. The fourth is the answer at every cell, with its gradient, if `dense` asks for it.
        """
        anchors, valid = self.anchors(shapes, sizes, memory)  # (B or 1, S, 4), (B or 1, S)
        if dense:
            return self.densely(memory, anchors, valid)
        memory = memory * valid[..., None]
        # Ranking has no gradient, but must not run under `no_grad`: up to torch 2.10 autocast would remember the half-
        # precision copies of the weights that it makes here, without a gradient, and use them for the answer as well.
        tokens = self.norm(self.project(memory.detach())).detach()  # (B, S, D)
        selected_valid, index = self.best(full_precision(self.class_head(tokens)), valid)  # (B, Q)
        anchors = gather(anchors.expand(index.shape[0], -1, -1), index)  # (B, Q, 4); len() would fix an ONNX file's B
        # The selected tokens (B, Q, D) are made again, so that the backward pass is over these alone.
        again = torch.is_grad_enabled()
        selected = self.norm(self.project(gather(memory, index))) if again else gather(tokens, index)
        boxes = (self.box_head(selected) + logit(anchors)).sigmoid()  # (B, Q, 4)
        answer = Prediction(full_precision(self.class_head(selected)), boxes) if self.training else None
        return answer, Queries(index, boxes.detach(), selected_valid), tokens, None

    def densely(
        self, memory: Tensor, anchors: Tensor, valid: Tensor
    ) -> tuple[Prediction | None, Queries, Tensor, Cells]:
        """`forward` from the answer at every cell: that at the selected cells is a part of it."""
        tokens = self.norm(self.project(memory * valid[..., None]))  # (B, S, D)
        logits = full_precision(self.class_head(tokens))  # (B, S, C)
        boxes = (self.box_head(tokens) + logit(anchors)).sigmoid()  # (B, S, 4)
        selected_valid, index = self.best(logits.detach(), valid)  # (B, Q)
        selected = Prediction(gather(logits, index), gather(boxes, index))
        queries = Queries(index, selected.boxes.detach(), selected_valid)
        cells = Cells(logits, boxes, anchors.expand_as(boxes), valid.expand(boxes.shape[:2]), memory)
        return selected if self.training else None, queries, tokens.detach(), cells

    def best(self, logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Whether there are valid cells for the Q queries, and which are the best; (B, S, C), (B or 1, S) -> (B, Q)."""
        score = logits.amax(-1).masked_fill(~valid, -torch.inf)  # (B, S)
        best, index = score.topk(min(self.queries, score.shape[1]))
        return best != -torch.inf, index

    def anchors(self, shapes: list[tuple[int, int]], sizes: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """A box at the centre of each cell with sides 0.05 * 2^level, and whether all its numbers lie in (0.01, 0.99).

        In fractions of the page, so cells in the padding, whose centres lie beyond 1, are not valid.
        """
        levels = []
        for level, ((height, width), stride) in enumerate(zip(shapes, self.strides, strict=True)):
            page: Any = (height * stride, width * stride) if sizes is None else sizes.view(-1, 2, 1, 1).unbind(1)
            rows = torch.arange(height, device=like.device, dtype=torch.float32)[:, None]
            columns = torch.arange(width, device=like.device, dtype=torch.float32)
            y, x = (rows + 0.5) * stride / page[0], (columns + 0.5) * stride / page[1]  # (B, H, 1), (B, 1, W)
            centres = torch.stack(torch.broadcast_tensors(x, y), dim=-1).view(-1, height * width, 2)
            levels.append(torch.cat([centres, torch.full_like(centres, 0.05 * 2**level)], dim=-1))
        anchors = torch.cat(levels, dim=1).to(torch.promote_types(like.dtype, torch.float32))
        return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """(B, S, K), (B, Q) -> (B, Q, K)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
