"""Small parts of the model, and how they start."""

import torch
from torch import Tensor, nn

from dfine.boxes import full_precision


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them."""
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class FullPrecision(nn.Sequential):
    """Layers that autocast leaves in fp32, for boxes: bf16 keeps a place on the page to 1 part in 256 to 512."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"
        with torch.autocast(device, enabled=False):
            return super().forward(full_precision(x))


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps the size (at stride 1), batch norm, and an activation if one is given."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), *([act] if act else []))


def class_head(dim: int, classes: int) -> nn.Linear:
    """Linear class scores that start at 1%: bias -ln 99."""
    head = nn.Linear(dim, classes)
    nn.init.constant_(head.bias, -torch.tensor(99.0).log().item())
    return head


def zero_last(layers: nn.Sequential) -> nn.Sequential:
    """The MLP, made to answer 0 until it is trained."""
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers


def xavier(layers: nn.Sequential) -> nn.Sequential:
    """The layers with Xavier-uniform weights."""
    for parameter in layers.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return layers
