"""The same numbers sooner on a CPU: deformable attention, and the backward pass of large depthwise convolutions.

Not needed to understand the model.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


def by_embedding_bag(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> Tensor:
    """`deformable_attention` as one weighted sum of memory cells for each query and head: 4 cells around each point.

    The same numbers. On a CPU it is faster, at heads of 24 and 32 channels 5 to 8 times, with the backward pass 1.9 to
    2.3 times: a cell's channels lie side by side.
    """
    rows, shares = cells_around(value, shapes, locations, weights, points)
    rows, shares, width = rows.flatten(0, 2), shares.flatten(0, 2), value.shape[-1]  # (B Q heads, 4 P)
    attended = F.embedding_bag(rows, value.reshape(-1, width), mode="sum", per_sample_weights=shares)
    return attended.view(len(value), -1, value.shape[2] * width)


def by_gather(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> Tensor:
    """`by_embedding_bag` in ONNX's words. Its GridSample is not one of them: TensorRT computes that wrongly."""
    rows, shares = cells_around(value, shapes, locations, weights, points)
    read = value.flatten(0, 2).index_select(0, rows.flatten()).view(*rows.shape, -1)  # (B, Q, heads, 4 P, D / heads)
    return (shares[..., None, :] @ read).flatten(2)


def cells_around(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, points: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Which rows of the values (B S heads, D / heads) the points read, and each row's share: (B, Q, heads, 4 P) both.

    Args: see `deformable_attention`.
    """
    batch, cells, heads, _ = value.shape
    whole: dict[str, Any] = {"dtype": torch.int32, "device": value.device}
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    height, columns, start = (  # (P,) each; in an ONNX file sides are known when it runs
        torch.cat([torch.full((p,), number, **whole) for number, p in zip(numbers, points, strict=True)])
        for numbers in (*zip(*shapes, strict=True), starts)
    )
    x, left, right = between_cells(locations[..., 0], columns)  # (B, Q, heads, P) each
    y, upper, lower = between_cells(locations[..., 1], height)
    page = torch.arange(batch, **whole)[:, None, None, None] * cells
    row = (page + start + y * columns + x) * heads + torch.arange(heads, **whole)[:, None]
    down = columns * heads
    rows = torch.cat([row, row + heads, row + down, row + down + heads], dim=-1)  # (B, Q, heads, 4 P)
    rows = rows.clamp_(0, batch * cells * heads - 1)  # a cell outside its map has share 0: any row will do
    upper, lower = weights * upper, weights * lower
    return rows, torch.cat([upper * left, upper * right, lower * left, lower * right], dim=-1)


def between_cells(location: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the last cell centred before a location, that cell's share, and the next one's.

    A cell outside the map has share 0.
    """
    place = location * cells - 0.5  # 0 is the centre of the first cell
    low = place.detach().floor().clamp(min=-2).minimum(cells)
    far = place - low
    near = (1 - far) * ((low >= 0) & (low < cells))
    return low.int(), near, far * ((low >= -1) & (low < cells - 1))


def faster_depthwise(model: nn.Module) -> None:
    """Turns those convolutions of a model into a `DepthwiseConv2d` for which that is the same and faster."""
    for conv in model.modules():
        if not isinstance(conv, nn.Conv2d) or type(conv) not in FASTER:
            continue
        if conv.weight.shape[1] == 1 and min(conv.kernel_size) > 3:
            same = (conv.dilation, conv.padding_mode, conv.groups)
            square = conv.stride[0] == conv.stride[1]
            if square and same == ((1, 1), "zeros", conv.out_channels) and isinstance(conv.padding, tuple):
                conv.__class__ = FASTER[type(conv)]  # weights and all else stay as they are


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` whose backward pass on a CPU is `DepthwiseConvolution`'s."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        return DepthwiseConvolution.apply(x, self.weight, self.bias, self.stride[0], self.padding)


class DepthwiseConv2dSame(Conv2dSame):
    """The same of timm's convolution with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        x = pad_same(x, [*self.kernel_size], [*self.stride], [*self.dilation])
        return DepthwiseConvolution.apply(x, self.weight, self.bias, self.stride[0], (0, 0))


class DepthwiseConvolution(torch.autograd.Function):
    """`F.conv2d` of stride s with a kernel for each channel.

    A page's weight gradient dW[c, i, j] = sum_uv x[c, s u + i, s v + j] g[c, u, v], x being padded, is a depthwise
    convolution as well: of the page x with the gradient g as kernel, dilated by s. torch's own takes the way of dense
    convolutions where the kernel is larger than 3x3; at 7x7 this one is 4 to 20 times faster, in bf16 more. So is, in
    bf16, the gradient of x at a stride of 2 as a convolution of g with zeros between its cells.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
    ) -> Tensor:
        """(B, C, H, W), (C, 1, K, K), (C,) -> (B, C, H', W')"""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    @custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """(B, C, H', W') -> (B, C, H, W) of x, (C, 1, K, K) of the weight, (C,) of the bias, each if it is needed."""
        x, weight = ctx.saved_tensors
        channels, _, *size = weight.shape
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0] and ctx.stride > 1 and g.dtype == torch.bfloat16:
            to_x = strided_input(x.shape, weight, g, ctx.stride, ctx.padding)
        elif ctx.needs_input_grad[0]:
            to_x = conv2d_input(x.shape, weight, g, ctx.stride, ctx.padding, groups=channels)
        if ctx.needs_input_grad[1]:
            how = {"padding": ctx.padding, "dilation": ctx.stride, "groups": channels}
            pages = [F.conv2d(page, kernel[:, None], **how) for page, kernel in zip(x.split(1), g, strict=True)]
            whole = torch.cat(pages).sum(0)[:, None]  # (B, C, K', K') -> (C, 1, K', K'): the rest of a stride is in it
            to_weight = whole[..., : size[0], : size[1]]
        if ctx.needs_input_grad[2]:
            to_bias = g.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None, None


def strided_input(shape: torch.Size, weight: Tensor, g: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """The gradient of a strided depthwise convolution's input (B, C, H, W): g, zeros between its cells, convolved."""
    (high, wide), (rows, columns) = shape[-2:], weight.shape[-2:]
    spread = g.new_zeros(*g.shape[:2], stride * (g.shape[2] - 1) + 1, stride * (g.shape[3] - 1) + 1)
    spread = spread.contiguous(memory_format=torch.channels_last)
    spread[:, :, ::stride, ::stride] = g
    to_padded = F.conv2d(spread, weight.flip(2, 3), padding=(rows - 1, columns - 1), groups=len(weight))
    missing = (high + 2 * padding[0] - to_padded.shape[2], wide + 2 * padding[1] - to_padded.shape[3])  # never read
    to_padded = F.pad(to_padded, (0, missing[1], 0, missing[0]))
    return to_padded[:, :, padding[0] : padding[0] + high, padding[1] : padding[1] + wide]


FASTER: dict[type, type] = {nn.Conv2d: DepthwiseConv2d, Conv2dSame: DepthwiseConv2dSame}
