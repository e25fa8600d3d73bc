"""Saving and loading: written beside and renamed, loaded with `weights_only=True`.

`last.pt` holds everything a run needs to go on, `previous.pt` is the `last.pt` before it, `best.pt` holds the averaged
(EMA) weights alone. Both kinds carry the config and the categories, so a checkpoint explains itself.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfine import config as configs
from dfine.config import Config, ConfigError, ModelConfig
from dfine.model.detector import DFine

FOR_USE: dict[str, type] = {"ema": dict, "categories": list}  # with "config", what every checkpoint holds

# Of a model's settings, what does not say what its weights mean: a run that goes on or starts from them may change it.
MAY_DIFFER = (
    "model.backbone.pretrained",
    "model.backbone.weights",
    "model.backbone.checkpointing",
    "model.decoder.queries",
    "model.denoising.",
    "model.init_from",
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Writes beside the file and renames, so that the file is whole whenever it is there.

    Args:
        keep: where the file that stood there before goes.
    Raises:
        CheckpointError: the disk is full or not writable; what was there before stays.
    """
    beside = path.with_name(f"{path.name}.writing")
    try:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot save ({error}); the checkpoint before it is intact") from error


def save_small(path: Path, content: dict[str, Any]) -> None:
    """Writes what `read` reads in less than half the bytes: matrices and kernels in bf16, all of it compressed."""
    ema = {name: x.bfloat16() if x.is_floating_point() and x.dim() > 1 else x for name, x in content["ema"].items()}
    plain = io.BytesIO()
    torch.save(content | {"ema": ema}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for entry in source.namelist():
            file.writestr(zipfile.ZipInfo(entry), source.read(entry), zipfile.ZIP_DEFLATED)  # without the time of day


def read(path: str | Path) -> dict[str, Any]:
    """Loads a file of tensors and plain values on the CPU.

    Raises:
        CheckpointError: missing, damaged or not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        damaged = None
        if zipfile.is_zipfile(path):  # torch.save writes checksums, torch.load does not look at them
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:  # torch would advise to load without `weights_only`
        raise CheckpointError(f"{path}: not a checkpoint of tensors and plain values") from error
    except Exception as error:  # what torch raises on a broken file is no closed list
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint ({str(error) or type(error).__name__})"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged at {damaged}: the checksum does not fit; take another copy")
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint: holds a {type(content).__name__}")
    return content


def require(path: str | Path, content: dict[str, Any], parts: dict[str, type]) -> None:
    """Raises CheckpointError unless the content has all these parts, of these types, and knows its categories."""
    wrong = [name for name, kind in parts.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{path}: not a checkpoint of this project: lacks {', '.join(sorted(wrong))}")
    if not all(isinstance(category, dict) and {"id", "name"} <= category.keys() for category in content["categories"]):
        raise CheckpointError(f"{path}: not a checkpoint of this project: its categories lack id or name")


def settings_of(path: str | Path, content: dict[str, Any]) -> Config:
    """The config in a checkpoint of ours.

    Raises:
        CheckpointError: not a checkpoint of ours. ConfigError: its config is of another version.
    """
    require(path, content, {"config": dict, **FOR_USE})
    try:
        return configs.from_dict(content["config"])
    except ConfigError as error:
        raise ConfigError(
            f"{path}: written by another version of dfine ({error}): use that version, or start a run from the weights "
            "with model.init_from"
        ) from error


def architecture(path: str | Path, content: dict[str, Any]) -> ModelConfig:
    """The model's settings in a checkpoint of ours, also of another version, as far as this one knows its keys.

    Raises:
        CheckpointError: not a checkpoint of ours, or these settings cannot be meant.
    """
    require(path, content, {"config": dict, **FOR_USE})
    try:
        return configs.from_dict(
            {"model": _known(content["config"].get("model"), configs.to_dict(Config())["model"])}
        ).model
    except ConfigError as error:
        raise CheckpointError(f"{path}: its own config cannot be meant: {error}") from error


def _known(tree: Any, like: Any) -> Any:
    """A nested mapping without the keys that another does not have."""
    if not isinstance(tree, dict) or not isinstance(like, dict):
        return tree
    return {key: _known(value, like[key]) for key, value in tree.items() if key in like}


def weights(config: Config, categories: list[dict[str, Any]], ema: nn.Module) -> dict[str, Any]:
    """What a checkpoint for use holds: averaged weights, config and categories. It does not say who taught them."""
    settings = configs.to_dict(config)
    del settings["distill"]
    return {"config": settings, "categories": categories, "ema": ema.state_dict()}


def bare_model(config: Config, categories: list[dict[str, Any]]) -> DFine:
    """The model of a config, for weights from a checkpoint: timm does not look for its own."""
    bare = configs.override(config, ["model.backbone.pretrained=false", "model.backbone.weights="])
    return DFine(bare.model, len(categories)).float()  # whatever precision a host program builds its own models in


def load_model(path: str | Path) -> tuple[DFine, Config, list[dict[str, Any]]]:
    """The averaged model of a checkpoint in evaluation mode, its config and its categories.

    Raises:
        CheckpointError: not a checkpoint of ours. ConfigError: its config is of another version.
    """
    return assembled(path, read(path))


def assembled(path: str | Path, content: dict[str, Any]) -> tuple[DFine, Config, list[dict[str, Any]]]:
    """What `load_model` returns, from what `read` has read."""
    config, categories = settings_of(path, content), content["categories"]
    try:
        model = bare_model(config, categories)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # of a damaged config: sizes that no tensor can have
        raise CheckpointError(f"{path}: no model can be made of its config ({error})") from error
    wrong = misfit(model, content["ema"])
    if wrong:
        raise CheckpointError(f"{path}: does not fit the model of its own config at {wrong}")
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError as error:  # tensors of the right shapes that are sparse, or have no content
        raise CheckpointError(f"{path}: its weights cannot be used ({' '.join(str(error).split())})") from error
    return model.eval(), config, categories


def misfit(model: nn.Module, state: dict[str, Tensor], anew: list[str] | None = None) -> str:
    """Which tensors of a state do not fit the model, for people; empty if all fit. `anew` may be missing."""
    own = model.state_dict()
    wrong = sorted(map(str, (own.keys() ^ state.keys()) - set(anew or [])))
    for name in sorted(own.keys() & state.keys()):
        if not isinstance(state[name], Tensor) or state[name].shape != own[name].shape:
            wrong.append(name)
    return f"{', '.join(wrong[:5])} ({len(wrong)} in all)" if wrong else ""
