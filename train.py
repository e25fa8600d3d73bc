"""Trains a detector: `torchrun train.py --config configs/teacher.yaml [key=value ...]`, or plain `python train.py`."""

import argparse
import sys

import torch

from dfine import config, distributed
from dfine.data.batches import evaluation_loader, train_loader
from dfine.data.sources import open_source
from dfine.distributed import say
from dfine.losses.criterion import criterion, scheduled
from dfine.model.denoising import freshly_noised
from dfine.structures import Batch
from dfine.training import engine
from dfine.training.run import Run, resumes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt, if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.batch_size=8")
    arguments = parser.parse_intermixed_args()
    settings = config.load(arguments.config, arguments.overrides)
    if settings.distill != config.DistillConfig():
        raise config.ConfigError(
            f"{arguments.config}: distill: train.py knows no teacher; leave it out or use distill.py"
        )
    resumed = resumes(settings, arguments.resume)

    device = distributed.start()
    engine.prepare(settings)
    train_pages, val_pages = open_source(settings.data.train, "data.train"), open_source(settings.data.val, "data.val")
    engine.check_categories(train_pages, val_pages)
    say(engine.describe(train_pages, val_pages))
    batches, sampler = train_loader(train_pages, settings)
    val_batches = evaluation_loader(val_pages, settings)

    model = engine.build(settings, train_pages.categories, device, resumed)
    run = Run(settings, train_pages.categories, model, device, len(sampler) // settings.train.accumulate)
    run.open(arguments.resume)
    replica = engine.parallel(model, settings.train, device, settings.data.batch_size)

    def losses_of(batch: Batch) -> dict[str, torch.Tensor]:
        noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
        sizes = batch.sizes.to(device, non_blocking=True)  # of what is on the CPU, DDP would wait for the copy
        with engine.autocast(device, settings.train):
            output = replica(batch.images, sizes, noised)
        return criterion(output, batch.targets, model.decoder.w, scheduled(settings.loss, run.epoch))

    while not run.done:
        for _ in engine.train_epoch(run, batches, sampler, losses_of):
            if run.save_due:
                run.save()
            if run.evaluation_due:
                run.evaluate(val_batches, val_pages)
    if not run.interrupted:
        say(run.what_next())
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
