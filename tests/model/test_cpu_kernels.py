"""Depthwise convolutions: torch's numbers, by another way back to the weights."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from tiny import shaken
from torch import Tensor, nn

from dfine.model.cpu_kernels import DepthwiseConv2d, DepthwiseConv2dSame, faster_depthwise


def pair(
    kernel: int = 7, stride: int = 1, same: bool = False, **kwargs: bool
) -> tuple[nn.Conv2d, DepthwiseConv2d | DepthwiseConv2dSame]:
    """torch's convolution, or timm's with TensorFlow's padding, and ours with the same weights, in float64."""
    torch.manual_seed(0)
    kind, padding = (Conv2dSame, 0) if same else (nn.Conv2d, kernel // 2)
    theirs = kind(4, 4, kernel, stride, padding, groups=4, dtype=torch.float64, **kwargs)
    ours = copy.deepcopy(theirs)
    faster_depthwise(nn.Sequential(ours))
    assert type(ours) is (DepthwiseConv2dSame if same else DepthwiseConv2d)
    return theirs, ours


def gradients(conv: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Of input, weight and bias, for an output whose cells all matter differently."""
    x = x.clone().requires_grad_()
    y = conv(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return [y.detach(), *(tensor.grad for tensor in (x, *conv.parameters()) if tensor.grad is not None)]


@pytest.mark.parametrize(("kernel", "stride", "same"), [(5, 1, False), (7, 1, False), (5, 2, False), (5, 2, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_answer_and_gradients_are_those_of_torch(
    kernel: int, stride: int, same: bool, bias: bool, memory_format: torch.memory_format
):
    theirs, ours = pair(kernel, stride, same, bias=bias)
    x = torch.randn(3, 4, 6, 9, dtype=torch.float64).to(memory_format=memory_format)
    expected, actual = gradients(theirs, x), gradients(ours, x)
    assert len(actual) == len(expected) == 3 + bias
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("kernel", "stride", "same"), [(7, 1, False), (5, 2, False), (5, 2, True), (5, 3, False)])
@pytest.mark.parametrize("side", [15, 16])
def test_in_half_precision_the_gradients_are_nearly_those_in_full(kernel: int, stride: int, same: bool, side: int):
    """Everything passed through bf16, and yet the weights and their gradients are float32."""
    theirs, ours = (conv.float() for conv in pair(kernel, stride, same))
    x = torch.randn(2, 4, side, 16)
    expected = gradients(theirs, x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(ours, x)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, *3 * [torch.float32]]
    for half, full in zip(actual, expected, strict=True):
        torch.testing.assert_close(half.float(), full, atol=0.02 * float(full.abs().max()), rtol=0)


def test_without_gradients_half_precision_is_the_one_asked_for():
    _, ours = (conv.float() for conv in pair())
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert ours(torch.zeros(1, 4, 8, 8)).dtype == torch.float16


def test_frozen_weights_get_no_gradient_and_the_input_does():
    theirs, ours = pair()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    expected = gradients(theirs, x)[:2]
    torch.testing.assert_close(gradients(ours.requires_grad_(False), x), expected)


def test_only_large_depthwise_kernels_are_replaced():
    def conv(*, groups: int = 4, kernel: int = 7, stride: int = 1, dilation: int = 1, mode: str = "zeros") -> nn.Conv2d:
        return nn.Conv2d(4, 4, kernel, stride, 3, dilation, groups, padding_mode=mode)

    replaced = [conv(), conv(stride=2)]
    kept = [conv(groups=1), conv(groups=2), conv(kernel=3), conv(dilation=2), conv(mode="reflect")]
    model = nn.Sequential(*replaced, *kept, nn.Conv2d(4, 8, 7, groups=4), nn.Conv2d(4, 4, 7, padding="same", groups=4))
    faster_depthwise(model)
    assert [isinstance(module, DepthwiseConv2d) for module in model] == [True] * 2 + [False] * 7


def test_a_convnext_keeps_the_names_of_its_weights_and_its_gradients():
    torch.manual_seed(0)
    theirs = shaken(timm.create_model("convnext_atto", features_only=True)).double()
    ours = copy.deepcopy(theirs)
    faster_depthwise(ours)
    assert sum(isinstance(module, DepthwiseConv2d) for module in ours.modules()) == 2 + 2 + 6 + 2
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    for model in (ours, theirs):
        torch.stack([level.square().sum() for level in model(x)]).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert min(float(grad.abs().max()) for grad in expected.values()) > 1e-3
    torch.testing.assert_close({name: parameter.grad for name, parameter in ours.named_parameters()}, expected)
