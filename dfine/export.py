"""Gives a model to other programs: `python -m dfine.export --checkpoint runs/NAME/best.pt --format FORMAT --out PATH`.

    onnx          a file for onnxruntime, OpenVINO and others, of any model; what is in it is said below
    transformers  config.json, preprocessor_config.json and model.safetensors, for `DFineForObjectDetection`
    original      model.pth, the weights as the original implementation has them; classes by number
    ours          a file such as model.pt for all commands here, less than half as large: in bf16 and compressed

PATH is a folder for transformers and original, else a file. The original knows HGNetV2 as a backbone,
transformers most of timm's. It takes pages of one size alone: for a model whose pages keep their aspect choose one, by
data.sizing=squash and, for pages in portrait, data.squash_aspect=1.45 (height / width; transformers 4 needs squares).

An ONNX file has

    in   images     (B, 3, H, W) uint8 RGB; H and W are multiples of the last stride (32), padding is 0, right and below
         sizes      (B, 2) int64: valid height, width of each page on that canvas
         originals  (B, 2) int64: height, width that boxes are wanted in, such as those of the scans
    out  scores     (B, K) float32 from 0 to 1, the best first; K is 300 unless queries times classes are fewer
         labels     (B, K) int64, indices into `categories`
         boxes      (B, K, 4) float32 xyxy in pixels of `originals`, clipped to the page

and metadata, which are texts:

    categories     JSON list: `id` and `name` of each class, in the order of the labels
    preprocessing  JSON: `sizing` and what it needs. keep_aspect: the page is scaled by
                   min(short_edge / shorter side, max_long_edge / longer side), sides rounded; squash: to short_edge
                   (shorter) by short_edge times height_by_width or its inverse (longer). `interpolation` says how
    config         JSON: the run's config, for `evaluate.py`
    dfine_version  of the project that wrote it

One file takes any number of pages and any canvas. Only pages that need the same canvas should go into one call: on a
larger canvas convolutions read more padding, and scores change a little. Deformable attention is written as reads of
four cells, without GridSample, which TensorRT computes wrongly. On a canvas or with sizes that are not as said here
onnxruntime fails, at a node whose name says why; OpenVINO gives wrong boxes. On CPUs that multiply bf16 OpenVINO does
so of its own accord, in the decoder too, which spoils the boxes: set INFERENCE_PRECISION_HINT to f32.
"""

import argparse
from pathlib import Path

from dfine.arguments import open_streams


def arguments() -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best.pt of a run, published weights, or a name on the hub")
    parser.add_argument("--format", required=True, choices=("onnx", "transformers", "original", "ours"))
    parser.add_argument("--out", required=True, type=Path, help="what to write")
    parser.add_argument("--half", action="store_true", help="onnx: in fp16, but for boxes and ranking; half the file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="how pages are sized, as data.sizing=squash")
    options = parser.parse_intermixed_args()
    if options.half and options.format != "onnx":
        parser.error("--half is for --format onnx")
    return options


if __name__ == "__main__":
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import sys
from typing import Any

from dfine.checkpoints import onnx_format, original, ours, transformers_format
from dfine.checkpoints.loading import load_model
from dfine.config import Config, ConfigError, override
from dfine.data.transforms import model_size
from dfine.files import try_writing
from dfine.model.detector import DFine


def to_transformers(folder: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    transformers_format.write(folder, model, config, categories)
    height, width = model_size((1, 1), config.data.eval_short_edge, config.data)
    print(
        f"{folder}: {len(categories)} classes and pages of {height}x{width} for transformers' DFineForObjectDetection"
    )


def to_original(folder: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    transformers_format.require("the original", transformers_format.unpublished(config.model))
    mean, std = (x.flatten().tolist() for x in (model.mean, model.std))
    if (mean, std) != ([0.0] * 3, [1.0] * 3):
        raise ours.CheckpointError(
            f"the original takes images in [0, 1] as they are, this model with mean {mean} and std {std}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    ours.save(folder / "model.pth", {"model": original.state_of(model, config.model)})
    print(f"{folder / 'model.pth'}: classes {', '.join(category['name'] for category in categories)}, in this order")


def to_onnx(path: Path, model: DFine, config: Config, categories: list[dict[str, Any]], half: bool = False) -> None:
    if not onnx_format.is_onnx(path) or path.is_dir():
        raise ours.CheckpointError(f"{path}: name a file that ends in .onnx")
    try_writing(path.parent, "--out")
    print(f"{path}: torch traces the model and writes its graph, which takes about a minute", flush=True)
    onnx_format.write(path, model, config, categories, half)
    size, stride = path.stat().st_size / 1e6, model.strides[-1]
    print(f"{path}: {size:.1f} MB, {len(categories)} classes, any number of pages, any sides in multiples of {stride}")


def to_ours(path: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    if path.suffix != ".pt":
        raise ours.CheckpointError(f"{path}: name a file that ends in .pt")
    ours.save_small(path, ours.weights(config, categories, model))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {len(categories)} classes")


def main() -> None:
    options = arguments()
    model, config, categories = load_model(options.checkpoint)
    for text in options.overrides:
        if not text.startswith("data."):
            raise ConfigError(f"override {text!r}: the model is the checkpoint's; set data only")
    config = override(config, options.overrides)
    if options.format == "onnx":
        to_onnx(options.out, model, config, categories, options.half)
    else:
        write = {"transformers": to_transformers, "original": to_original, "ours": to_ours}[options.format]
        write(options.out, model, config, categories)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
