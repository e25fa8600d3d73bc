"""Multi-scale deformable attention: each query reads the memory at a few points around its reference box."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfine.boxes import full_precision


def deformable_attention(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> Tensor:
    """Weighted sum of bilinear samples (arXiv 2010.04159, Eq. 3; without its projections).

    Args:
        value: (B, S, heads, D / heads), levels one after the other, row-major inside a level.
        shapes: height, width of each level.
        locations: (B, Q, heads, P, 2) x, y; 0 and 1 are the outer borders of the map, outside it everything is 0.
        weights: (B, Q, heads, P).
        points: how many of the P points lie on each level, in order.
    Returns:
        (B, Q, D)
    """
    value = value.to(locations.dtype)  # half-precision locations would be off by a tenth of a cell and more
    plain = value.device.type != "cpu" or torch.onnx.is_in_onnx_export()
    read = by_grid_sample if plain else by_embedding_bag
    return read(value, shapes, locations, weights.to(value.dtype), points)


def readable(memory: Tensor) -> Tensor:
    """The memory (B, S, D) as `deformable_attention` reads it; made once, it serves all layers.

    In fp32, and on a GPU with the cells of a channel side by side, from where `by_grid_sample` need not copy them.
    """
    if memory.device.type == "cpu":
        return full_precision(memory)
    dtype = torch.promote_types(memory.dtype, torch.float32)
    return memory.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous().transpose(1, 2)


def by_grid_sample(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> Tensor:
    """`deformable_attention` level by level: the plain form."""
    batch, _, heads, width = value.shape
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], dim=-1)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(points, dim=2)
    sampled = [  # (B heads, D / heads, Q, points of the level) each
        F.grid_sample(level.unflatten(-1, shape), grid, align_corners=False)
        for level, shape, grid in zip(levels, shapes, grids, strict=True)
    ]
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B heads, 1, Q, P)
    attended = (torch.cat(sampled, dim=-1) * weights).sum(-1)  # (B heads, D / heads, Q)
    return attended.view(batch, heads * width, -1).transpose(1, 2)


def by_embedding_bag(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> Tensor:
    """`deformable_attention` as one weighted sum of memory cells for each query and head: 4 cells around each point.

    The same numbers. On a CPU it is faster, at heads of 24 and 32 channels 5 to 8 times, with the backward pass 1.9 to
    2.3 times: a cell's channels lie side by side.
    """
    batch, cells, heads, width = value.shape
    levels = [(h, w, sum(a * b for a, b in shapes[:level])) for level, (h, w) in enumerate(shapes)]
    each = [level for level, p in zip(levels, points, strict=True) for _ in range(p)]
    height, columns, start = torch.tensor(each, dtype=torch.int32).unbind(1)  # (P,) each
    x, left, right = between_cells(locations[..., 0], columns)  # (B, Q, heads, P) each
    y, upper, lower = between_cells(locations[..., 1], height)
    page = torch.arange(batch, dtype=torch.int32)[:, None, None, None] * cells
    row = (page + start + y * columns + x) * heads + torch.arange(heads, dtype=torch.int32)[:, None]
    down = columns * heads
    rows = torch.cat([row, row + heads, row + down, row + down + heads], dim=-1)  # (B, Q, heads, 4 P)
    rows = rows.clamp_(0, batch * cells * heads - 1)  # a cell outside its map has share 0: any row will do
    upper, lower = weights * upper, weights * lower
    shares = torch.cat([upper * left, upper * right, lower * left, lower * right], dim=-1)
    attended = WeightedSum.apply(value.reshape(-1, width), rows.flatten(0, 2), shares.flatten(0, 2))
    return attended.view(batch, -1, heads * width)


class WeightedSum(torch.autograd.Function):
    """(R, W) values, (N, K) int32 rows of them, (N, K) shares -> (N, W) sums of a row's shares of its values.

    `F.embedding_bag` on a CPU, but for the gradient of the values, which is such a sum as well: of the gradients of all
    sums that a value went into. torch's own adds them up one by one, which takes up to twice as long.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(values, rows, shares)
        return F.embedding_bag(rows, values, mode="sum", per_sample_weights=shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        """(N, W) -> (R, W) of the values, (N, K) of the shares."""
        values, rows, shares = ctx.saved_tensors
        sorted_rows, order = rows.flatten().sort()
        starts = torch.searchsorted(sorted_rows, torch.arange(len(values), dtype=torch.int32), out_int32=True)
        readers, their_shares = order.int() // rows.shape[1], shares.flatten()[order]
        to_values = F.embedding_bag(readers, g, starts, mode="sum", per_sample_weights=their_shares)
        sums = torch.arange(len(rows), dtype=torch.int32)
        to_shares = torch.ops.aten._embedding_bag_per_sample_weights_backward(  # as torch's own embedding bag
            g, values, rows.flatten(), sums * rows.shape[1], sums.repeat_interleave(rows.shape[1]), mode=0
        )
        return to_values, None, to_shares.view_as(shares)


def between_cells(location: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the last cell centred before a location, that cell's share, and the next one's.

    A cell outside the map has share 0.
    """
    place = location * cells - 0.5  # 0 is the centre of the first cell
    low = place.detach().floor().clamp(min=-2).minimum(cells)
    far = place - low
    near = (1 - far) * ((low >= 0) & (low < cells))
    return low.int(), near, far * ((low >= -1) & (low < cells - 1))


class DeformableAttention(nn.Module):
    """Offsets and weights come from the query; there is no value and no output projection.

    A point lies at centre + offset * 0.5 * box size / points of its level; one softmax over the points of all levels.
    """

    point_scale: Tensor

    def __init__(self, dim: int, heads: int, points: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        total = sum(points)
        self.offsets = nn.Linear(dim, heads * total * 2)
        self.weights = nn.Linear(dim, heads * total)
        scale = torch.cat([torch.full((p, 1), 0.5 / p) for p in points])  # (P, 1)
        self.register_buffer("point_scale", scale, persistent=False)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        # Head h looks along its own direction; the k-th point of a level is k steps out, on a square.
        angle = torch.arange(heads) * 2 * math.pi / heads
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (heads, 2)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, p + 1) for p in points])  # (P,)
        with torch.no_grad():
            self.offsets.bias.copy_((direction[:, None] * steps[:, None]).flatten())

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: list[tuple[int, int]],
        valid_ratio: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            query: (B, Q, D). reference: (B, Q, 4) cxcywh, fractions of the page. memory: (B, S, D).
            valid_ratio: (B, 2) width, height of the page as shares of the padded canvas; None: no padding.
        """
        locations, weights = self.sampling(query, reference)  # (B, Q, heads, P, 2), (B, Q, heads, P)
        if valid_ratio is not None:
            locations = locations * valid_ratio[:, None, None, None]
        value = memory.unflatten(-1, (self.heads, -1))  # (B, S, heads, D / heads)
        return deformable_attention(value, shapes, locations, weights, self.points)  # (B, Q, D)

    def sampling(self, query: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Where each head of a query reads, as fractions of the page, and what each point weighs.

        Args:
            query: (B, Q, D). reference: (B, Q, 4) cxcywh, fractions of the page.
        Returns:
            locations (B, Q, heads, P, 2) x, y; weights (B, Q, heads, P), whose sum over P is 1.
        """
        batch, queries = query.shape[:2]
        shape = (batch, queries, self.heads, sum(self.points))
        offsets = full_precision(self.offsets(query)).view(*shape, 2)  # (B, Q, heads, P, 2)
        weights = full_precision(self.weights(query)).view(shape).softmax(-1)  # (B, Q, heads, P)
        centre, size = reference[:, :, None, None, :2], reference[:, :, None, None, 2:]  # (B, Q, 1, 1, 2)
        return centre + offsets * self.point_scale * size, weights
