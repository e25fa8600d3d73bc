"""Gives a model to other programs: `python -m dfine.export --checkpoint runs/NAME/best.pt --format FORMAT --out PATH`.

    onnx          a file for onnxruntime and others, of any model; `dfine.checkpoints.onnx_format` says what is in it
    transformers  config.json, preprocessor_config.json and model.safetensors, for `DFineForObjectDetection`
    original      model.pth, the weights as the original implementation has them; classes by number
    ours          a file such as model.pt for all commands here, less than half as large: in bf16 and compressed

For transformers and original, which take models around an HGNetV2, PATH is a folder; else it is a file.
"""

import argparse
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best.pt of a run, published weights, or a name on the hub")
    parser.add_argument("--format", required=True, choices=("onnx", "transformers", "original", "ours"))
    parser.add_argument("--out", required=True, type=Path, help="what to write")
    parser.add_argument("--half", action="store_true", help="onnx: weights in half precision, for half the file")
    options = parser.parse_args()
    if options.half and options.format != "onnx":
        parser.error("--half is for --format onnx")
    return options


if __name__ == "__main__":
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import sys
from typing import Any

from dfine.checkpoints import onnx_format, original, ours, transformers_format
from dfine.checkpoints.loading import load_model
from dfine.config import Config
from dfine.model.detector import DFine


def to_transformers(folder: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    transformers_format.write(folder, model, config, categories)
    print(f"{folder}: {len(categories)} classes for transformers' DFineForObjectDetection")
    if config.data.sizing == "keep_aspect":
        print("pages keep their aspect: in one batch transformers takes only pages of one size, best with sides in 32s")


def to_original(folder: Path, model: DFine, config: Config, categories: list[dict[str, Any]]) -> None:
    transformers_format.require_published(config.model, "the original")
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
