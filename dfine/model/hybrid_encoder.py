"""The hybrid encoder: AIFI (self-attention on the coarsest map), then top-down and bottom-up fusion by GELAN blocks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfine.model.layers import ConvNorm


class HybridEncoder(nn.Module):
    """Maps of the backbone -> as many maps of one width, each informed by all others.

    `depth_mult` sets the RepVGG blocks per CSP, round-half-even(3 depth_mult); `expansion` the inner width of the
    fusion blocks, floor(expansion dim / 2).
    """

    def __init__(
        self, channels: list[int], dim: int, heads: int, feedforward_dim: int, depth_mult: float, expansion: float
    ) -> None:
        super().__init__()
        blocks, hidden = round(3 * depth_mult), math.floor(expansion * dim / 2)
        steps = range(len(channels) - 1)
        self.projections = nn.ModuleList(ConvNorm(c, dim, 1) for c in channels)
        self.aifi = AIFI(dim, heads, feedforward_dim)
        self.laterals = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in steps)
        self.top_down = nn.ModuleList(RepNCSPELAN4(2 * dim, dim, hidden, blocks) for _ in steps)
        self.downsamples = nn.ModuleList(
            nn.Sequential(ConvNorm(dim, dim, 1), ConvNorm(dim, dim, 3, stride=2, groups=dim)) for _ in steps
        )
        self.bottom_up = nn.ModuleList(RepNCSPELAN4(2 * dim, dim, hidden, blocks) for _ in steps)

    def forward(self, maps: list[Tensor], on_page: Tensor | None = None) -> list[Tensor]:
        """
        Args:
            maps: (B, channels, H / stride, W / stride), finest first.
            on_page: (B, cells of the coarsest map) False in padding; None: no padding.
        Returns:
            (B, D, H / stride, W / stride), finest first.
        """
        maps = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        maps[-1] = self.aifi(maps[-1], on_page)
        uppers, top = [], maps[-1]  # laterals, coarsest first; `top` ends as the finest map
        for i, lower in enumerate(reversed(maps[:-1])):
            upper = self.laterals[i](top)
            uppers.append(upper)
            enlarged = F.interpolate(upper, size=lower.shape[-2:], mode="nearest")
            top = self.top_down[i](torch.cat([enlarged, lower], dim=1))
        outputs = [top]
        for i, upper in enumerate(reversed(uppers)):
            outputs.append(self.bottom_up[i](torch.cat([self.downsamples[i](outputs[-1]), upper], dim=1)))
        return outputs


class AIFI(nn.Module):
    """One post-norm transformer layer over the cells of a map; padding is not attended to."""

    def __init__(self, dim: int, heads: int, feedforward_dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward_dim), nn.GELU(), nn.Linear(feedforward_dim, dim))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, on_page: Tensor | None = None) -> Tensor:
        """(B, D, H, W), (B, H * W) True on the page -> (B, D, H, W)"""
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # (B, H * W, D)
        query = tokens + sincos_positions(height, width, tokens.shape[-1], x.device).to(x.dtype)  # (B, H * W, D)
        padding = None if on_page is None else ~on_page
        attended = self.attention(query, query, tokens, key_padding_mask=padding, need_weights=False)[0]
        tokens = self.norm1(tokens + attended)
        tokens = self.norm2(tokens + self.feedforward(tokens))
        return tokens.transpose(1, 2).unflatten(-1, (height, width))


def sincos_positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """2-d positions of a row-major grid -> (height * width, dim) fp32.

    With f_j = 10000^(-j / (dim / 4)) a cell is [sin(row f), cos(row f), sin(column f), cos(column f)].
    The original flattens this grid column-major under row-major tokens, which on a map that is not square gives
    a cell the position of another one; on squares the two are the same numbers.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    row, column = row.flatten()[:, None] * frequencies, column.flatten()[:, None] * frequencies
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1)


class RepNCSPELAN4(nn.Module):
    """GELAN's fusion block (YOLOv9, arXiv 2402.13616): everything computed on the way is concatenated."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.stem = ConvNorm(inputs, inputs, 1, act=nn.SiLU())
        self.first = nn.Sequential(CSP(inputs // 2, hidden, blocks), ConvNorm(hidden, hidden, 3, act=nn.SiLU()))
        self.second = nn.Sequential(CSP(hidden, hidden, blocks), ConvNorm(hidden, hidden, 3, act=nn.SiLU()))
        self.head = ConvNorm(inputs + 2 * hidden, outputs, 1, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.stem(x).chunk(2, dim=1)  # (B, inputs / 2, H, W) each
        first = self.first(worked)  # (B, hidden, H, W)
        second = self.second(first)  # (B, hidden, H, W)
        return self.head(torch.cat([passed, worked, first, second], dim=1))  # (B, outputs, H, W)


class CSP(nn.Module):
    """The sum of two branches: a 1x1 convolution followed by RepVGG blocks, and a 1x1 convolution alone."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.deep = nn.Sequential(
            ConvNorm(inputs, outputs, 1, act=nn.SiLU()), *(RepVGG(outputs) for _ in range(blocks))
        )
        self.shallow = ConvNorm(inputs, outputs, 1, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(x) + self.shallow(x)


class RepVGG(nn.Module):
    """SiLU of a 3x3 plus a 1x1 convolution; `deploy` makes them one (arXiv 2101.03697)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv3 = ConvNorm(dim, dim, 3)
        self.conv1: ConvNorm | None = ConvNorm(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv3(x) if self.conv1 is None else self.conv3(x) + self.conv1(x))
