"""A pyramid of maps from one map, for backbones that have a single stride: plain vision transformers."""

from collections.abc import Callable

from timm.layers import LayerNorm2d
from torch import Tensor, nn

SOURCE = 16  # the stride of the map that a pyramid is made of


class SimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): strides 8, 16 and 32 from the last map.

    Stride 8 is a transposed convolution, 16 the map as it is, 32 a strided convolution, each with a layer norm. No
    kernel is wider than its stride, so no cell reads beyond the edge of its page's canvas.
    """

    def __init__(self, dim: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.channels = [dim // 2 if stride < SOURCE else dim for stride in strides]
        kinds: dict[int, Callable[..., nn.Module]] = {8: nn.ConvTranspose2d, 16: nn.Identity, 32: nn.Conv2d}
        self.levels = nn.ModuleList(
            nn.Sequential(kinds[stride](dim, channels, 2, 2), LayerNorm2d(channels))
            for stride, channels in zip(strides, self.channels, strict=True)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """One (B, dim, H / 16, W / 16) map -> a (B, channels, H / stride, W / stride) map for each stride."""
        (x,) = maps
        return [level(x) for level in self.levels]
