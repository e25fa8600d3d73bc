"""Configuration: frozen dataclasses hold the defaults, a YAML file holds what differs, `key=value` has the last word.

No includes and no inheritance: what a run used is the resolved config in its run folder.
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config that cannot be meant; the message names the key and, where there is one, the file."""


@dataclass(frozen=True)
class BackboneConfig:
    name: str = "convnext_large.dinov3_lvd1689m"  # any timm model with `features_only` and the strides below
    pretrained: bool = True  # timm's weights; they carry their own licence
    weights: str = ""  # those weights as a local file, for machines without network
    checkpointing: bool = False  # trade time for memory: recompute the activations in the backward pass


@dataclass(frozen=True)
class EncoderConfig:
    hidden_dim: int = 0  # 0: model.hidden_dim (the original's X is wider here than in its decoder)
    heads: int = 8
    feedforward_dim: int = 1024
    depth_mult: float = 1.0  # RepVGG blocks per CSP: round-half-even(3 depth_mult)
    expansion: float = 1.0  # width of a CSP: floor(expansion hidden_dim / 2)


@dataclass(frozen=True)
class DecoderConfig:
    heads: int = 8
    feedforward_dim: int = 1024
    layers: int = 6
    points: tuple[int, ...] = (3, 6, 3)  # sampled points per head, one number a level
    queries: int = 300
    bins: int = 32  # N: an edge distribution has N + 1 values
    a: float = 0.5  # W(N) = 2a: the farthest an edge moves, in widths (heights) of the initial box
    c: float = 0.25  # curvature of W(n); the original's reg_scale is 1 / c


@dataclass(frozen=True)
class DenoisingConfig:
    queries: int = 100  # groups = max(1, queries // most boxes of a page)
    label_noise: float = 0.25  # share of labels that are drawn anew
    box_noise: float = 1.0  # corners of positives move by up to this share of the half size, of negatives by 1x to 2x


@dataclass(frozen=True)
class ModelConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    strides: tuple[int, ...] = (8, 16, 32)
    hidden_dim: int = 256  # D
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    mean: tuple[float, ...] = ()  # of RGB in [0, 1]; empty: what the backbone's timm weights were trained with
    std: tuple[float, ...] = ()
    init_from: str = ""  # start from the weights of a checkpoint of any kind (README), or of a name on the hub
    # Classes that the checkpoint names too (case, `-`, `_` and spaces aside) keep their rows of the class heads and of
    # the denoising embedding. False: unless all classes are the same, all of these start anew.
    match_classes: bool = True

    def __post_init__(self) -> None:
        _require(len(self.strides) >= 1, "model.strides", "one or more")
        _require(len(self.decoder.points) == len(self.strides), "model.decoder.points", "one number a stride")
        _require(min(self.decoder.points) >= 1, "model.decoder.points", "1 or more on each stride")
        _require(
            tuple(2 * s for s in self.strides[:-1]) == self.strides[1:], "model.strides", "each twice the one before"
        )
        _require(self.decoder.bins % 2 == 0 and self.decoder.bins >= 4, "model.decoder.bins", "even, 4 or more")
        _require(self.decoder.layers >= 1, "model.decoder.layers", "1 or more")
        _require(self.decoder.queries >= 1, "model.decoder.queries", "1 or more")
        _require(self.decoder.heads >= 1, "model.decoder.heads", "1 or more")
        _require(self.encoder.heads >= 1, "model.encoder.heads", "1 or more")
        _require(self.decoder.a > 0, "model.decoder.a", "positive")
        _require(self.decoder.c > 0, "model.decoder.c", "positive")
        _require(self.hidden_dim % self.decoder.heads == 0, "model.hidden_dim", "a multiple of model.decoder.heads")
        width = self.encoder.hidden_dim or self.hidden_dim
        _require(width % self.encoder.heads == 0, "model.encoder.heads", f"a divisor of the encoder's width {width}")
        _require(width % 4 == 0, "model.hidden_dim", "a multiple of 4 (positions are two sines and two cosines)")
        _require(len(self.mean) in (0, 3), "model.mean", "three numbers")
        _require(len(self.std) in (0, 3) and all(s > 0 for s in self.std), "model.std", "three positive numbers")


@dataclass(frozen=True)
class MatcherConfig:
    classes: float = 2.0  # focal cost
    l1: float = 5.0
    giou: float = 2.0
    # Queries that each box is matched to in the encoder's head. 1 is D-FINE; more (hybrid matching, arXiv 2207.13080)
    # shows that head more of what it must select, and by the union all heads more boxes: it saves steps from random
    # weights.
    encoder_queries: int = 1

    def __post_init__(self) -> None:
        _require(self.encoder_queries >= 1, "loss.matcher.encoder_queries", "1 or more")


@dataclass(frozen=True)
class LossConfig:
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    vfl: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    fgl: float = 0.15
    ddf: float = 1.5
    temperature: float = 5.0  # T of DDF

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "loss.temperature", "positive")


@dataclass(frozen=True)
class ClassDistillConfig:
    weight: float = 1.0  # as loss.vfl
    loss: str = "kl"  # binary KL, whose gradient does not vanish at sure scores; or "mse" of the probabilities
    temperature: float = 1.0  # of the KL; 1: sigmoid scores are soft already

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "distill.classes.weight", "0 or more")
        _require(self.loss in ("kl", "mse"), "distill.classes.loss", "kl or mse")
        _require(self.temperature > 0, "distill.classes.temperature", "positive")


@dataclass(frozen=True)
class BoxDistillConfig:
    weight: float = 5.0  # as loss.l1
    loss: str = "l1"  # as for the truth; or "mse", to which small boxes hardly matter

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "distill.boxes.weight", "0 or more")
        _require(self.loss in ("l1", "mse"), "distill.boxes.loss", "l1 or mse")


@dataclass(frozen=True)
class GoLsdConfig:
    weight: float = 1.5  # as loss.ddf
    temperature: float = 1.0  # above 1 a student that agrees in its own frame decodes to other boxes
    start_epoch: float = 0.0  # epochs before it counts, fractions included

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "distill.go_lsd.weight", "0 or more")
        _require(self.temperature > 0, "distill.go_lsd.temperature", "positive")
        _require(self.start_epoch >= 0, "distill.go_lsd.start_epoch", "0 or more")


@dataclass(frozen=True)
class DistillConfig:
    """Total loss: alpha x (class + box + GO-LSD) on the teacher's queries + beta x the losses of `loss`."""

    teacher: str = ""  # a checkpoint (as model.init_from) with this run's strides and class names; for distill.py alone
    alpha: float = 1.0  # 0: the teacher is not asked
    beta: float = 1.0  # 0: the truth teaches nothing, query selection included
    classes: ClassDistillConfig = field(default_factory=ClassDistillConfig)
    boxes: BoxDistillConfig = field(default_factory=BoxDistillConfig)
    go_lsd: GoLsdConfig = field(default_factory=GoLsdConfig)

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, "distill.alpha", "0 or more")
        _require(self.beta >= 0, "distill.beta", "0 or more")


@dataclass(frozen=True)
class PagesConfig:
    images: str = ""  # folder
    annotations: str = ""  # COCO json
    synthetic: int = 0  # pages of the embedded data set; used only where no annotations are named
    synthetic_seed: int = 0  # pages of different seeds have nothing in common


@dataclass(frozen=True)
class AugmentConfig:
    """Each `p` is a probability a page; an augmentation with p = 0 is off. Paper that comes into view is white."""

    perspective_p: float = 0.3
    perspective_scale: float = 0.04  # corners move by up to about this share of the page
    elastic_p: float = 0.2
    elastic_alpha: float = 300.0  # with this sigma, points move by some 4 pixels
    elastic_sigma: float = 20.0  # pixels over which neighbours move together
    rotation_p: float = 0.3
    rotation_degrees: float = 5.0
    brightness_contrast_p: float = 0.2
    brightness_contrast_limit: float = 0.2
    blur_p: float = 0.1
    compression_p: float = 0.1  # JPEG, quality 40 to 90
    noise_p: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_p"):
                _require(0 <= value <= 1, f"data.augment.{name}", "from 0 to 1")
        for name in ("perspective_scale", "elastic_alpha", "rotation_degrees"):
            _require(getattr(self, name) > 0, f"data.augment.{name}", "positive (its p turns it off)")
        _require(self.elastic_sigma >= 4, "data.augment.elastic_sigma", "4 or more")
        _require(0 < self.brightness_contrast_limit <= 1, "data.augment.brightness_contrast_limit", "from 0 to 1")


@dataclass(frozen=True)
class DataConfig:
    train: PagesConfig = field(default_factory=PagesConfig)
    val: PagesConfig = field(default_factory=PagesConfig)
    batch_size: int = 16  # pages per process and step
    workers: int = 4  # loader processes per training process
    short_edges: tuple[int, ...] = (480, 512, 544, 576, 608, 640)  # training draws one a batch
    eval_short_edge: int = 640
    max_long_edge: int = 928
    sizing: str = (
        "keep_aspect"  # or "squash": all pages get one shape, as published weights want; max_long_edge is moot
    )
    squash_aspect: float = 1.0  # height / width of squashed pages, whose shorter side is the short edge
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", "1 or more")
        _require(self.workers >= 0, "data.workers", "0 or more")
        _require(bool(self.short_edges) and min(self.short_edges) >= 32, "data.short_edges", "32 pixels or more")
        _require(self.eval_short_edge >= 32, "data.eval_short_edge", "32 pixels or more")
        _require(self.sizing in ("keep_aspect", "squash"), "data.sizing", "keep_aspect or squash")
        _require(self.squash_aspect > 0, "data.squash_aspect", "positive")
        edge = max(*self.short_edges, self.eval_short_edge)
        _require(self.max_long_edge >= edge, "data.max_long_edge", f"at least the largest short edge ({edge})")


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 0
    epochs: int = 12
    max_steps: int = 0  # stop after this many optimizer steps (the schedule still spans the epochs); 0: never
    save_every: int = 1000  # steps between writing last.pt; 0: only at the end of each epoch
    eval_every: int = 2000  # steps between evaluations; 0: only at the end of each epoch
    learning_rate: float = 1e-4
    # The backbone's learning rate, as a share of the rest's. 1 is the first design's, as are weight_decay and clip. Who
    # fine-tunes strong weights takes less: D-FINE .5 (N, S), .1 (M), .05 (L), .01 (X) of 2e-4 to 8e-4, DEIMv2 with
    # DINOv3 .025 of 5e-4, LT-DETR with DINOv3 ConvNeXt .05 of 5e-4; all with weight decay near 1e-4 and clip 0.1.
    backbone_factor: float = 1.0
    # Learning rate (and so weight decay) of weight matrices under Muon (https://kellerjordan.github.io/posts/muon), as
    # a multiple of learning_rate, which all else keeps under AdamW; it saves steps from random weights. 0: AdamW alone.
    muon_factor: float = 0.0
    min_learning_rate: float = 1e-5  # where the cosine ends
    warmup: float = 0.02  # share of all steps
    weight_decay: float = 0.05  # none on norms and biases
    clip: float = 1.0  # gradient norm
    accumulate: int = 1  # batches per optimizer step
    ema_decay: float = 0.9999  # its limit: the average forgets faster while it is young
    freeze_backbone_steps: int = 0
    bf16: bool = True  # autocast on a GPU; boxes, softmax and losses stay in fp32
    bf16_cpu: bool = False  # train so on CPUs too that multiply bf16 (avx512_bf16, amx_bf16); others stay in fp32
    compile: bool = False
    threads: int = 0  # CPU threads per process; 0: torch's choice

    def __post_init__(self) -> None:
        for key in ("epochs", "accumulate"):
            _require(getattr(self, key) >= 1, f"train.{key}", "1 or more")
        for key in ("max_steps", "save_every", "eval_every", "freeze_backbone_steps", "threads", "seed"):
            _require(getattr(self, key) >= 0, f"train.{key}", "0 or more")
        _require(self.learning_rate > 0, "train.learning_rate", "positive")
        _require(self.muon_factor >= 0, "train.muon_factor", "0 or more")
        _require(0 <= self.warmup < 1, "train.warmup", "a share of the run, from 0 to below 1")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", "from 0 to below 1")
        _require(self.clip > 0, "train.clip", "positive")


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/dfine"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides.

    Raises:
        ConfigError: no such file, not a YAML mapping, an unknown key or a wrong type.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    try:
        return override(from_dict({} if tree is None else tree), overrides)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(tree: Any) -> Config:
    """Builds a config from nested mappings; what they leave out keeps its default."""
    return _build(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested mappings and lists, for YAML and checkpoints."""
    return _plain(dataclasses.asdict(config))


def override(config: Config, overrides: typing.Sequence[str]) -> Config:
    """Applies overrides such as `train.epochs=3`; values are read as YAML.

    Raises:
        ConfigError: no `=`, an unknown key or a wrong type.
    """
    tree = to_dict(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r}: write key=value, such as train.epochs=3")
        node, kind, path = tree, Config, ""
        *parents, last = key.strip().split(".")
        for name in parents:
            kind = _hint(kind, name, path)
            node, path = node[name], f"{path}{name}."
            if not dataclasses.is_dataclass(kind):
                raise ConfigError(f"override {text!r}: {path[:-1]} is a value and has no keys of its own")
        node[last] = value if _hint(kind, last, path) is str else _yaml_value(text, value)
    return from_dict(tree)


def _yaml_value(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from error


def _hint(kind: Any, name: str, path: str) -> Any:
    hints = typing.get_type_hints(kind)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(hints)}"
        raise ConfigError(f"unknown key {path}{name}, {advice}")
    return hints[name]


def _build(kind: Any, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.rstrip('.') or 'the config'}: expected keys and values, found {tree!r}")
    return kind(**{name: _value(_hint(kind, str(name), path), tree[name], f"{path}{name}") for name in tree})


def _value(hint: Any, value: Any, key: str) -> Any:
    """Checks a value against the type of its field; ints pass as floats, and so does `1e-4`, a string to YAML."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{key}.")
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: expected a list such as [1, 2], found {value!r}")
        return tuple(_value(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise ConfigError(f"{key}: expected {hint.__name__}, found {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _require(holds: bool, key: str, what: str) -> None:
    if not holds:
        raise ConfigError(f"{key}: must be {what}")
