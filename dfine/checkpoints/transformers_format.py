"""Reads and writes D-FINE checkpoints in the layout of `transformers`, which is that of the Hugging Face hub.

Such a checkpoint is a folder with config.json, model.safetensors and preprocessor_config.json. Its weights are the
original's under other names (`names.TABLE`), and again the architecture comes from the tensors: config.json adds what
leaves no trace in them, and must not contradict them.

The backbone is an HGNetV2 of transformers' own, which is read off its tensors too, or one of timm, which config.json
names. Of the two ways to name it, both are read, and the one is written that transformers 4 and 5 read.
"""

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Format
from torch import nn

from dfine import config as configs
from dfine.checkpoints import original
from dfine.checkpoints.names import renamed
from dfine.checkpoints.original import COUNTER, Foreign, State, first_few, one_line
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, DataConfig, ModelConfig
from dfine.data.transforms import model_size
from dfine.model.detector import DFine

SETTINGS, WEIGHTS, PREPROCESSING = "config.json", "model.safetensors", "preprocessor_config.json"
# Names that transformers 5 has in memory, but does not write.
IN_MEMORY = {
    ".encoder.aifi.": ".encoder.encoder.",
    ".o_proj.": ".out_proj.",
    ".mlp.layers.0.": ".fc1.",
    ".mlp.layers.1.": ".fc2.",
}
DERIVED = re.compile(r"(^|\.)(anchors|valid_mask)$")  # in some older files
BILINEAR = 2  # Pillow's number
# What D-FINE's image processor does where preprocessor_config.json does not say it, and its names.
PROCESSOR: dict[str, Any] = {
    "size": {"height": 640, "width": 640},
    "rescale_factor": 1 / 255,
    "do_normalize": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_pad": False,
    "pad_size": None,
}
PROCESSORS = ("RTDetrImageProcessor", "RTDetrImageProcessorFast", "RTDetrImageProcessorPil")

# What our models compute with, whatever their config says.
FIXED: dict[str, Any] = {
    "activation_function": "silu",
    "encoder_activation_function": "gelu",
    "decoder_activation_function": "relu",
    "positional_encoding_temperature": 10000,
    "normalize_before": False,
    "learn_initial_query": False,
    "encoder_layers": 1,
    "eval_idx": -1,
    "layer_scale": 1,
    "decoder_method": "default",
    "decoder_offset_scale": 0.5,
    "top_prob_values": 4,
    "lqe_hidden_dim": 64,
    "lqe_layers": 2,
    "layer_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
}
# And of a backbone of timm.
FIXED_TIMM: dict[str, Any] = {"num_channels": 3, "features_only": True, "output_stride": None}
UNREAD = ("encoder_in_channels", "feat_strides")  # transformers looks at its maps instead


# Reading


def read(path: Path) -> Foreign:
    """A folder with config.json, model.safetensors and preprocessor_config.json, or a model.safetensors alone.

    A file alone does not name its classes, and is taken for one as they are published: 8 attention heads in the
    encoder, 300 queries, pages squashed to 640x640 pixels. A folder may lack preprocessor_config.json.

    Raises:
        CheckpointError: missing or damaged, of another model, or files contradict each other; names the file.
    """
    if not path.is_dir():
        return Foreign(by_original_names(path), layout="transformers")
    where = path / SETTINGS
    if not where.exists():
        raise CheckpointError(f"{path}: a folder without {SETTINGS} and {WEIGHTS}; of a run name a file, as best.pt")
    settings = _json(where)
    kind = settings.get("model_type", "d_fine")
    if kind != "d_fine":
        raise CheckpointError(f"{where}: model_type is {kind!r}: another model than D-FINE, whose is 'd_fine'")
    state = by_original_names(path / WEIGHTS)
    whole = {key: settings.get(key, default) for key, default in (("encoder_attention_heads", 8), ("num_queries", 300))}
    for key, value in whole.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{where}: {key} must be a whole number, 1 or more, found {value!r}")
    foreign = Foreign(state, None, *whole.values(), **_preprocessing(path / PREPROCESSING))
    told = _timm_told(settings)
    with one_line(path / WEIGHTS, foreign):
        if told is not None:
            frozen = settings.get("freeze_backbone_batch_norms", True) and not told.get("freeze_batch_norm_2d")
            strides = _strides(told, frozen, foreign.levels, where)
            foreign = foreign._replace(backbone=told["backbone"], strides=strides)
            settings["backbone_config"] = told
        config = original.architecture(foreign)
        facts = _facts(config, state, FIXED_TIMM if told is not None else _hgnetv2(state, foreign.levels))
        foreign = foreign._replace(names=_class_names(settings, where, foreign.classes))
    facts = {key: fact for key, fact in facts.items() if key not in UNREAD}
    wrong = list(_contradictions(settings, facts, facts["encoder_hidden_dim"]))
    if wrong:
        raise CheckpointError(f"{where}: contradicts {WEIGHTS}: {first_few(wrong)}")
    return foreign


def by_original_names(path: Path) -> State:
    """The tensors of a model.safetensors as the original has them in a checkpoint.

    Raises:
        CheckpointError: missing, damaged or not D-FINE's.
    """
    state: State = {}
    unknown = []
    tensors = _tensors(path)
    if original.is_official({"model": tensors}):
        return tensors
    for name, tensor in tensors.items():
        full = f"model.decoder.{name}" if name.startswith(("class_embed.", "bbox_embed.")) else name
        for memory, file in IN_MEMORY.items():
            full = full.replace(memory, file)
        theirs = renamed(full, "transformers", "original")
        if theirs is None and not DERIVED.search(name):
            unknown.append(name)
        elif theirs is not None and not state.setdefault(theirs, tensor).equal(tensor):  # heads may be there twice
            raise CheckpointError(f"{path}: {name} is there twice, with different numbers")
    if unknown or not state:
        found = f"{len(unknown)} of its {len(tensors)} tensors have no place, such as {', '.join(sorted(unknown)[:3])}"
        raise CheckpointError(f"{path}: not D-FINE as transformers has it{original.kin(tensors)}: {found}")
    for query in [name for name in state if ".q_proj." in name]:
        parts = [query.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        missing = [part for part in parts if part not in state]
        if missing:
            raise CheckpointError(f"{path}: lacks {renamed(missing[0], 'original', 'transformers')}")
        state[query.replace(".q_proj.", ".in_proj_")] = torch.cat([state.pop(part) for part in parts])
    return state


def _tensors(path: Path) -> State:
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except Exception as error:  # safetensors and torch have several kinds for a header that does not fit its file
        raise CheckpointError(f"{path}: damaged or not safetensors ({' '.join(str(error).split())})") from error
    for name, tensor in tensors.items():
        if not name.endswith(COUNTER) and not DERIVED.search(name):
            if not tensor.is_floating_point():
                raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
            tensors[name] = tensor = tensor.float()
            if not tensor.isfinite().all():
                raise CheckpointError(f"{path}: {name} is not finite")
    return tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold keys and values, found {type(content).__name__}")
    return content


def _class_names(settings: dict[str, Any], path: Path, classes: int) -> list[str] | None:
    names, count = settings.get("id2label"), settings.get("num_labels")
    if names is None and count in (None, classes):
        return None
    numbers = [str(i) for i in range(classes)]
    if not isinstance(names, dict) or sorted(names) != sorted(numbers):
        found = f"{len(names)} names" if isinstance(names, dict) else f"num_labels={count!r}"
        raise CheckpointError(f"{path}: id2label must name the classes 0 to {classes - 1} of {WEIGHTS}, found {found}")
    return [str(names[number]) for number in numbers]


def _timm_told(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of a backbone of timm, in either way, as its `backbone_config`; None: it has none.

    transformers 4 has use_timm_backbone, backbone and backbone_kwargs at the top, and 5 a backbone_config.
    """
    told, more = settings.get("backbone_config"), settings.get("backbone_kwargs")
    if settings.get("use_timm_backbone") and told is None:
        return {"backbone": settings.get("backbone")} | (more if isinstance(more, dict) else {})
    return told if isinstance(told, dict) and told.get("model_type") == "timm_backbone" else None


def _strides(told: dict[str, Any], frozen: bool, levels: int, path: Path) -> tuple[int, ...]:
    """Those of a timm backbone's maps.

    Args:
        frozen: transformers freezes its batch norms. levels: maps that the encoder takes. path: of config.json.
    Raises:
        CheckpointError: timm has no such backbone, or transformers or our models would compute something else with it.
    """
    name, indices = str(told.get("backbone")), told.get("out_indices")
    if not isinstance(indices, list) or not all(type(i) is int for i in indices) or len(indices) != levels:
        raise CheckpointError(f"{path}: out_indices must be the numbers of {levels} maps, found {indices!r}")
    try:
        with torch.device("meta"):  # without memory
            body: Any = timm.create_model(name, features_only=True)
    except Exception as error:  # timm and its models have many kinds
        what = " ".join(str(error).split())
        raise CheckpointError(f"{path}: timm {timm.__version__} cannot make the backbone {name!r} ({what})") from error
    reductions = body.feature_info.reduction()
    if not all(-len(reductions) <= i < len(reductions) for i in indices):
        raise CheckpointError(f"{path}: out_indices are {indices}, {name} has {len(reductions)} maps")
    strides = tuple(reductions[i] for i in indices)
    ours = [reductions.index(stride) for stride in strides]
    if ours != [i % len(reductions) for i in indices]:
        raise CheckpointError(f"{path}: out_indices are {indices}: of each stride dfine takes the first map, {ours}")
    reasons = _differs_there(body, frozen)
    if reasons:
        raise CheckpointError(f"{path}: with {name} transformers computes something else than timm: {reasons}")
    return strides


def _differs_there(body: nn.Module, frozen: bool) -> str:
    """Why transformers computes something else with a backbone of timm; empty if it does not.

    Args:
        frozen: it replaces all batch norms, as it does by default, by its own of eps 1e-5 without an activation.
    """
    norms = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)]
    active = [norm for norm in norms if not isinstance(getattr(norm, "act", nn.Identity()), nn.Identity)]
    reasons = []
    if frozen and active:
        kinds = f"{len(active)} of its {len(norms)} batch norms are timm's {type(active[0]).__name__}"
        reasons.append(f"{kinds}, whose activations are lost where transformers freezes them")
    other = {norm.eps for norm in norms} - {FIXED["batch_norm_eps"]}
    if frozen and other:
        reasons.append(f"its batch norms have eps {min(other)}, and {FIXED['batch_norm_eps']} where it freezes them")
    if getattr(body, "output_fmt", Format.NCHW) != Format.NCHW:
        reasons.append("its maps have their channels last, where transformers expects them first")
    return "; ".join(reasons)


def _preprocessing(path: Path) -> dict[str, Any]:
    """mean, std and data of a `Foreign`, and its layout. Warns of what is not done exactly as there."""
    read: dict[str, Any] = {"layout": "transformers"}
    if not path.exists():
        return read
    settings = PROCESSOR | _json(path)
    known = {"do_resize": (True,), "do_rescale": (True,), "resample": (BILINEAR,), "do_center_crop": (False,)}
    for key, values in (known | {"image_processor_type": PROCESSORS}).items():
        if settings.get(key) not in (*values, None):
            raise CheckpointError(f"{path}: {key} must be {json.dumps(values[0])}, found {settings[key]!r}")
    factor = settings["rescale_factor"]
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-4):
        raise CheckpointError(f"{path}: rescale_factor must be 1 / 255, found {factor!r}")
    try:
        read["data"] = configs.from_dict({"data": _sizing(settings["size"])}).data
        if settings["do_normalize"]:
            numbers = {key: settings[f"image_{key}"] for key in ("mean", "std")}
            model = configs.from_dict({"model": numbers}).model
            read |= {"mean": model.mean, "std": model.std}
        inexact = _inexact(settings)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be followed ({type(error).__name__}: {error})") from error
    if inexact:
        warnings.warn(f"{path}: {'; '.join(inexact)}", stacklevel=2)
    return read


def _sizing(size: dict[str, int]) -> dict[str, Any]:
    """How pages are sized, as keys of `data`."""
    if size.get("shortest_edge"):
        edge, longest = size["shortest_edge"], size["longest_edge"]
        return {"short_edges": [edge], "eval_short_edge": edge, "max_long_edge": longest}
    height, width = size["height"], size["width"]
    edge, longest = min(height, width), max(height, width, original.SQUASHED.max_long_edge)
    squash = {"sizing": "squash", "squash_aspect": height / width}
    return squash | {"short_edges": [edge], "eval_short_edge": edge, "max_long_edge": longest}


def _inexact(settings: dict[str, Any]) -> list[str]:
    """What of a preprocessor_config.json is not done exactly as there, for people.

    Raises:
        ValueError: it cannot be done there either.
    """
    size, canvas, lines = settings["size"], settings["do_pad"] and settings["pad_size"], []
    padded = bool(settings["do_pad"])
    if size.get("shortest_edge"):
        lines.append(
            "pages keep their aspect: transformers truncates sides and averages pixels in another way, so that here a "
            "side may be a pixel longer, and it cannot answer at all where a side is no multiple of the last stride"
        )
    elif canvas and any(canvas[side] < size[side] for side in ("height", "width")):
        raise ValueError(f"pages of {size} do not fit into pad_size {canvas}")
    else:
        padded = bool(canvas) and canvas != size
    if padded:
        canvas = f"{canvas['height']}x{canvas['width']}" if canvas else "the largest page of a batch"
        lines.append(
            f"pages are padded there to {canvas}, and boxes are fractions of that; here they are fractions of the "
            "page, and the model does not see the padding: the answers differ, so evaluate or fine-tune it first"
        )
    return lines


def _contradictions(theirs: dict[str, Any], facts: dict[str, Any], width: int) -> Iterator[str]:
    """Where config.json says other than what the tensors say. `width`: of the encoder."""
    means = {"depth_mult": lambda x: round(3 * x), "hidden_expansion": lambda x: math.floor(x * width / 2)}
    for key, fact in facts.items():
        found = theirs.get(key, fact)
        if isinstance(fact, dict):
            if isinstance(found, dict):
                yield from (f"{key}.{line}" for line in _contradictions(found, fact, width))
            continue
        if key == "decoder_n_points" and isinstance(found, int):
            found = [found] * len(fact)
        same = found == fact
        if key in means and isinstance(found, int | float) and math.isfinite(found):
            same = means[key](found) == means[key](fact)
        if not same:
            yield f"{key} is {found!r}, the model has {fact!r}"


# Writing


def write(folder: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    """Writes a model so that `DFineForObjectDetection.from_pretrained` and `AutoImageProcessor` open it.

    Pages of any shape are squashed to one size there, and get the boxes that `dfine.load` gives them. Where that size
    is not square, transformers 4 answers otherwise: it numbers positions by column, as the original does, and 5 by row.

    Args:
        model: as trained, not deployed.
    Raises:
        CheckpointError: the layout cannot express the model or how its pages are sized; says why. Nothing is written.
    """
    require("transformers", [*_unlike_there(model), *_unsized_there(config.data, model.strides[-1])])
    theirs = original.state_of(model, config.model)
    state: State = {}
    for name, tensor in theirs.items():
        full = renamed(name, "original", "transformers")
        if full is None or (name.startswith("backbone.") and name.endswith(COUNTER)):
            continue
        if ".in_proj_" in full:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[full.replace(".in_proj_", f".{letter}_proj.")] = part.clone()
        elif config.model.denoising.queries or "denoising" not in full:
            state[full] = tensor.contiguous()
    names = [category["name"] for category in categories]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (SETTINGS, config_json(model, config.model, theirs, names)),
        (PREPROCESSING, preprocessor_json(model, config.data)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside = folder / f"{WEIGHTS}.writing"
    save_file(state, beside, metadata={"format": "pt"})
    beside.replace(folder / WEIGHTS)


def require(layout: str, reasons: list[str]) -> None:
    """Raises CheckpointError if there are reasons why a layout cannot express a model."""
    if reasons:
        raise CheckpointError(f"the layout of {layout} cannot express this model: {'; '.join(reasons)}")


def unpublished(config: ModelConfig) -> list[str]:
    """Why a model is none of those that are published, in size or not."""
    reasons = []
    if not config.backbone.name.startswith(original.HGNETV2):
        reasons.append(f"its backbone is {config.backbone.name}, the layout knows HGNetV2 alone (timm's hgnetv2_*)")
    if config.strides[-1] != 32:
        reasons.append(f"its last stride is {config.strides[-1]}, not 32")
    if config.decoder.bins != 32:
        reasons.append(f"it has {config.decoder.bins} bins, not 32")
    return reasons


def _unlike_there(model: DFine) -> list[str]:
    """Why transformers would compute something else with a model's weights."""
    name = model.config.backbone.name
    if name.startswith(original.HGNETV2):
        return unpublished(model.config)
    if model.pyramid is not None:
        return [f"{name} has one stride, of which transformers makes no pyramid"]
    differs = _differs_there(model.backbone.body, frozen=True)
    return [f"with {name} transformers computes something else than timm: {differs}"] if differs else []


def _unsized_there(data: DataConfig, stride: int) -> list[str]:
    """Why transformers would not see pages as the model does."""
    if data.sizing == "keep_aspect":
        return [
            "its pages keep their aspect (data.sizing), so their sides are no multiples of its last stride, which "
            "transformers needs, and it cannot pad them so that boxes stay right. Give all pages one size, such as "
            "data.sizing=squash data.squash_aspect=1.45, and let evaluate.py say what that costs"
        ]
    size = model_size((1, 1), data.eval_short_edge, data)
    if any(side % stride for side in size):
        near = f"{round(size[0] / stride) * stride}x{round(size[1] / stride) * stride}"
        return [f"its pages are {size[0]}x{size[1]}: transformers needs multiples of {stride}, such as {near}"]
    return []


def config_json(model: DFine, config: ModelConfig, state: State, names: list[str]) -> dict[str, Any]:
    """config.json. `state`: the model's by the original's names."""
    noise = config.denoising
    if config.backbone.name.startswith(original.HGNETV2):
        backbone = _hgnetv2(state, len(config.strides))
        # transformers takes the backbone's channels from hidden_sizes; in published files they are a leftover.
        backbone["hidden_sizes"] = backbone["stage_out_channels"]
    else:
        # All of this, and nothing else, so that transformers 4 reads it as well as 5.
        name, indices = config.backbone.name, model.backbone.indices
        backbone = {"model_type": "timm_backbone", "backbone": name, "out_indices": indices}
        backbone["use_pretrained_backbone"] = False
    return {
        "architectures": ["DFineForObjectDetection"],
        "model_type": "d_fine",
        "dtype": "float32",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "up": config.decoder.a,
        "reg_scale": 1 / config.decoder.c,
        "num_denoising": noise.queries,
        "label_noise_ratio": 2 * noise.label_noise,  # transformers halves it
        "box_noise_scale": noise.box_noise,
        **_facts(config, state, backbone),
    }


def preprocessor_json(model: DFine, data: DataConfig) -> dict[str, Any]:
    """preprocessor_config.json: pages as in evaluation."""
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    height, width = model_size((1, 1), data.eval_short_edge, data)
    return {
        "image_processor_type": PROCESSORS[0],
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": (mean, std) != ([0.0] * 3, [1.0] * 3),
        "image_mean": mean,
        "image_std": std,
        "do_pad": False,
    }


def _facts(config: ModelConfig, state: State, backbone: dict[str, Any]) -> dict[str, Any]:
    """What config.json and the tensors both say, and what every model of ours has.

    Args:
        state: by the original's names. backbone: what to say of the backbone.
    """
    width, levels = config.encoder.hidden_dim or config.hidden_dim, len(config.strides)
    return FIXED | {
        "backbone_config": backbone,
        "encoder_in_channels": [state[f"encoder.input_proj.{i}.conv.weight"].shape[1] for i in range(levels)],
        "encoder_hidden_dim": width,
        "encoder_ffn_dim": config.encoder.feedforward_dim,
        "encoder_attention_heads": config.encoder.heads,
        "encode_proj_layers": [levels - 1],
        "hidden_expansion": config.encoder.expansion,
        "depth_mult": config.encoder.depth_mult,
        "feat_strides": list(config.strides),
        "num_feature_levels": levels,
        "d_model": config.hidden_dim,
        "decoder_in_channels": [width] * levels,
        "decoder_ffn_dim": config.decoder.feedforward_dim,
        "decoder_attention_heads": config.decoder.heads,
        "decoder_layers": config.decoder.layers,
        "decoder_n_points": list(config.decoder.points),
        "num_queries": config.decoder.queries,
        "max_num_bins": config.decoder.bins,
    }


def _hgnetv2(state: State, levels: int) -> dict[str, Any]:
    """backbone_config, read off the tensors of an HGNetV2 at the last strides of 4 to 32."""
    stem = (state[f"backbone.stem.{name}.conv.weight"] for name in ("stem1", "stem4"))
    stages: dict[str, list[Any]] = {}
    for stage in range(4):
        own = {
            name.removeprefix(p): x for name, x in state.items() if name.startswith(p := f"backbone.stages.{stage}.")
        }
        light = "blocks.0.layers.0.conv1.conv.weight" in own  # 1x1, then depthwise
        first = own[f"blocks.0.layers.0.{'conv1.' if light else ''}conv.weight"]
        filters = own["blocks.0.layers.0.conv2.conv.weight"] if light else first
        for key, value in {
            "stage_in_channels": first.shape[1],
            "stage_mid_channels": first.shape[0],
            "stage_out_channels": own["blocks.0.aggregation.1.conv.weight"].shape[0],
            "stage_num_blocks": len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
            "stage_numb_of_layers": len({name.split(".")[3] for name in own if name.startswith("blocks.0.layers.")}),
            "stage_downsample": "downsample.conv.weight" in own,
            "stage_light_block": light,
            "stage_kernel_size": filters.shape[-1],
        }.items():
            stages.setdefault(key, []).append(value)
    return {
        "model_type": "hgnet_v2",
        "stem_channels": [3, *(weight.shape[0] for weight in stem)],
        **stages,
        "use_learnable_affine_block": "backbone.stem.stem1.lab.scale" in state,
        "out_indices": list(range(5 - levels, 5)),  # of five outputs, the first of which is the stem's
    }
