"""Configuration: frozen models hold the defaults, a YAML file holds what differs, `key=value` has the last word.

No includes and no inheritance: what a run used is the resolved config in its run folder.
"""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """A config that cannot be meant; the message names the key and, where there is one, the file."""


class Section(BaseModel):
    """No other keys, no other types, no infinite numbers. Built by hand, it raises pydantic's ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    """To YAML `1e-4`, without a dot, is a string."""
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


# What values may be. An error says it in the words of the description.
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Strict(False)]  # a list to YAML
Whole = Annotated[int, Field(ge=0, description="0 or more")]
Count = Annotated[int, Field(ge=1, description="1 or more")]
Edge = Annotated[int, Field(ge=32, description="32 pixels or more")]
Edges = Annotated[Several[Edge], Field(min_length=1, description="32 pixels or more")]
Number = Annotated[float, BeforeValidator(_number)]
NonNegative = Annotated[Number, Field(ge=0, description="0 or more")]
Positive = Annotated[Number, Field(gt=0, description="positive")]
Extent = Annotated[Number, Field(gt=0, description="positive (its p turns it off)")]  # of an augmentation
Share = Annotated[Number, Field(ge=0, le=1, description="from 0 to 1")]
PartialShare = Annotated[Number, Field(ge=0, lt=1, description="from 0 to below 1")]


def _require(holds: bool, key: str, what: str, found: Any) -> None:
    if not holds:
        raise ConfigError(f"{key}: must be {what}, found {found!r}")


class BackboneConfig(Section):
    name: str = "convnext_large.dinov3_lvd1689m"  # any timm model with `features_only` and the strides, or 16 alone
    pretrained: bool = True  # timm's weights; they carry their own licence
    weights: str = ""  # those weights as a local file, or package:NAME/FILE of an installed package
    checkpointing: bool = False  # trade time for memory: recompute the activations in the backward pass


class EncoderConfig(Section):
    hidden_dim: Whole = 0  # 0: model.hidden_dim (the original's X is wider here than in its decoder)
    heads: Count = 8
    feedforward_dim: Count = 1024
    depth_mult: Positive = 1.0  # RepVGG blocks per CSP: round-half-even(3 depth_mult)
    expansion: Positive = 1.0  # width of a CSP: floor(expansion hidden_dim / 2)


class DecoderConfig(Section):
    heads: Count = 8
    feedforward_dim: Count = 1024
    layers: Count = 6
    points: Several[Count] = Field(default=(3, 6, 3), description="1 or more on each stride")  # sampled per head
    queries: Count = 300
    bins: int = Field(default=32, ge=4, multiple_of=2, description="even, 4 or more")  # N: an edge has N + 1 values
    a: Positive = 0.5  # W(N) = 2a: the farthest an edge moves, in widths (heights) of the initial box
    c: Positive = 0.25  # curvature of W(n); the original's reg_scale is 1 / c


class DenoisingConfig(Section):
    queries: Whole = 100  # groups = max(1, queries // most boxes of a page); 0: no denoising
    # Most boxes of a page that are noised, drawn anew each step. All pages of a batch get slots for twice the boxes of
    # its fullest, and attention is quadratic in them: a quickstart step took 2.9 GiB for 2,000, and takes 1.5 for 300.
    max_boxes: Count = 300
    label_noise: Share = 0.25  # share of labels that are drawn anew
    box_noise: NonNegative = 1.0  # positives' corners move by up to this share of half the size, negatives' by 1x to 2x


class ModelConfig(Section):
    backbone: BackboneConfig = BackboneConfig()
    strides: Several[Count] = Field(default=(8, 16, 32), min_length=1, description="one or more")
    hidden_dim: Count = 256  # D
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    mean: Several[Share] = ()  # of RGB in [0, 1]; empty: what the backbone's timm weights were trained with
    std: Several[Positive] = Field(default=(), description="three positive numbers")
    init_from: str = ""  # start from the weights of a checkpoint of any kind: see dfine/checkpoints/loading.py
    # Classes that the checkpoint names too (case, `-`, `_` and spaces aside) keep their rows of the class heads and of
    # the denoising embedding. False: unless all classes are the same, all of these start anew.
    match_classes: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        strides, points, dim, encoder = [*self.strides], [*self.decoder.points], self.hidden_dim, self.encoder
        width, key = encoder.hidden_dim or dim, f"model.{'encoder.' if encoder.hidden_dim else ''}hidden_dim"
        divisor = f"a divisor of the encoder's width {width}"
        _require(len(points) == len(strides), "model.decoder.points", "one number a stride", points)
        _require(all(2 * a == b for a, b in pairwise(strides)), "model.strides", "each twice the one before", strides)
        _require(dim % self.decoder.heads == 0, "model.hidden_dim", "a multiple of model.decoder.heads", dim)
        _require(width % encoder.heads == 0, "model.encoder.heads", divisor, encoder.heads)
        _require(width % 4 == 0, key, "a multiple of 4 (positions are two sines and two cosines)", width)
        _require(encoder.expansion * width >= 2, "model.encoder.expansion", f"2 / {width} or more", encoder.expansion)
        _require(len(self.mean) in (0, 3), "model.mean", "three numbers", [*self.mean])
        _require(len(self.std) in (0, 3), "model.std", "three positive numbers", [*self.std])
        return self


class MatcherConfig(Section):
    classes: NonNegative = 2.0  # focal cost; the higher, the more a query's score decides who is matched
    l1: NonNegative = 5.0
    giou: NonNegative = 2.0
    # Queries that each box is matched to in the encoder's head. 1 is D-FINE; more (hybrid matching, arXiv 2207.13080)
    # shows that head more of what it must select, and by the union all heads more boxes: it saves steps from random
    # weights.
    encoder_queries: Count = 1
    # Epochs, fractions included, after which it is 1 again, since more teach the model to double boxes. 0: it stays.
    encoder_queries_end_epoch: NonNegative = 0.0


class LossConfig(Section):
    matcher: MatcherConfig = MatcherConfig()
    vfl: NonNegative = 1.0
    l1: NonNegative = 5.0
    giou: NonNegative = 2.0
    fgl: NonNegative = 0.15
    ddf: NonNegative = 1.5
    temperature: Positive = 5.0  # T of DDF


class ClassDistillConfig(Section):
    weight: NonNegative = 1.0  # as loss.vfl
    loss: Literal["kl", "mse"] = "kl"  # binary KL: its gradient does not vanish at sure scores; or MSE of probabilities
    temperature: Positive = 1.0  # of the KL; 1: sigmoid scores are soft already


class BoxDistillConfig(Section):
    weight: NonNegative = 5.0  # as loss.l1
    loss: Literal["l1", "mse"] = "l1"  # as for the truth; or "mse", to which small boxes hardly matter


class GoLsdConfig(Section):
    weight: NonNegative = 1.5  # as loss.ddf
    temperature: Positive = 1.0  # above 1 a student that agrees in its own frame decodes to other boxes
    start_epoch: NonNegative = 0.0  # epochs before it counts, fractions included


class CellsDistillConfig(Section):
    classes: NonNegative = 1.0  # binary KL of the encoder's scores at every memory cell
    boxes: NonNegative = 0.0  # L1 of the encoder's boxes, as far as the teacher trusts a cell; 5 is as loss.l1
    end_epoch: NonNegative = 0.0  # both fade linearly until then; 0: they stay


class MemoryDistillConfig(Section):
    weight: NonNegative = 2.0  # squared distance at every memory cell, as far as the teacher trusts it
    end_epoch: NonNegative = 0.0  # it fades linearly until then; 0: it stays


class DistillConfig(Section):
    """Total loss: alpha x (queries + cells + memory) + beta x the losses of `loss` on pages with boxes.

    Queries: (class + box + GO-LSD) x (`shared` on the teacher's queries + `denoising` on the denoising queries).
    """

    teacher: str = ""  # a checkpoint (as model.init_from) with this run's strides and class names; for distill.py alone
    alpha: NonNegative = 1.0  # 0: the teacher is not asked
    beta: NonNegative = 1.0  # 0: the truth teaches nothing
    shared: NonNegative = 1.0  # 0: the student's decoder does not run a second time
    denoising: NonNegative = 0.0  # needs a teacher that was trained with denoising queries; 1 is worth a trial
    classes: ClassDistillConfig = ClassDistillConfig()
    boxes: BoxDistillConfig = BoxDistillConfig()
    go_lsd: GoLsdConfig = GoLsdConfig()
    cells: CellsDistillConfig = CellsDistillConfig()
    memory: MemoryDistillConfig = MemoryDistillConfig()


class PagesConfig(Section):
    images: str = ""  # folder
    annotations: str = ""  # COCO json
    synthetic: Whole = 0  # pages of the embedded data set; used only where no annotations are named
    synthetic_seed: Whole = 0  # pages of different seeds have nothing in common
    synthetic_style: Literal["plain", "documents"] = "plain"  # documents look like real ones, of many kinds


class AugmentConfig(Section):
    """Each `p` is a probability a page; an augmentation with p = 0 is off. Paper that comes into view is white."""

    perspective_p: Share = 0.3
    perspective_scale: Extent = 0.04  # corners move by up to about this share of the page
    elastic_p: Share = 0.2
    elastic_alpha: Extent = 300.0  # with this sigma, points move by some 4 pixels
    elastic_sigma: Number = Field(default=20.0, ge=4, description="4 or more")  # pixels over which points move together
    rotation_p: Share = 0.3
    rotation_degrees: Extent = 5.0
    brightness_contrast_p: Share = 0.2
    brightness_contrast_limit: Number = Field(default=0.2, gt=0, le=1, description="above 0, up to 1")
    blur_p: Share = 0.1
    compression_p: Share = 0.1  # JPEG, quality 40 to 90
    noise_p: Share = 0.1


class DataConfig(Section):
    train: PagesConfig = PagesConfig()
    val: PagesConfig = PagesConfig()
    batch_size: Count = 16  # pages per process and step
    workers: Whole = 4  # loader processes per training process
    short_edges: Edges = (480, 512, 544, 576, 608, 640)  # training draws one a batch
    eval_short_edge: Edge = 640
    max_long_edge: Edge = 928
    # squash: every page gets one shape, as published weights want it, and the long edge has no limit
    sizing: Literal["keep_aspect", "squash"] = "keep_aspect"
    squash_aspect: Positive = 1.0  # height / width of squashed pages, whose shorter side is the short edge
    augment: AugmentConfig = AugmentConfig()
    # A training page that cannot be read, or is not there, is named, and the next of its batch takes its place. False:
    # it ends the run. In evaluation it always does, or AP would be that of other pages.
    skip_unreadable: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _require(
            self.batch_size > 1 or not self.skip_unreadable,
            "data.batch_size",
            "2 or more with data.skip_unreadable",
            self.batch_size,
        )
        edge, longest = max(*self.short_edges, self.eval_short_edge), self.max_long_edge
        _require(longest >= edge, "data.max_long_edge", f"at least the largest short edge ({edge})", longest)
        return self


class TrainConfig(Section):
    seed: int = Field(default=0, ge=0, lt=2**64, description="from 0 to below 2**64")  # as torch has it
    epochs: Count = 12
    max_steps: Whole = 0  # stop after this many optimizer steps (the schedule still spans the epochs); 0: never
    save_every: Whole = 1000  # steps between writing last.pt; 0: only at the end of each epoch
    eval_every: Whole = 2000  # steps between evaluations; 0: only at the end of each epoch
    learning_rate: Positive = 1e-4
    # The backbone's learning rate, as a share of the rest's. 1 is the first design's, as are weight_decay and clip. Who
    # fine-tunes strong weights takes less: D-FINE .5 (N, S), .1 (M), .05 (L), .01 (X) of 2e-4 to 8e-4, DEIMv2 with
    # DINOv3 .025 of 5e-4, LT-DETR with DINOv3 ConvNeXt .05 of 5e-4; all with weight decay near 1e-4 and clip 0.1. From
    # the quickstart to real pages 1 was the best of 1, .1 and .05 (tests/benchmarks/MEASURED.md).
    backbone_factor: NonNegative = 1.0
    # Learning rate (and so weight decay) of weight matrices under Muon (https://kellerjordan.github.io/posts/muon), as
    # a multiple of learning_rate, which all else keeps under AdamW; it saves steps from random weights. 0: AdamW alone.
    muon_factor: NonNegative = 0.0
    min_learning_rate: NonNegative = 1e-5  # where the cosine ends
    warmup: PartialShare = 0.02  # share of all steps
    weight_decay: NonNegative = 0.05  # none on norms and biases
    clip: Positive = 1.0  # gradient norm
    # Batches per optimizer step. Their losses are averaged, each over its own boxes: nearly, not quite, a larger batch.
    accumulate: Count = 1
    ema_decay: PartialShare = 0.9999  # of the averaged weights; in step n times 1 - exp(-n / ema_warmup)
    ema_warmup: Positive = 1000.0  # steps; the original's. Short runs need both smaller, as the quickstart has them
    freeze_backbone_steps: Whole = 0
    bf16: bool = True  # autocast on a GPU; boxes, softmax and losses stay in fp32
    bf16_cpu: bool = False  # train so on CPUs too that multiply bf16 (avx512_bf16, amx_bf16); others stay in fp32
    # Half the launches of a step (2,908 of 5,923 for the teacher, counted) for some two minutes of compiling. Off: what
    # it gains on a GPU has not been measured.
    compile: bool = False
    threads: Whole = 0  # CPU threads per process, at most one a core; 0: torch's choice


class Config(Section):
    run_dir: str = "runs/dfine"
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        denoising = self.distill.denoising
        _require(
            not denoising or self.model.denoising.queries > 0,
            "distill.denoising",
            "0 where model.denoising.queries is 0",
            denoising,
        )
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `key=value` overrides. Raises ConfigError; its message names the file."""
    try:
        tree = _yaml(Path(path).read_bytes())
        return override(from_dict({} if tree is None else tree), overrides)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_dict(tree: Any) -> Config:
    """Builds a config from nested mappings; what they leave out keeps its default. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_message(error.errors()[0])) from error


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested mappings and lists, for YAML and checkpoints."""
    return config.model_dump(mode="json")


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Applies overrides such as `train.epochs=3`; values are read as YAML. Raises ConfigError; it names the key."""
    tree = to_dict(config)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r}: write key=value, such as train.epochs=3")
        path, node = key.strip().split("."), tree
        for depth, name in enumerate(path[:-1], start=1):
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {text!r}: {'.'.join(path[:depth])} is a value and has no keys of its own")
        verbatim = isinstance(_field(path).default, str)
        node[path[-1]] = value if verbatim else _yaml(value, f"override {text!r}: the value is ")
    return from_dict(tree)


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice. YAML does, too, but PyYAML takes the last and drops the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for number, (key, _) in enumerate(node.value):
            if first.setdefault(str(key.value), number) != number:
                raise ValueError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}")
        return node


def _yaml(text: str | bytes, subject: str = "") -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # also ValueError on a date such as 2026-13-01, IndexError, RecursionError, ...
        raise ConfigError(f"{subject}not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def _field(path: Sequence[Any]) -> FieldInfo:
    """The field that a path of keys leads to; places in a list belong to the list's field. Refuses unknown keys."""
    field = FieldInfo(annotation=Config)
    for depth, name in enumerate(path, start=1):
        fields = getattr(field.annotation, "model_fields", None)
        if fields is None:
            break
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {'.'.join(map(str, path[:depth]))}, {advice}")
        field = fields[name]
    return field


def _message(error: Any) -> str:
    """An error of pydantic's in one line: the key, what it must be, and what was found."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])  # from `_require`
    field = _field(error["loc"])
    key = ".".join(name for name in error["loc"] if isinstance(name, str)) or "the config"
    kind, of_type, _ = error["type"].partition("_type")
    if of_type:
        names = {"string": "str", "tuple": "a list such as [1, 2]", "model": "keys and values"}
        return f"{key}: expected {names.get(kind, kind)}, found {error['input']!r}"
    what = error["msg"].removeprefix("Input should be ").replace("'", "")
    if field.description and error["type"] != "finite_number":
        what = field.description
    return f"{key}: must be {what}, found {error['input']!r}"
