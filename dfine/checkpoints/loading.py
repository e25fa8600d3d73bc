"""Checkpoints of any kind: of our runs, of the original implementation, or published in the layout of `transformers`.

Wherever a checkpoint is named it may be
    embedded                                    the weights in the package, see dfine/weights/README.md
    runs/NAME/best.pt                           a file of a run
    dfine_m_coco.pth                            a file of the original implementation
    DIR                                         a folder with config.json, model.safetensors, preprocessor_config.json
    model.safetensors                           such a file alone, its classes known by number
    docling-project/docling-layout-egret-large  a name on the Hugging Face hub; `@revision` may follow
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfine.checkpoints import hub, original, ours, transformers_format
from dfine.checkpoints.original import Foreign, State, one_line
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError, ModelConfig, override
from dfine.model.detector import DFine, class_dependent

FILE_ENDINGS = {".pt", ".pth", ".safetensors"}
EMBEDDED = "embedded"
EMBEDDED_FILE = Path(__file__).parents[1] / "weights" / "pages.pt"
# What a run may set otherwise than the checkpoint that it starts from. Mean and std are compared with the tensors.
MAY_DIFFER = (*ours.MAY_DIFFER, "model.match_classes", "model.mean", "model.std")


def locate(name: str | Path) -> Path:
    """The file or folder of a checkpoint; one on the hub is fetched. A path that exists comes first.

    Raises:
        CheckpointError: neither here nor on the hub.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) == EMBEDDED:
        return EMBEDDED_FILE
    if path.suffix in FILE_ENDINGS:
        raise CheckpointError(f"{name}: no such checkpoint")
    if hub.is_name(str(name)):
        return hub.folder(str(name))
    raise CheckpointError(
        f"{name}: neither a file or folder here nor a name on the Hugging Face hub (org/name or org/name@revision) nor "
        f"{EMBEDDED!r}, the weights in the package"
    )


def load_model(name: str | Path) -> tuple[DFine, Config, list[dict[str, Any]]]:
    """The model of a checkpoint in evaluation mode, its config and its categories.

    A published checkpoint numbers its classes from 0; these are the ids of its categories.

    Raises:
        CheckpointError: it cannot be read whole. ConfigError: a run's config is of another version.
    """
    path = locate(name)
    content = _read(path)
    if not isinstance(content, Foreign):
        return ours.assembled(path, content)
    with one_line(_file(path), content):
        config = Config(model=original.architecture(content), data=content.data)
        model = DFine(config.model, content.classes)
        state = original.translated(content, model)
        model.load_state_dict(state, strict=False)
    if "denoising_labels.weight" not in state:
        config = override(config, ["model.denoising.queries=0"])
        warnings.warn(f"{path}: has no denoising embedding: enough to detect, not to train on", stacklevel=2)
    names = content.names or [str(i) for i in range(content.classes)]
    return model.eval(), config, [{"id": i, "name": name} for i, name in enumerate(names)]


def _file(path: Path) -> Path:
    """The file with the weights, for messages."""
    return path / transformers_format.WEIGHTS if path.is_dir() else path


def _read(path: Path) -> Foreign | dict[str, Any]:
    """What a file or folder holds; of a checkpoint of ours the content as it is."""
    if path.is_dir() or path.suffix == ".safetensors":
        return transformers_format.read(path)
    content = ours.read(path)
    return original.opened(content) if original.is_official(content) else content


def initialise(model: DFine, name: str, categories: list[dict[str, Any]], match_classes: bool = True) -> str:
    """Starts a new model from the weights of a checkpoint.

    Class heads and denoising embedding have a row for each class. Classes that both sides name alike keep theirs, the
    others start anew; anything else must fit, and mean the same by the checkpoint's own config. Mean and std are the
    checkpoint's. Classes that the checkpoint knows by number are the model's if there are as many.

    Args:
        categories: of the model's classes, in order.
        match_classes: False: unless all classes are the same, all rows start anew.
    Returns:
        What was loaded, which classes keep their rows and which start anew, for people.
    Raises:
        CheckpointError: not a checkpoint, or it does not fit, or means another model; names what does not fit, or
            keys with both values.
    """
    path = locate(name)
    content = _read(path)
    require_same(path, model.config, _architecture(path, content))
    state, theirs, count, source = _weights(path, content, model)
    own, names = model.state_dict(), [category["name"] for category in categories]
    by_class = class_dependent(model)
    shapes = {key: (own[key].shape[0] - len(names) + count, *own[key].shape[1:]) for key in by_class}
    wrong = [key for key in by_class if key in state and state[key].shape != shapes[key]]
    others = ours.misfit(model, {key: x for key, x in state.items() if key not in by_class}, by_class)
    if wrong or others:
        raise CheckpointError(f"{path}: does not fit this config's model at {', '.join(wrong) or others}")
    for key, numbers in {"mean": model.config.mean, "std": model.config.std}.items():
        if numbers and not state[key].flatten().allclose(torch.tensor(numbers)):
            found = [round(number, 4) for number in state[key].flatten().tolist()]
            raise CheckpointError(f"{path}: model.{key} is {[*numbers]}, there {found}: leave it out to take theirs")
    same = theirs == names or (theirs is None and count == len(names))
    rows: list[int | None] = [None] * len(names)
    if same or match_classes:
        rows = [*range(count)] if same else matched(theirs or [], names)
    missing = [key for key in by_class if key not in state or set(rows) == {None}]
    for key in by_class:
        tensor = state.pop(key, own[key])
        if key not in missing:
            padding: dict[int, int | None] = {len(names): count} if key == "denoising_labels.weight" else {}
            state[key] = _with_rows(own[key], tensor, dict(enumerate(rows)) | padding)
    model.load_state_dict(state, strict=False)
    whole = len(own) - len(by_class if None in rows else missing)
    said = f"{name} ({source}): loaded {whole} of {len(own)} tensors"
    return said + _class_map(rows, names, theirs, by_class, missing)


def _architecture(path: Path, content: Foreign | dict[str, Any]) -> ModelConfig:
    if not isinstance(content, Foreign):
        return ours.architecture(path, content)
    with one_line(_file(path), content):
        return original.architecture(content)


def require_same(path: Path, config: ModelConfig, theirs: ModelConfig) -> None:
    """Raises CheckpointError, with keys and both values, where the weights of a checkpoint mean another model."""
    now, before = (_by_key(settings.model_dump(mode="json")) for settings in (config, theirs))
    meant, meant_there = now | _equivalents(config), before | _equivalents(theirs)
    wrong = [
        f"{key} is {now[key]}, there {before[key]}"
        for key in now
        if not key.startswith(MAY_DIFFER)
        and not _equal(meant[key], meant_there[key])
        and not _equal(now[key], before[key])  # the same in both: it differs through another key, which is named
    ]
    if wrong:
        raise CheckpointError(f"{path}: its weights are of another model than this config's: {'; '.join(wrong)}")


def _by_key(tree: Any, key: str = "model") -> dict[str, Any]:
    """Settings by keys such as model.decoder.a."""
    if not isinstance(tree, dict):
        return {key: tree}
    return {k: value for name, inner in tree.items() for k, value in _by_key(inner, f"{key}.{name}").items()}


def _equivalents(config: ModelConfig) -> dict[str, Any]:
    """What some settings come to: others make the same model."""
    encoder = config.encoder
    width = encoder.hidden_dim or config.hidden_dim
    return {
        "model.backbone.name": config.backbone.name.partition(".")[0],  # what follows names weights
        "model.encoder.hidden_dim": width,
        "model.encoder.depth_mult": round(3 * encoder.depth_mult),
        "model.encoder.expansion": math.floor(encoder.expansion * width / 2),
    }


def _equal(a: Any, b: Any) -> bool:
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) else a == b  # tensors tell a and c in float32


def _weights(path: Path, content: Foreign | dict[str, Any], model: DFine) -> tuple[State, list[str] | None, int, str]:
    """Weights by our names, the names of the classes if it has them, their number, and what it is, for people."""
    names: list[str] | None
    if isinstance(content, Foreign):
        names, count = content.names, content.classes
        with one_line(_file(path), content):
            state = original.translated(content, model)
    else:
        names = [category["name"] for category in content["categories"]]
        state, count = dict(content["ema"]), len(names)
    if names is not None:
        return state, names, count, f"classes {listed(names)}"
    source = "transformers" if path.suffix == ".safetensors" else "the original implementation"
    return state, None, count, f"{source}, {count} classes by number"


def _with_rows(fresh: Tensor, tensor: Tensor, taken: dict[int, int | None]) -> Tensor:
    """`fresh` with some of its rows from a tensor: {row of fresh: row of the tensor or None}."""
    new = fresh.clone()
    for row, source in taken.items():
        if source is not None:
            new[row] = tensor[source]
    return new


def matched(theirs: list[str], own: list[str]) -> list[int | None]:
    """For each of our classes the index of theirs with its name, or None; case, `-`, `_` and spaces do not matter.

    Where several have one name, the first is matched with the first.
    """
    indices: dict[str, list[int]] = {}
    for index, name in enumerate(theirs):
        indices.setdefault(_plain(name), []).append(index)
    return [indices[_plain(name)].pop(0) if indices.get(_plain(name)) else None for name in own]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


def listed(names: list[str]) -> str:
    """Names for people, who need not read hundreds."""
    return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def _class_map(
    rows: list[int | None], names: list[str], theirs: list[str] | None, by_class: list[str], missing: list[str]
) -> str:
    """Which classes keep their rows and which start anew, for people; empty if there is nothing to say."""
    fresh = [name for name, row in zip(names, rows, strict=True) if row is None]
    text = ""
    if len(fresh) == len(names):
        text = f"; start anew: {', '.join(by_class)}"
    elif fresh:
        text = f"; start anew: {listed(fresh)} in {', '.join(by_class)}"
    elif missing:
        text = f"; start anew: {', '.join(missing)}"
    if theirs is None or theirs == names or len(fresh) == len(names):
        return text
    kept = [(name, theirs[row]) for name, row in zip(names, rows, strict=True) if row is not None]
    text += f"\n  keep their rows: {listed([own if own == their else f'{own} ({their})' for own, their in kept])}"
    unused = [name for row, name in enumerate(theirs) if row not in rows]
    return text + (f"\n  not taken: {listed(unused)}" if unused else "")


def load_teacher(config: Config, source: str, categories: list[dict[str, Any]]) -> DFine:
    """The frozen model of `distill.teacher`, deployed; everything about it comes from its checkpoint.

    Its classes are brought into the student's order; those that only the teacher knows are left out of it.

    Args:
        config: the student's. source: the file it was read from, for messages. categories: of the student's pages.
    Raises:
        ConfigError: no teacher is named, or it has other strides or lacks one of the student's classes; names both
            files. Or it is to answer denoising queries, which it has never seen.
        CheckpointError: see `load_model`.
    """
    path = config.distill.teacher
    if not path:
        raise ConfigError(f"{source}: distill.teacher: name a checkpoint (to train without a teacher, use train.py)")
    teacher, theirs, their_categories = load_model(path)
    if theirs.model.strides != config.model.strides:
        raise ConfigError(
            f"distill.teacher: {path} has the strides {list(theirs.model.strides)}, the student of {source} has "
            f"{list(config.model.strides)}: the teacher's queries are cells of its maps, so both need the same"
        )
    names, their_names = [c["name"] for c in categories], [c["name"] for c in their_categories]
    rows = [row for row in matched(their_names, names) if row is not None]
    if len(rows) < len(names):
        pages = config.data.train.annotations or "the drawn pages"
        raise ConfigError(
            f"distill.teacher: {path} knows the classes {', '.join(their_names)}; {pages} (data.train of {source}) has "
            f"{', '.join(names)}: the teacher must know them all"
        )
    if config.distill.denoising and theirs.model.denoising.queries == 0:
        raise ConfigError(
            f"distill.denoising: {path} was trained without denoising queries (model.denoising.queries=0) and cannot "
            "answer them; use distill.denoising=0"
        )
    for head in (teacher.selection.class_head, *teacher.decoder.class_heads):
        head.weight, head.bias = nn.Parameter(head.weight[rows]), nn.Parameter(head.bias[rows])
    labels = teacher.denoising_labels.weight[[*rows, -1]]  # the last one is of padded slots
    teacher.denoising_labels = nn.Embedding.from_pretrained(labels, padding_idx=len(rows))
    teacher.classes = len(rows)
    return teacher.deploy().requires_grad_(False).eval()  # deployed, its forward pass takes less
