"""COCO metrics of a checkpoint on `data.val`: `python evaluate.py --checkpoint runs/NAME/best.pt [key=value ...]`.

Writes metrics.json and detections.json (COCO results) beside the checkpoint, or into `run_dir` where that is given.
"""

import argparse
import json
import sys
from pathlib import Path

from dfine import config, distributed
from dfine.checkpoints.ours import load_model
from dfine.config import ConfigError
from dfine.data.batches import evaluation_loader
from dfine.data.sources import open_source
from dfine.distributed import say
from dfine.inference.evaluation import coco_metrics, find, table
from dfine.training import engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="best.pt or last.pt of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.val.images=pages/test")
    arguments = parser.parse_intermixed_args()
    model, settings, categories = load_model(arguments.checkpoint)
    for text in arguments.overrides:
        if text.startswith(("model", "loss", "distill")):
            raise ConfigError(f"override {text!r}: the model is the checkpoint's; set data, train and run_dir only")
    settings = config.override(settings, [f"run_dir={arguments.checkpoint.parent}", *arguments.overrides])

    device = distributed.start()
    engine.prepare(settings)
    pages = open_source(settings.data.val, "data.val")
    if pages.categories != categories:
        raise ConfigError(f"data.val: has the categories {pages.categories}, {arguments.checkpoint} knows {categories}")
    say(pages.summary())

    detections = find(model.to(device), evaluation_loader(pages, settings), pages, settings.train.bf16)
    if distributed.is_main():
        metrics = coco_metrics(pages.ground_truth(), detections)
        print(table(metrics))
        folder = Path(settings.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (folder / "detections.json").write_text(json.dumps(detections))
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
