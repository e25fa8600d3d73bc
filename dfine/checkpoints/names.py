"""What the tensors of a D-FINE are called: in our models, by the original implementation, and by `transformers`.

`TABLE` has a row for each kind of module: its name in our models, in a checkpoint of the original, and in a published
model.safetensors. `#` is a number, `+` the number after it, `*` anything. What follows the module's name, such as
`.weight`, is the same in all three, but for the query, key and value projections of attention, which `transformers`
alone keeps apart.
"""

import re
from typing import NamedTuple


class Row(NamedTuple):
    ours: str
    original: str
    transformers: str


def within(ours: str, original: str, transformers: str, rows: list[Row]) -> list[Row]:
    """Rows for the parts of a module."""
    module = Row(ours, original, transformers)
    return [Row(*(f"{outer}.{inner}" for outer, inner in zip(module, row, strict=True))) for row in rows]


CONV_NORM = [Row("0", "conv", "conv"), Row("1", "norm", "norm")]
PROJECTION = [Row("0", "conv", "0"), Row("1", "norm", "1")]
MLP = [Row(str(2 * i), f"layers.{i}", f"layers.{i}") for i in range(3)]  # ReLUs have numbers in ours
HGNET = [
    Row("*.conv", "*.conv", "*.convolution"),
    Row("*.bn", "*.bn", "*.normalization"),
    Row("*.lab", "*.lab", "*.lab"),
]
CSP = [
    *within("deep.0", "conv1", "conv1", CONV_NORM),
    *within("shallow", "conv2", "conv2", CONV_NORM),
    *within("deep.+.conv3", "bottlenecks.#.conv1", "bottlenecks.#.conv1", CONV_NORM),  # ours are named by kernel
    *within("deep.+.conv1", "bottlenecks.#.conv2", "bottlenecks.#.conv2", CONV_NORM),
]
FUSION = [
    *within("stem", "cv1", "conv1", CONV_NORM),
    *within("first.0", "cv2.0", "csp_rep1", CSP),
    *within("first.1", "cv2.1", "conv2", CONV_NORM),
    *within("second.0", "cv3.0", "csp_rep2", CSP),
    *within("second.1", "cv3.1", "conv3", CONV_NORM),
    *within("head", "cv4", "conv4", CONV_NORM),
]
AIFI = [
    Row("attention", "self_attn", "self_attn"),
    Row("norm1", "norm1", "self_attn_layer_norm"),
    Row("feedforward.0", "linear1", "fc1"),
    Row("feedforward.2", "linear2", "fc2"),
    Row("norm2", "norm2", "final_layer_norm"),
]
DECODER_LAYER = [
    Row("self_attention", "self_attn", "self_attn"),
    Row("norm1", "norm1", "self_attn_layer_norm"),
    Row("cross_attention.offsets", "cross_attn.sampling_offsets", "encoder_attn.sampling_offsets"),
    Row("cross_attention.weights", "cross_attn.attention_weights", "encoder_attn.attention_weights"),
    Row("cross_attention.points", "cross_attn.num_points_scale", "encoder_attn.num_points_scale"),
    Row("gate", "gateway", "gateway"),
    Row("feedforward.0", "linear1", "fc1"),
    Row("feedforward.2", "linear2", "fc2"),
    Row("norm2", "norm3", "final_layer_norm"),
]
HGNETV2 = [
    *within("backbone.body.stem", "backbone.stem", "model.backbone.model.embedder", HGNET),
    *within("backbone.body.stages_#", "backbone.stages.#", "model.backbone.model.encoder.stages.#", HGNET),
]
TABLE = [
    *HGNETV2,
    Row("backbone.body", "backbone.timm", "model.backbone.model._backbone"),  # any of timm; the original has none
    *within("encoder.projections.#", "encoder.input_proj.#", "model.encoder_input_proj.#", PROJECTION),
    *within("encoder.aifi", "encoder.encoder.0.layers.0", "model.encoder.encoder.0.layers.0", AIFI),
    *within("encoder.laterals.#", "encoder.lateral_convs.#", "model.encoder.lateral_convs.#", CONV_NORM),
    *within("encoder.top_down.#", "encoder.fpn_blocks.#", "model.encoder.fpn_blocks.#", FUSION),
    *within(
        "encoder.downsamples.#.0",
        "encoder.downsample_convs.#.0.cv1",
        "model.encoder.downsample_convs.#.conv1",
        CONV_NORM,
    ),
    *within(
        "encoder.downsamples.#.1",
        "encoder.downsample_convs.#.0.cv2",
        "model.encoder.downsample_convs.#.conv2",
        CONV_NORM,
    ),
    *within("encoder.bottom_up.#", "encoder.pan_blocks.#", "model.encoder.pan_blocks.#", FUSION),
    *within("projections.#", "decoder.input_proj.#", "model.decoder_input_proj.#", PROJECTION),
    Row("selection.project", "decoder.enc_output.proj", "model.enc_output.0"),
    Row("selection.norm", "decoder.enc_output.norm", "model.enc_output.1"),
    Row("selection.class_head", "decoder.enc_score_head", "model.enc_score_head"),
    *within("selection.box_head", "decoder.enc_bbox_head", "model.enc_bbox_head", MLP),
    Row("denoising_labels", "decoder.denoising_class_embed", "model.denoising_class_embed"),
    *within("decoder.position", "decoder.query_pos_head", "model.decoder.query_pos_head", MLP),
    *within("decoder.initial_box", "decoder.pre_bbox_head", "model.decoder.pre_bbox_head", MLP),
    *within("decoder.layers.#", "decoder.decoder.layers.#", "model.decoder.layers.#", DECODER_LAYER),
    Row("decoder.class_heads.#", "decoder.dec_score_head.#", "model.decoder.class_embed.#"),
    *within("decoder.edge_heads.#", "decoder.dec_bbox_head.#", "model.decoder.bbox_embed.#", MLP),
    *within("decoder.lqe.#.mlp", "decoder.decoder.lqe_layers.#.reg_conf", "model.decoder.lqe_layers.#.reg_conf", MLP),
    # In our models these are no tensors but numbers of the config: a, 1 / c, and (above) the points of each level.
    Row("decoder.a", "decoder.up", "model.decoder.up"),
    Row("decoder.inverse_c", "decoder.reg_scale", "model.decoder.reg_scale"),
]
WILD = {"#": r"(\d+)", "+": r"(\d+)", "*": r"(.+)"}
PATTERNS = {  # their last group is what follows the module's name
    column: [
        re.compile("".join(WILD.get(c) or re.escape(c) for c in getattr(row, column)) + r"(|\..+)") for row in TABLE
    ]
    for column in Row._fields
}


def renamed(name: str, source: str, target: str, timm: bool = False) -> str | None:
    """The name of a tensor in another column of the table; None if the table does not know it.

    Args:
        source, target: "ours", "original" or "transformers".
        timm: the backbone is one of timm's there too. Its names in our model, such as `stages_1.downsample.conv`, can
            be those of an HGNetV2.
    """
    rows = slice(len(HGNETV2) if timm else 0, None)
    for row, pattern in zip(TABLE[rows], PATTERNS[source][rows], strict=True):
        if found := pattern.fullmatch(name):
            *values, rest = found.groups()
            tokens, others = (re.findall(r"[#+*]", getattr(row, column)) for column in (source, target))
            for i, (token, other) in enumerate(zip(tokens, others, strict=True)):
                if token != other:
                    values[i] = str(int(values[i]) + (1 if other == "+" else -1))
            texts = re.split(r"[#+*]", getattr(row, target))
            return "".join(text + value for text, value in zip(texts, [*values, rest], strict=True))
    return None
