"""A model for use only, as fast as it gets: merged batch norms, half precision, compilation.

Not needed to understand the model.
"""

from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dfine.boxes import multiplies_bf16
from dfine.model.backbone import Backbone
from dfine.model.decoder import DecoderLayer
from dfine.model.hybrid_encoder import AIFI, RepNCSPELAN4, RepVGG
from dfine.model.layers import ConvNorm, FullPrecision

Model = TypeVar("Model", bound=nn.Module)


def deploy(model: Model, fast: bool = False) -> Model:
    """Makes a `DFine` faster, for use only: after this it can be neither trained nor saved.

    Batch norms become part of the convolutions before them, and every RepVGG block one convolution; the answers
    stay the same up to rounding.

    Args:
        fast: also channels-last memory; half precision (bf16 autocast), but not on a CPU where that is slower (see
            `multiplies_bf16`); and on a GPU compilation (see `compile_parts`). In half precision answers differ in
            the third digit. The model must be on its device; the first pages are slow where it compiles.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, ConvNorm):
            merge_norm(module)
    for module in model.modules():
        if isinstance(module, RepVGG):
            merge_branches(module)
        if isinstance(module, Backbone):
            merge_backbone(module)
    device = next(model.parameters()).device
    if fast:
        model.to(memory_format=torch.channels_last)
    if fast and multiplies_bf16(device):
        in_half(model, torch.bfloat16)  # once, not in every forward pass
    if fast:
        model.forward = FastForward(model)
    return model


class FastForward:
    """The forward pass of a `fast` model. A class, so that a model is pickled and copied with its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.compiled = model, False
        self.half = multiplies_bf16(next(model.parameters()).device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"compiled": False}  # torch leaves that out of a copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.model.parameters()).device.type
        if device == "cuda" and not self.compiled:
            compile_parts(self.model)
            self.compiled = True
        with torch.autocast(device, torch.bfloat16, enabled=self.half):
            return type(self.model).forward(self.model, *args, **kwargs)


def in_half(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores the weights that autocast would convert in every forward pass in half precision."""
    kept = {layer for module in model.modules() if isinstance(module, FullPrecision) for layer in module}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention) and module not in kept:
            module.to(dtype)


def compile_parts(model: nn.Module) -> None:
    """Compiles what repeats (the backbone's blocks, fusion blocks, decoder layers) and AIFI, in place.

    Modules of one shape share their code: it is compiled once for each, and serves every size of pages. The model
    as a whole would be one graph of everything repeated, which takes many times as long.
    """
    # Variants of a block that may exist: stages, with and without gradients, in both precisions (default: 8).
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    backbones = [module for module in model.modules() if isinstance(module, Backbone)]
    parts = [module for module in model.modules() if isinstance(module, RepNCSPELAN4 | AIFI | DecoderLayer)]
    for module in [*(block for backbone in backbones for block in repeated(backbone)), *parts]:
        module.compile(dynamic=True)


def repeated(module: nn.Module) -> list[nn.Module]:
    """The blocks of a model: the modules of one class that make up a chain, such as a stage of a ConvNeXt."""
    if isinstance(module, nn.Sequential | nn.ModuleList):
        blocks = Counter(type(part) for part in module if not isinstance(part, nn.Sequential) and any(part.children()))
        kind, count = max(blocks.items(), key=lambda item: item[1], default=(None, 0))
        if count > 1:
            return [part for part in module if type(part) is kind]
    return [block for part in module.children() for block in repeated(part)]


def merge_norm(layers: ConvNorm) -> None:
    """Lets the convolution do what the batch norm does in evaluation mode."""
    conv, norm = layers[0], layers[1]
    if isinstance(norm, nn.Identity):  # it has been done
        return
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    layers[0], layers[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()


@torch.no_grad()
def merge_branches(block: RepVGG) -> None:
    """Adds the 1x1 convolution to the middle of the 3x3; both must have taken in their batch norms."""
    if block.conv1 is None:  # it has been done
        return
    weight, bias = block.conv1[0].parameters()
    block.conv3[0].get_parameter("weight")[:, :, 1:2, 1:2].add_(weight)
    block.conv3[0].get_parameter("bias").add_(bias)
    block.conv1 = None


def merge_backbone(backbone: Backbone) -> None:
    """Lets convolutions do what the batch norms right behind them do in evaluation mode.

    Which those are is read off the traced graph. A backbone keeps its batch norms where it cannot be traced, and
    where the graph does not tell all: maps may be read by hooks, and a random page comes out otherwise.
    """
    body = backbone.body
    if not any(isinstance(module, nn.BatchNorm2d) for module in body.modules()):
        return
    try:
        nodes = ConvNormTracer().trace(body).nodes
    except (fx.proxy.TraceError, TypeError, RuntimeError):  # its forward depends on what it is fed
        return
    before, replaced = maps_of_random_page(backbone), dict[str, nn.Module]()
    for node in nodes:
        source = node.args[0] if node.op == "call_module" else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            continue
        conv, norm = body.get_submodule(source.target), body.get_submodule(node.target)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            replaced = {source.target: conv, node.target: norm} | replaced
            body.set_submodule(source.target, fuse_conv_bn_eval(conv, norm))
            # timm's batch norms may hold their activation.
            body.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    pairs = zip(before, maps_of_random_page(backbone), strict=True)
    if not all((a - b).abs().max() <= 1e-3 * a.abs().max() for a, b in pairs):
        for name, module in replaced.items():
            body.set_submodule(name, module)


class ConvNormTracer(fx.Tracer):
    """Records convolutions and batch norms as calls, also those that timm derives from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's layer norms ask for autocast, which depends on the device of what they are fed.
        whole = isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.LayerNorm)
        return whole or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def maps_of_random_page(backbone: Backbone) -> list[Tensor]:
    with torch.backends.cudnn.flags(allow_tf32=False):  # its rounding would hide small differences
        return backbone(backbone.random_page())
