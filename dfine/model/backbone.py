"""Any timm `features_only` model at the configured strides."""

import difflib
import inspect
import math
import warnings
from importlib import resources
from typing import Any

import timm
import torch
from timm.layers import Format, is_fast_norm, set_fast_norm
from timm.models import load_state_dict
from torch import Tensor, nn

from dfine.config import BackboneConfig, ConfigError
from dfine.model.cpu_kernels import faster_depthwise
from dfine.model.pyramid import SOURCE

PACKAGE = "package:"  # weights=package:NAME/FILE is a file inside an installed package


class Backbone(nn.Module):
    """Maps at the given strides; `channels`, `mean` and `std` are what timm says of the model.

    A plain vision transformer has one stride alone: there is one map then, that of its last block, and `plain` is True.

    Raises:
        ConfigError: timm knows no such model, it lacks a stride, or its weights cannot be had.
    """

    def __init__(self, config: BackboneConfig, strides: tuple[int, ...]) -> None:
        super().__init__()
        body = _create(config)
        reductions = body.feature_info.reduction()
        self.plain = len(set(reductions)) == 1
        if self.plain:
            self.indices, body = [0], _create_plain(config, body, strides)
        else:
            missing = [stride for stride in strides if stride not in reductions]
            if missing:
                raise ConfigError(f"model.strides: {config.name} has strides {reductions}, but not {missing}")
            self.indices = [reductions.index(stride) for stride in strides]
            kwargs: dict[str, Any] = {}
            if self.indices[-1] + 1 < len(reductions):  # later stages would be parameters without a gradient
                kwargs["out_indices"] = range(self.indices[-1] + 1)
            if body.pretrained_cfg.get("fixed_input_size"):
                body = _create_for_any_size(config, body, strides[-1], kwargs)
            elif kwargs:
                body = _create(config, **kwargs)
        if config.checkpointing:
            if not hasattr(body, "set_grad_checkpointing"):
                raise ConfigError(f"model.backbone.checkpointing: timm offers none for the maps of {config.name}")
            body.set_grad_checkpointing()
            for part in body.children():  # timm <= 1.0.30 would recompute from overwritten activations
                if hasattr(part, "inplace"):
                    part.inplace = False
        faster_depthwise(body)
        self.body = body
        self.channels_behind = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC
        self.channels = [body.feature_info.channels()[i] for i in self.indices]
        said = body.pretrained_cfg  # of the created model: a name with a scheme, such as `hf-hub:`, has its own
        self.side = math.ceil(said.get("input_size", (3, 224, 224))[-1] / strides[-1]) * strides[-1]
        self.mean = tuple(said.get("mean", (0.485, 0.456, 0.406)))  # ImageNet's
        self.std = tuple(said.get("std", (0.229, 0.224, 0.225)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised -> a (B, channels, H / stride, W / stride) map for each stride it has."""
        maps = self.body(images)
        maps = [maps[i] for i in self.indices]
        return [x.permute(0, 3, 1, 2) for x in maps] if self.channels_behind else maps

    def freeze_unused(self) -> None:
        """Freezes weights that no map depends on, such as HRNet's for a stride of 4: DDP would wait for a gradient."""
        training = self.training
        self.eval()  # leaves batch-norm statistics alone
        with torch.enable_grad():
            total = torch.stack([x.sum() for x in self(self.random_page())]).sum()
        self.train(training)
        weights = list(self.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(total, weights, allow_unused=True), strict=True):
            weight.requires_grad_(gradient is not None)

    def random_page(self) -> Tensor:
        """Normalised noise in the size of timm's weights. Leaves torch's global generator alone."""
        page = torch.randn(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        return page.to(next(self.parameters()))


def _create(config: BackboneConfig, **kwargs: Any) -> Any:
    if config.weights and not config.pretrained:
        raise ConfigError(
            f"model.backbone.weights: {config.weights} is read with model.backbone.pretrained=true only: set that, or "
            "leave weights out"
        )
    others = is_fast_norm()
    set_fast_norm()  # under autocast timm's layer norms read and write bf16, and compute in fp32 all the same
    try:
        if config.pretrained and config.weights:
            kwargs["pretrained_cfg_overlay"] = {"state_dict": _read_weights(config)}
        return timm.create_model(config.name, pretrained=config.pretrained, features_only=True, **kwargs)
    except Exception as error:
        raise ConfigError(_advice(config, error)) from error
    finally:
        set_fast_norm(others)  # as it was for models other than this one


def _read_weights(config: BackboneConfig) -> dict[str, Tensor]:
    """The tensors of `weights` by timm's names.

    A file with none of timm's names is of another implementation. It fits if in the same order all its tensors have the
    same shapes and the same last part of the name (weight, bias, running_mean, ...).
    """
    name = config.weights
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        with resources.as_file(resources.files(package) / inside) as file:
            state = load_state_dict(str(file))
    else:
        state = load_state_dict(name)
    own = timm.create_model(config.name).state_dict()
    if own.keys() & state.keys() or [_kind(*item) for item in own.items()] != [_kind(*item) for item in state.items()]:
        return state
    warnings.warn(f"{name}: none of its names are timm's; its {len(own)} tensors fit in order", stacklevel=2)
    return dict(zip(own, state.values(), strict=True))


def _kind(name: str, tensor: Tensor) -> tuple[str, torch.Size]:
    return name.rpartition(".")[2], tensor.shape


def _create_plain(config: BackboneConfig, body: Any, strides: tuple[int, ...]) -> Any:
    """A model of one stride with the map of its last block alone, ready for pages of any size.

    Raises:
        ConfigError: no pyramid of these strides can be made of it, or it takes pages of one size alone.
    """
    (stride, *_), name = body.feature_info.reduction(), config.name
    if stride != SOURCE:
        raise ConfigError(
            f"model.backbone.name: {name} has stride {stride} alone; a pyramid is made of stride {SOURCE}"
        )
    missing = [stride for stride in strides if stride not in (8, 16, 32)]
    if missing:
        raise ConfigError(
            f"model.strides: {name} has stride {SOURCE} alone; a pyramid of it has 8, 16 and 32, but not {missing}"
        )
    any_size = {"dynamic_img_size": True}
    takes = inspect.signature(type(body.model)).parameters  # others are ready, or have no positions to resize
    body = _create(config, out_indices=(-1,), **(any_size if any_size.keys() <= takes.keys() else {}))
    if not _takes_any_size(body, strides[-1]):
        raise ConfigError(f"model.backbone.name: timm's {name} takes pages of one size alone")
    return body


def _create_for_any_size(config: BackboneConfig, body: Any, stride: int, kwargs: dict[str, Any]) -> Any:
    """A model that timm takes for one of a single input size, made for any.

    Raises:
        ConfigError: pages of another shape do not go through it.
    """
    for option in ({}, {"strict_img_size": False}, {"dynamic_img_size": True}):
        try:
            body = _create(config, **kwargs, **option) if kwargs or option else body
        except ConfigError:  # timm's class has no such option
            continue
        if _takes_any_size(body, stride):
            return body
    raise ConfigError(f"model.backbone.name: timm's {config.name} takes pages of one size alone")


@torch.no_grad()
def _takes_any_size(body: Any, stride: int) -> bool:
    """Whether pages go through that are longer on one side than those of timm's weights, and shorter on the other."""
    training, (_, _, side) = body.training, body.pretrained_cfg.get("input_size", (3, 224, 224))
    long, short = (2 * math.ceil(side / stride) + 1) * stride, 3 * stride
    body.eval()
    try:
        for height, width in ((long, short), (short, long)):
            body(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, IndexError, ValueError):  # each family has its own
        return False
    finally:
        body.train(training)
    return True


def _advice(config: BackboneConfig, error: Exception) -> str:
    """What to do about a backbone that timm would not make."""
    architecture, _, tag = config.name.partition(".")
    if ":" in config.name:
        return f"model.backbone.name: cannot make {config.name} ({type(error).__name__}: {error})"
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{architecture}*")[:5]
        near = near or difflib.get_close_matches(architecture, timm.list_models(), n=5)
        advice = f"; similar: {', '.join(near)}" if near else ""
        return f"model.backbone.name: timm {timm.__version__} has no model {config.name!r}{advice}"
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and config.name not in tagged:
        return f"model.backbone.name: timm {timm.__version__} has no {config.name!r}; known: {', '.join(tagged)}"
    if not config.pretrained:
        return f"model.backbone.name: timm cannot make {config.name} with features_only: {error}"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"model.backbone.weights: the package of {config.weights} is not installed "
            f"({error}); that of configs/pages.yaml comes with pip install 'dfine[pages]'"
        )
    if config.weights:
        return f"model.backbone.weights: cannot load {config.weights} into {config.name}: {error!r}"
    pretrained_cfg = timm.get_pretrained_cfg(config.name)
    source = pretrained_cfg and (pretrained_cfg.hf_hub_id or pretrained_cfg.url)
    if not source:
        return f"model.backbone.pretrained: timm has no weights for {config.name}; set it to false"
    return (
        f"model.backbone.pretrained: cannot get the weights of {config.name} ({type(error).__name__}: {error}). "
        f"Without network, fetch model.safetensors of {source} on the Hugging Face hub elsewhere and name the file "
        "with model.backbone.weights=PATH, or train from random weights with model.backbone.pretrained=false"
    )
