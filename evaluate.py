"""COCO metrics of a checkpoint on `data.val`: `python evaluate.py --checkpoint runs/NAME/best.pt [key=value ...]`.

For best.pt it writes best.metrics.json and best.detections.json (COCO results), beside the checkpoint (into it where it
is a folder, to runs/NAME where it is org/NAME on the hub) or into `run_dir` where that is given. The metrics of a run's
checkpoint are those that the run itself wrote down. Classes of published weights are those of the json that have the
same name; what else such weights know is left out. `--classes Section-header=title Title=title ...` says which class of
the checkpoint counts as which of the json, whose names differ; what is not named is left out.
"""

import argparse

from dfine.arguments import fraction, open_streams, threads_sleep


def arguments() -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="best.pt, an ONNX file, published weights, org/NAME, or embedded"
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS=NAME", help="what a class is called in data.val")
    parser.add_argument(
        "--dedupe",
        type=fraction,
        default=1.0,
        metavar="IOU",
        help="drop boxes that overlap a better one by more, as predict does with 0.7 (default: none are dropped)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.val.images=pages/test")
    options = parser.parse_intermixed_args()
    taken = [text for text in options.classes or () if text.startswith(("data.", "train.", "run_dir="))]
    if taken:
        parser.error(f"--classes takes all that follows it: move {taken[0]} before it")
    return options


if __name__ == "__main__":
    threads_sleep()
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import json
import sys
from pathlib import Path

import numpy as np
import torch

from dfine import config, distributed
from dfine.checkpoints.loading import load_model
from dfine.checkpoints.onnx_format import OnnxModel, is_onnx
from dfine.config import ConfigError
from dfine.data.batches import evaluation_loader
from dfine.data.sources import open_source
from dfine.distributed import say
from dfine.files import try_writing, write_whole
from dfine.inference.evaluation import category_ids, coco_metrics, coco_results, find, ids_by_name, table
from dfine.model.detector import DFine
from dfine.training import engine


def main() -> None:
    options = arguments()
    model: DFine | OnnxModel
    if is_onnx(options.checkpoint):
        model = OnnxModel(options.checkpoint)
        settings, categories = model.config, model.categories
    else:
        model, settings, categories = load_model(options.checkpoint)
    for text in options.overrides:
        if text.startswith(("model", "loss", "distill")):
            raise ConfigError(f"override {text!r}: the model is the checkpoint's; set data, train and run_dir only")
    checkpoint = Path(options.checkpoint)
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    folder = beside if checkpoint.exists() else Path("runs", checkpoint.name.partition("@")[0])  # a name on the hub
    settings = config.override(settings, [f"run_dir={folder}", *options.overrides])

    device = distributed.start()
    engine.prepare(settings)
    pages = open_source(settings.data.val, "data.val")
    if options.classes:
        ids = ids_by_name(options.classes, categories, pages.categories, options.checkpoint)
    else:
        ids = category_ids(categories, pages.categories, options.checkpoint)
    say(pages.summary(settings.model.decoder.queries))
    if None in ids:
        unknown = ", ".join(c["name"] for c, number in zip(categories, ids, strict=True) if number is None)
        say(f"left out, since {'--classes' if options.classes else 'data.val'} does not have them: {unknown}")

    folder = Path(settings.run_dir)
    distributed.on_main(lambda: try_writing(folder, "run_dir"))
    loader = evaluation_loader(pages, settings)
    if isinstance(model, DFine):
        model.to(device).to(memory_format=torch.channels_last)  # as in training: the same numbers to the last digit
    numbers, rows = find(model, loader, pages, settings.train.bf16, category_ids=ids, dedupe=options.dedupe)
    metrics = coco_metrics(pages.ground_truth(numbers), rows)
    everywhere = distributed.gather(rows, to=0)
    if distributed.is_main():
        say(table(metrics))
        rows = np.concatenate(everywhere)
        place = np.argsort(pages.ids)  # pages in the order of the json
        place = place[np.searchsorted(pages.ids, rows[:, 0], sorter=place)]
        # A part at a time: as dictionaries, all would take gigabytes.
        parts = np.array_split(rows[np.argsort(place, kind="stable")], len(rows) // 10_000 + 1)
        detections = f"[{', '.join(filter(None, (json.dumps(coco_results(part))[1:-1] for part in parts)))}]"
        name = checkpoint.stem if checkpoint.is_file() else checkpoint.name.partition("@")[0]
        metrics_file, detections_file = folder / f"{name}.metrics.json", folder / f"{name}.detections.json"
        write_whole({metrics_file: json.dumps(metrics, indent=2), detections_file: detections})
        say(f"\nwritten: {metrics_file} and {detections_file}")
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
