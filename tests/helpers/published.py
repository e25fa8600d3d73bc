"""Made-up checkpoints in the layout of `transformers`, written with it or from recorded names and shapes."""

import json
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

# What differs between the published sizes (the rest are transformers' defaults), by the backbone of timm.
B0 = {
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512],
    "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024],
    "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [3, 3, 3, 3],
    "use_learnable_affine_block": True,
}
B2 = {
    "stem_channels": [3, 24, 32],
    "stage_in_channels": [32, 96, 384, 768],
    "stage_mid_channels": [32, 64, 128, 256],
    "stage_out_channels": [96, 384, 768, 1536],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [4, 4, 4, 4],
    "use_learnable_affine_block": True,
}
B4 = {
    "stem_channels": [3, 32, 48],
    "stage_in_channels": [48, 128, 512, 1024],
    "stage_mid_channels": [48, 96, 192, 384],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 1, 3, 1],
    "stage_numb_of_layers": [6, 6, 6, 6],
}
B5 = {
    "stem_channels": [3, 32, 64],
    "stage_in_channels": [64, 128, 512, 1024],
    "stage_mid_channels": [64, 128, 256, 512],
    "stage_out_channels": [128, 512, 1024, 2048],
    "stage_num_blocks": [1, 2, 5, 2],
    "stage_numb_of_layers": [6, 6, 6, 6],
}
NANO = {
    "num_feature_levels": 2,
    "feat_strides": [16, 32],
    "encode_proj_layers": [1],
    "d_model": 128,
    "encoder_hidden_dim": 128,
    "encoder_ffn_dim": 512,
    "decoder_in_channels": [128, 128],
    "decoder_ffn_dim": 512,
    "decoder_layers": 3,
    "decoder_n_points": [6, 6],
    "depth_mult": 0.5,
    "hidden_expansion": 0.34,
}
POINTS = {"decoder_n_points": [3, 6, 3]}
WIDE = {"encoder_hidden_dim": 384, "encoder_ffn_dim": 2048, "decoder_in_channels": [384, 384, 384]}
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "n": (B0, NANO),
    "s": (B0, POINTS | {"decoder_layers": 3, "depth_mult": 0.34, "hidden_expansion": 0.5}),
    "m": (B2, POINTS | {"decoder_layers": 4, "depth_mult": 0.67}),
    "l": (B4, POINTS),
    "x": (B5, POINTS | WIDE),
}
# Nano, cut down.
SMALL = NANO | {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 48,
    "decoder_in_channels": [32, 32],
    "decoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_n_points": [3, 2],
    "hidden_expansion": 0.5,
    "num_queries": 20,
}
SIZES["small"] = (B0, SMALL)
# The same on three maps of a backbone of timm.
ON_TIMM = SMALL | {
    "num_feature_levels": 3,
    "feat_strides": [8, 16, 32],
    "encode_proj_layers": [2],
    "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": [2, 3, 1],
}
for name, indices in (("test_convnext", [1, 2, 3]), ("convnext_atto", [1, 2, 3]), ("convnext_tiny", [1, 2, 3])):
    SIZES[name] = ({"backbone": name, "out_indices": indices}, ON_TIMM)
SIZES["resnet18"] = ({"backbone": "resnet18", "out_indices": [2, 3, 4]}, ON_TIMM)
RECORDED = Path(__file__).parents[1] / "checkpoints" / "published_small.json"
RECORDED_ON_TIMM = RECORDED.with_name("published_on_timm.json")


def publish(folder: Path, tensors: dict[str, list[int]], config: dict[str, Any], preprocessor: dict[str, Any]) -> Path:
    """A folder as transformers writes it, with made-up weights of these names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    scale = torch.tensor([1 / points for points in config["decoder_n_points"] for _ in range(points)])
    state = {
        name: scale.clone() if name.endswith("num_points_scale") else made_up(name, shape)
        for name, shape in tensors.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def made_up(name: str, shape: list[int]) -> Tensor:
    """Random numbers that depend on the name alone, and keep activations in bounds."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    uniform = 2 * np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32) - 1  # from -1 to 1
    if len(shape) > 1:
        return torch.from_numpy(uniform * math.sqrt(3 / math.prod(shape[1:])))
    if name.endswith("reg_scale"):
        return torch.from_numpy(8 + uniform)  # config.json says 4, as that of the published X
    scales = name.endswith((".weight", ".scale", ".running_var", ".up"))  # of norms, if they are vectors
    return torch.from_numpy(0.7 + 0.3 * uniform if scales else 0.2 * uniform)


def noise(height: int, width: int) -> Tensor:
    """(2, 3, height, width) float64 in [0, 1], everywhere the same."""
    return torch.from_numpy(np.random.default_rng(0).random((2, 3, height, width)))


def publish_size(folder: Path, size: str, names: list[str], **changes: Any) -> Path:
    """`publish` with names, shapes and settings from transformers, which it needs."""
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        RTDetrImageProcessor,
        TimmBackboneConfig,
    )

    backbone, rest = SIZES[size]
    if "backbone" in backbone:
        rest = rest | {"backbone_config": TimmBackboneConfig(**backbone)}
    else:
        levels, channels = rest.get("num_feature_levels", 3), backbone["stage_out_channels"]
        indices = list(range(5 - levels, 5))
        hgnet = HGNetV2Config(**backbone, hidden_sizes=channels, out_indices=indices)
        rest = rest | {"backbone_config": hgnet, "encoder_in_channels": channels[-levels:]}
    config = DFineConfig(
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        **rest | changes,
    )
    DFineForObjectDetection(config).save_pretrained(folder)
    RTDetrImageProcessor().save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    settings = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
    return publish(folder, tensors, *settings)


def their_answers(folder: Path, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, Q, C) and boxes (B, Q, 4) cxcywh of transformers' model in a folder, in float64."""
    from transformers import DFineForObjectDetection

    model, report = DFineForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.inference_mode():
        output = model.eval().double()(pages)
    return output.logits, output.pred_boxes


def their_detections(folder: Path, page: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (Q,), labels (Q,) and boxes (Q, 4) xyxy in pixels of a page, by transformers alone; the best first."""
    from transformers import AutoImageProcessor, DFineForObjectDetection

    processor, model = (kind.from_pretrained(folder) for kind in (AutoImageProcessor, DFineForObjectDetection))
    with torch.inference_mode():
        output = model.eval()(**processor(images=Image.fromarray(page), return_tensors="pt"))
    found = processor.post_process_object_detection(output, threshold=0, target_sizes=[page.shape[:2]])[0]
    return found["scores"].numpy(), found["labels"].numpy(), found["boxes"].numpy()


def record(path: Path, size: str) -> None:
    """Writes a recorded file: `python -c "from published import *; record(RECORDED, 'small')"` in this folder.

    The other one: `record(RECORDED_ON_TIMM, 'test_convnext')`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = publish_size(Path(temporary), size, ["Text", "Section-header", "List-item"])
        logits, boxes = their_answers(folder, noise(96, 160))
        tensors = {name: list(x.shape) for name, x in load_file(folder / "model.safetensors").items()}
        settings = {kind: json.loads((folder / f"{kind}_config.json").read_text()) for kind in ("preprocessor",)}
        settings["config"] = json.loads((folder / "config.json").read_text())
    answers = {"logits": logits.tolist(), "boxes": boxes.tolist()}
    path.write_text(json.dumps({"tensors": tensors, **settings, **answers}) + "\n")


def recorded(path: Path = RECORDED) -> dict[str, Any]:
    """A nano model cut down, as transformers 5.24 writes it and answers with it; weights are made up from the names.

    That of `RECORDED_ON_TIMM` has a ConvNeXt of timm.
    """
    return json.loads(path.read_text())


def publish_recorded(folder: Path, path: Path = RECORDED) -> Path:
    """A recorded model as a folder."""
    content = recorded(path)
    return publish(folder, content["tensors"], content["config"], content["preprocessor"])
