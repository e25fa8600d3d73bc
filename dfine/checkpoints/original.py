"""Reads and writes checkpoints of the original implementation (github.com/Peterande/D-FINE; N, S, M, L and X).

Architecture and weights come from the checkpoint's tensors, the backbone is timm's HGNetV2. A tensor that is left over
on either side is an error that names it.

The original feeds images in [0, 1] as they are: mean 0, std 1. While training it freezes the backbone's stem and batch
norms of L and X; here they are ordinary ones, which in evaluation mode is the same.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from pydantic import ValidationError
from torch import Tensor

from dfine.checkpoints.names import renamed
from dfine.checkpoints.ours import CheckpointError
from dfine.config import BackboneConfig, DataConfig, DecoderConfig, EncoderConfig, ModelConfig
from dfine.model.detector import DFine, class_dependent

State = dict[str, Tensor]

# Computed from the config: compared with ours, not loaded.
DERIVED = re.compile(r"^decoder\.(.+\.)?(anchors|valid_mask|up|reg_scale|num_points_scale)$")
COUNTER = "num_batches_tracked"  # of batch norms, read by none; frozen batch norms have none

HGNETV2 = "hgnetv2_"  # how timm's names of these backbones start
SQUASHED = DataConfig(sizing="squash", short_edges=(640,), eval_short_edge=640)  # as every published size was trained


class Foreign(NamedTuple):
    """A checkpoint of another implementation."""

    state: State  # by the original's names
    names: list[str] | None = None  # of the classes, in the order of their rows; None: it does not say
    # The numbers of the architecture that leave no trace in the tensors, as in every published checkpoint.
    encoder_heads: int = 8
    queries: int = 300
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)  # of RGB in [0, 1]
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    data: DataConfig = SQUASHED
    layout: str = "original"  # whose names the file has: a column of `names.TABLE`
    # Of a backbone that is timm's there too: its name, and the strides of its maps. Else it is an HGNetV2.
    backbone: str = ""
    strides: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        return _rows(self.state, "decoder.enc_score_head.weight")

    @property
    def levels(self) -> int:
        return _count(self.state, r"encoder\.input_proj\.(\d+)\.")


def our_name(name: str) -> str:
    """The name in our model of a tensor of the original; where there is none, some name that our model lacks."""
    return renamed(name, "original", "ours") or f"(none for {name})"


def is_official(checkpoint: dict[str, Any]) -> bool:
    """Whether a loaded checkpoint is one of the original implementation."""
    state = _weights(checkpoint)
    return isinstance(state, dict) and "decoder.enc_score_head.weight" in state


def opened(checkpoint: dict[str, Any]) -> Foreign:
    """A loaded checkpoint of the original; it does not name its classes."""
    return Foreign(_weights(checkpoint))


@contextmanager
def one_line(path: str | Path, foreign: Foreign) -> Iterator[None]:
    """Makes any error about a checkpoint one line, which names the file and calls tensors as the file does.

    Raises:
        CheckpointError: instead of any other ValueError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        said = (
            error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
        )
        first, *others = said.splitlines()
        text = f"{first} {first_few(others)}".strip().replace(" has no counterpart", " is missing")
        text = re.sub(r"[\w.]+\w", lambda m: _name_in(foreign, m[0]), text)
        raise CheckpointError(f"{path}: {text}{kin(foreign.state)}") from error


def first_few(lines: list[str]) -> str:
    """Some of what is wrong, in one line."""
    return "; ".join(lines[:5]) + (f"; ... ({len(lines)} in all)" if len(lines) > 5 else "")


def _name_in(foreign: Foreign, name: str) -> str:
    layout, timm = foreign.layout, bool(foreign.backbone)
    return renamed(name, "original", layout, timm) or renamed(name, "ours", layout, timm) or name


def kin(names: Iterable[str]) -> str:
    """Which relative of D-FINE tensors belong to, for people; empty if they may be D-FINE's."""
    text = " ".join(names)
    if "swish_ffn" in text:
        return " (it is DEIMv2's)"
    return " (it looks like RT-DETR's)" if ".value_proj." in text else ""


def translated(foreign: Foreign, model: DFine) -> State:
    """The state dict of our model, whose config must mean the same, from another implementation's checkpoint.

    Class heads and denoising embedding have a row for each class of the checkpoint, whatever classes the model has. The
    embedding, which only training needs, may be missing.

    Raises:
        ValueError: names every tensor that does not map, every one of ours without a counterpart, and copies of a
            number that differ.
    """
    theirs, own = foreign.state, model.state_dict()
    names = {name: our_name(name) for name in theirs if not DERIVED.search(name)}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    for name in class_dependent(model):
        rows = shapes[name][0] - model.classes + foreign.classes
        shapes[name] = torch.Size((rows, *shapes[name][1:]))

    state = {name: tensor for name, tensor in own.items() if name.endswith(COUNTER)}
    for name, numbers in (("mean", foreign.mean), ("std", foreign.std)):
        state[name] = torch.tensor(numbers).view_as(own[name])
    state |= {ours: theirs[name] for name, ours in names.items()}
    wrong = [f"{name} has no place" for name, ours in names.items() if ours not in own]
    wrong += [f"{name} has no counterpart" for name in own if name not in state and name != "denoising_labels.weight"]
    for name, ours in names.items():
        if ours in own and theirs[name].shape != shapes[ours]:
            wrong.append(f"{name} {tuple(theirs[name].shape)} does not fit {ours} {tuple(shapes[ours])}")
    wrong += _contradictions(theirs)
    if wrong:
        raise ValueError("the checkpoint does not fit this model:\n" + "\n".join(wrong))
    return state


def state_of(model: DFine, config: ModelConfig) -> State:
    """A model's weights as the original saves them, with what it derives from its own config.

    A backbone that the original does not have keeps timm's names, under `backbone.timm`.

    Left out are mean and std, which the original does not have: it feeds images in [0, 1] as they are. Its anchors are
    those of images of 640x640 pixels.
    """
    own, timm = model.state_dict(), not config.backbone.name.startswith(HGNETV2)
    state = {theirs: own[name] for name in own if (theirs := renamed(name, "ours", "original", timm))}
    curve = {"up": torch.tensor([config.decoder.a]), "reg_scale": torch.tensor([1 / config.decoder.c])}
    state |= {f"decoder.{part}{name}": x.clone() for name, x in curve.items() for part in ("", "decoder.")}
    scale = torch.tensor([1 / points for points in config.decoder.points for _ in range(points)])
    for layer in range(config.decoder.layers):
        state[f"decoder.decoder.layers.{layer}.cross_attn.num_points_scale"] = scale.clone()
    maps = [(640 // stride, 640 // stride) for stride in config.strides]
    anchors, valid = model.selection.anchors(maps, None, model.mean)  # (1, S, 4), (1, S)
    state["decoder.anchors"] = anchors.logit().masked_fill(~valid[..., None], torch.inf)
    state["decoder.valid_mask"] = valid[..., None]
    return state


def architecture(foreign: Foreign) -> ModelConfig:
    """The architecture of a checkpoint, read off the names and shapes of its tensors.

    Raises:
        ValueError: a tensor that tells the architecture is missing, or timm has no such backbone.
    """
    state, levels = foreign.state, foreign.levels
    dim, encoder_dim = _rows(state, "decoder.enc_output.proj.weight"), _rows(state, "encoder.input_proj.0.conv.weight")
    return ModelConfig(
        backbone=BackboneConfig(name=foreign.backbone or _backbone(state), pretrained=False),
        # All sizes that are published end at stride 32.
        strides=foreign.strides or tuple(32 >> level for level in reversed(range(levels))),
        hidden_dim=dim,
        encoder=EncoderConfig(
            hidden_dim=encoder_dim if encoder_dim != dim else 0,
            heads=foreign.encoder_heads,
            feedforward_dim=_rows(state, "encoder.encoder.0.layers.0.linear1.weight"),
            depth_mult=_count(state, r"encoder\.fpn_blocks\.0\.cv2\.0\.bottlenecks\.(\d+)\.") / 3,
            expansion=2 * _rows(state, "encoder.fpn_blocks.0.cv2.1.conv.weight") / encoder_dim,
        ),
        decoder=decoder_config(state, foreign.queries),
        mean=foreign.mean,
        std=foreign.std,
    )


def decoder_config(state: State, queries: int = 300) -> DecoderConfig:
    """The part of `architecture` that tensors under `decoder.` tell; they do not tell the number of queries."""
    layer = "decoder.decoder.layers.0."
    points = _points(state, f"{layer}cross_attn.num_points_scale")
    a, c = abs(_number(state, "decoder.up")), 1 / abs(_number(state, "decoder.reg_scale"))
    return DecoderConfig(
        heads=_rows(state, f"{layer}cross_attn.sampling_offsets.weight") // (2 * sum(points)),
        feedforward_dim=_rows(state, f"{layer}linear1.weight"),
        layers=_count(state, r"decoder\.decoder\.layers\.(\d+)\."),
        points=points,
        queries=queries,
        bins=_rows(state, "decoder.dec_bbox_head.0.layers.2.weight") // 4 - 1,
        a=a,
        c=c,
    )


def _weights(checkpoint: dict[str, Any]) -> Any:
    """The state dict in a checkpoint: the averaged weights where there are any, as the original itself takes them."""
    average = checkpoint.get("ema")
    return average["module"] if isinstance(average, dict) and "module" in average else checkpoint.get("model")


def _contradictions(state: State) -> Iterator[str]:
    """Where copies of a number that our model has once differ."""
    points = _points(state, "decoder.decoder.layers.0.cross_attn.num_points_scale")
    for name, tensor in state.items():
        twin = name.removeprefix("decoder.")
        if name in ("decoder.decoder.up", "decoder.decoder.reg_scale") and not tensor.equal(_tensor(state, twin)):
            yield f"{name} is not {twin}"
        if name.endswith("num_points_scale") and _points(state, name) != points:
            yield f"{name} has the points {list(_points(state, name))}, layer 0 has {list(points)}"


def _number(state: State, name: str) -> float:
    """up = a or reg_scale = 1 / c of W(n); the original computes with their absolute values."""
    tensor = _tensor(state, name)
    if tensor.numel() != 1 or not tensor.isfinite().all() or not tensor.any():
        raise ValueError(f"{name} must be one number other than 0, found {tensor.flatten()[:5].tolist()}")
    return tensor.item()


def _points(state: State, name: str) -> tuple[int, ...]:
    """Sampled points of each level; a level of p points stores 1 / p for each of them."""
    rest, points = _tensor(state, name).flatten().tolist(), []
    while rest:
        p = round(1 / rest[0]) if 0 < rest[0] < math.inf else 0
        if not 1 <= p <= len(rest) or any(abs(p * x - 1) > 0.01 for x in rest[:p]):
            raise ValueError(f"{name} must hold 1 / p for each of the p points of a level, found {rest[:5]}")
        points.append(p)
        rest = rest[p:]
    return tuple(points)


def _backbone(state: State) -> str:
    """The HGNetV2 of timm that has the checkpoint's tensors."""
    ours = {our_name(name): tensor for name, tensor in state.items() if name.startswith("backbone.")}
    shapes = {name.removeprefix("backbone.body."): x.shape for name, x in ours.items() if not name.endswith(COUNTER)}
    for candidate, its_shapes in _hgnets().items():
        if its_shapes == shapes:
            return candidate
    if any(name.startswith("backbone.timm.") for name in state):
        raise ValueError("only a config.json in the same folder can say which backbone of timm it has")
    raise ValueError(f"timm {timm.__version__} has no HGNetV2 with the {len(shapes)} tensors of this backbone")


@cache
def _hgnets() -> dict[str, dict[str, torch.Size]]:
    """Names and shapes of the tensors of every HGNetV2 of timm."""
    with torch.device("meta"):  # without memory
        bodies = {name: timm.create_model(name, features_only=True) for name in timm.list_models(f"{HGNETV2}*")}
    return {
        name: {key: x.shape for key, x in body.state_dict().items() if not key.endswith(COUNTER)}
        for name, body in bodies.items()
    }


def _tensor(state: State, name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the checkpoint lacks {name}")
    return state[name]


def _rows(state: State, name: str) -> int:
    tensor = _tensor(state, name)
    if not tensor.dim():
        raise ValueError(f"{name} is a single number")
    return tensor.shape[0]


def _count(state: State, pattern: str) -> int:
    """How many different numbers the pattern finds at the start of names."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})
