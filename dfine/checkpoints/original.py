"""Reads checkpoints of the original implementation (github.com/Peterande/D-FINE; N, S, M, L and X).

    model = original.load("dfine_l_coco.pth")  # ready to detect the classes it was trained on

or `model.init_from=dfine_l_coco.pth` in a config. Architecture and weights come from the checkpoint's tensors, the
backbone is timm's HGNetV2. Whatever is left over on either side stops the reading and is named.

The original feeds images in [0, 1] as they are: mean 0, std 1. While training it freezes the backbone's stem and batch
norms of L and X; here they are ordinary ones, which in evaluation mode is the same.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from dfine.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from dfine.model.deformable_attention import DeformableAttention
from dfine.model.detector import DFine, class_dependent
from dfine.model.fdr import weighting_function

State = dict[str, Tensor]

ENCODER_HEADS = 8  # of every published size; the only number of the architecture that leaves no trace in the tensors
# Computed from the config: compared with ours, not loaded.
DERIVED = re.compile(r"^decoder\.(.+\.)?(anchors|valid_mask|up|reg_scale|num_points_scale)$")
COUNTER = "num_batches_tracked"  # of batch norms, read by none; frozen batch norms have none

# The original's names become ours by all of these in turn.
RENAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^backbone\.stages\.", "backbone.body.stages_"),
    (r"^backbone\.stem\.", "backbone.body.stem."),
    (r"^encoder\.input_proj\.", "encoder.projections."),
    (r"^encoder\.encoder\.0\.layers\.0\.", "encoder.aifi."),
    (r"^encoder\.aifi\.self_attn\.", "encoder.aifi.attention."),
    (r"^encoder\.lateral_convs\.", "encoder.laterals."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv1\.", r"encoder.downsamples.\1.0."),
    (r"^encoder\.downsample_convs\.(\d+)\.0\.cv2\.", r"encoder.downsamples.\1.1."),
    (r"^encoder\.fpn_blocks\.", "encoder.top_down."),
    (r"^encoder\.pan_blocks\.", "encoder.bottom_up."),
    (r"^(encoder\.\w+\.\d+)\.cv1\.", r"\1.stem."),
    (r"^(encoder\.\w+\.\d+)\.cv2\.", r"\1.first."),
    (r"^(encoder\.\w+\.\d+)\.cv3\.", r"\1.second."),
    (r"^(encoder\.\w+\.\d+)\.cv4\.", r"\1.head."),
    (r"\.(first|second)\.0\.conv1\.", r".\1.0.deep.0."),
    (r"\.(first|second)\.0\.conv2\.", r".\1.0.shallow."),
    (r"\.bottlenecks\.(\d+)\.conv1\.", lambda m: f".deep.{int(m[1]) + 1}.conv3."),  # named by place; ours by kernel
    (r"\.bottlenecks\.(\d+)\.conv2\.", lambda m: f".deep.{int(m[1]) + 1}.conv1."),
    (r"^decoder\.input_proj\.", "projections."),
    (r"^(encoder|projections)\.(.*)\.conv\.", r"\1.\2.0."),
    (r"^(encoder|projections)\.(.*)\.norm\.", r"\1.\2.1."),
    (r"^decoder\.decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.lqe.\1.mlp."),
    (r"^decoder\.decoder\.layers\.", "decoder.layers."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn\.sampling_offsets\.", ".cross_attention.offsets."),
    (r"\.cross_attn\.attention_weights\.", ".cross_attention.weights."),
    (r"\.gateway\.", ".gate."),
    (r"\.norm3\.", ".norm2."),
    (r"\.linear1\.", ".feedforward.0."),
    (r"\.linear2\.", ".feedforward.2."),
    (r"^decoder\.denoising_class_embed\.", "denoising_labels."),
    (r"^decoder\.query_pos_head\.", "decoder.position."),
    (r"^decoder\.enc_output\.proj\.", "selection.project."),
    (r"^decoder\.enc_output\.norm\.", "selection.norm."),
    (r"^decoder\.enc_score_head\.", "selection.class_head."),
    (r"^decoder\.enc_bbox_head\.", "selection.box_head."),
    (r"^decoder\.dec_score_head\.", "decoder.class_heads."),
    (r"^decoder\.dec_bbox_head\.", "decoder.edge_heads."),
    (r"^decoder\.pre_bbox_head\.", "decoder.initial_box."),
    (r"\.layers\.(\d+)\.(weight|bias)$", lambda m: f".{2 * int(m[1])}.{m[2]}"),  # of an MLP; ReLUs have numbers in ours
]


def our_name(name: str) -> str:
    """The name in our model of a tensor of the original; where there is none, some name that our model lacks."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def is_official(checkpoint: dict[str, Any]) -> bool:
    """Whether a loaded checkpoint is one of the original implementation."""
    state = _weights(checkpoint)
    return isinstance(state, dict) and "decoder.enc_score_head.weight" in state


def load(path: str | Path, classes: int | None = None) -> DFine:
    """The model of a published checkpoint, with its weights, in evaluation mode.

    Args:
        classes: None: those of the checkpoint. With another number class heads and denoising embedding start anew,
            which a warning says.
    Raises:
        ValueError: not a checkpoint of the original, or not all of it maps; names what does not.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not is_official(checkpoint):
        raise ValueError(f"{path}: not a checkpoint of the original implementation")
    trained_on = _rows(_weights(checkpoint), "decoder.enc_score_head.weight")
    model = DFine(model_config(checkpoint), classes or trained_on)
    state, anew = convert(checkpoint, model)
    model.load_state_dict(state, strict=False)
    if anew:
        warnings.warn(f"{path} has another number of classes; start anew: {', '.join(anew)}", stacklevel=2)
    return model.eval()


def convert(checkpoint: dict[str, Any], model: DFine) -> tuple[State, list[str]]:
    """The weights of an official checkpoint under the names of our model, and what of the model starts anew.

    Returns:
        All of the model's state dict but what starts anew; the names of that: class heads and denoising embedding if
        the number of classes differs, else none.
    Raises:
        ValueError: names every tensor that does not map, every one of ours without a counterpart, and everything of
            the config that contradicts the checkpoint.
    """
    theirs = _weights(checkpoint)
    own = model.state_dict()
    names = {name: our_name(name) for name in theirs if not DERIVED.search(name)}
    differ = _rows(theirs, "decoder.enc_score_head.weight") != model.selection.class_head.out_features
    anew = class_dependent(model) if differ else []

    state = {name: tensor for name, tensor in own.items() if name.endswith(COUNTER)}
    state |= {"mean": torch.zeros_like(own["mean"]), "std": torch.ones_like(own["std"])}
    state |= {ours: theirs[name] for name, ours in names.items() if ours not in anew}
    wrong = [f"{name} has no place" for name, ours in names.items() if ours not in own]
    wrong += [f"{name} has no counterpart" for name in own if name not in state and name not in anew]
    for name, ours in names.items():
        if ours in own and ours not in anew and theirs[name].shape != own[ours].shape:
            wrong.append(f"{name} {tuple(theirs[name].shape)} does not fit {ours} {tuple(own[ours].shape)}")
    wrong += _contradictions(theirs, model)
    if wrong:
        raise ValueError("the original's checkpoint does not fit this model:\n" + "\n".join(wrong))
    return state, anew


def model_config(checkpoint: dict[str, Any]) -> ModelConfig:
    """The architecture of an official checkpoint, read off the names and shapes of its tensors.

    Raises:
        ValueError: a tensor that tells the architecture is missing, or timm has no such backbone.
    """
    state = _weights(checkpoint)
    levels = _count(state, r"encoder\.input_proj\.(\d+)\.")
    dim, encoder_dim = _rows(state, "decoder.enc_output.proj.weight"), _rows(state, "encoder.input_proj.0.conv.weight")
    return ModelConfig(
        backbone=BackboneConfig(name=_backbone(state), pretrained=False),
        strides=tuple(32 >> level for level in reversed(range(levels))),  # all sizes end at stride 32
        hidden_dim=dim,
        encoder=EncoderConfig(
            hidden_dim=encoder_dim if encoder_dim != dim else 0,
            heads=ENCODER_HEADS,
            feedforward_dim=_rows(state, "encoder.encoder.0.layers.0.linear1.weight"),
            depth_mult=_count(state, r"encoder\.fpn_blocks\.0\.cv2\.0\.bottlenecks\.(\d+)\.") / 3,
            expansion=2 * _rows(state, "encoder.fpn_blocks.0.cv2.1.conv.weight") / encoder_dim,
        ),
        decoder=decoder_config(state),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def decoder_config(state: State) -> DecoderConfig:
    """The part of `model_config` that tensors under `decoder.` tell. The number of queries is not among it."""
    layer = "decoder.decoder.layers.0."
    points = tuple(_points(_tensor(state, f"{layer}cross_attn.num_points_scale")))
    a, c = _curve(state)
    return DecoderConfig(
        heads=_rows(state, f"{layer}cross_attn.sampling_offsets.weight") // (2 * sum(points)),
        feedforward_dim=_rows(state, f"{layer}linear1.weight"),
        layers=_count(state, r"decoder\.decoder\.layers\.(\d+)\."),
        points=points,
        bins=_rows(state, "decoder.dec_bbox_head.0.layers.2.weight") // 4 - 1,
        a=a,
        c=c,
    )


def _weights(checkpoint: dict[str, Any]) -> Any:
    """The state dict in a checkpoint: the averaged weights where there are any, as the original itself takes them."""
    average = checkpoint.get("ema")
    return average["module"] if isinstance(average, dict) and "module" in average else checkpoint.get("model")


def _contradictions(state: State, model: DFine) -> Iterator[str]:
    """Where the model would load the weights but compute something else with them."""
    decoder = decoder_config(state)
    points = next(module.points for module in model.modules() if isinstance(module, DeformableAttention))
    w = weighting_function(decoder.bins, decoder.a, decoder.c).to(model.decoder.w)
    if w.shape == model.decoder.w.shape and not torch.allclose(w, model.decoder.w):
        yield f"decoder.up, decoder.reg_scale: need model.decoder.a={decoder.a} and model.decoder.c={decoder.c}"
    for name, tensor in state.items():
        twin = name.removeprefix("decoder.")
        if name in ("decoder.decoder.up", "decoder.decoder.reg_scale") and not tensor.equal(_tensor(state, twin)):
            yield f"{name} is not {twin}"
        if name.endswith("num_points_scale") and tuple(_points(tensor)) != points:
            yield f"{name} needs model.decoder.points={list(_points(tensor))}"
    if model.encoder.aifi.attention.num_heads != ENCODER_HEADS:
        yield f"encoder.encoder.0.layers.0.self_attn: needs model.encoder.heads={ENCODER_HEADS}"


def _curve(state: State) -> tuple[float, float]:
    """(a, c) of W(n); the original computes with the absolute values of up = a and reg_scale = 1 / c."""
    return abs(_tensor(state, "decoder.up").item()), 1 / abs(_tensor(state, "decoder.reg_scale").item())


def _points(scale: Tensor) -> Iterator[int]:
    """Sampled points of each level; a level of p points stores 1 / p for each of them."""
    while len(scale):
        points = round(1 / scale[0].item())
        yield points
        scale = scale[points:]


def _backbone(state: State) -> str:
    """The HGNetV2 of timm that has the checkpoint's tensors."""
    ours = {our_name(name): tensor for name, tensor in state.items() if name.startswith("backbone.")}
    shapes = {name.removeprefix("backbone.body."): x.shape for name, x in ours.items() if not name.endswith(COUNTER)}
    for candidate in timm.list_models("hgnetv2_*"):
        with torch.device("meta"):  # names and shapes without memory
            body = timm.create_model(candidate, features_only=True).state_dict()
        if {name: x.shape for name, x in body.items() if not name.endswith(COUNTER)} == shapes:
            return candidate
    raise ValueError(f"timm {timm.__version__} has no HGNetV2 with the {len(shapes)} tensors of this backbone")


def _tensor(state: State, name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"the original's checkpoint lacks {name}")
    return state[name]


def _rows(state: State, name: str) -> int:
    return _tensor(state, name).shape[0]


def _count(state: State, pattern: str) -> int:
    """How many different numbers the pattern finds at the start of names."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})
