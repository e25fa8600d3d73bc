"""Multi-scale deformable attention: each query reads the memory at a few points around its reference box."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine.boxes import full_precision
from dfine.model.cpu_kernels import by_embedding_bag, by_gather


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
        scale = torch.cat([torch.full((p, 1), 0.5 / p, dtype=torch.float32) for p in points])  # (P, 1)
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
    on_cpu = by_gather if torch.onnx.is_in_onnx_export() else by_embedding_bag
    read = on_cpu if value.device.type == "cpu" else by_grid_sample
    return read(value, shapes, locations, weights.to(value.dtype), points)


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


def readable(memory: Tensor) -> Tensor:
    """The memory (B, S, D) as `deformable_attention` reads it; made once, it serves all layers.

    In fp32, and on a GPU with the cells of a channel side by side, from where `by_grid_sample` need not copy them.
    """
    if memory.device.type == "cpu":
        return full_precision(memory)
    dtype = torch.promote_types(memory.dtype, torch.float32)
    return memory.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).contiguous().transpose(1, 2)
