"""Gives a model to other programs: `python -m dfine.export --checkpoint runs/NAME/best.pt --format FORMAT --out DIR`.

    transformers  config.json, preprocessor_config.json and model.safetensors, for `DFineForObjectDetection`
    original      model.pth, the weights as the original implementation has them; classes by number

Both are for models around an HGNetV2.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfine.checkpoints import original, ours, transformers_format
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


FORMATS: dict[str, Callable[[Path, DFine, Config, list[dict[str, Any]]], None]] = {
    "transformers": to_transformers,
    "original": to_original,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best.pt of a run, published weights, or a name on the hub")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    arguments = parser.parse_args()
    model, config, categories = load_model(arguments.checkpoint)
    FORMATS[arguments.format](arguments.out, model, config, categories)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
