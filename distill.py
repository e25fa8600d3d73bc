"""Trains a student with a frozen teacher: `torchrun distill.py --config configs/student_tiny.yaml [key=value ...]`.

The teacher is a checkpoint, `distill.teacher=PATH`, which a resumed run needs too; what is saved is a plain detector.
"""

import argparse
import sys

import torch

from dfine import config, distributed
from dfine.checkpoints.loading import load_teacher
from dfine.data.batches import evaluation_loader, train_loader
from dfine.data.sources import open_source
from dfine.distributed import say
from dfine.losses.criterion import criterion, scheduled
from dfine.losses.distillation import active, answered, asked, distillation, memory_projection, on_labelled_pages
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
    resumed = resumes(settings, arguments.resume)

    device = distributed.start()
    engine.prepare(settings)
    train_pages, val_pages = open_source(settings.data.train, "data.train"), open_source(settings.data.val, "data.val")
    engine.check_categories(train_pages, val_pages)
    say(engine.describe(train_pages, val_pages))
    batches, sampler = train_loader(train_pages, settings)
    val_batches = evaluation_loader(val_pages, settings)

    model = engine.build(settings, train_pages.categories, device, resumed)
    teacher = load_teacher(settings, arguments.config, train_pages.categories)
    teacher.to(device).to(memory_format=torch.channels_last)
    projection = memory_projection(model, teacher).to(device) if "memory" in active(settings.distill, 0) else None
    run = Run(settings, train_pages.categories, model, device, len(sampler) // settings.train.accumulate, projection)
    run.open(arguments.resume)
    replica = engine.parallel(model, settings.train, device, settings.data.batch_size)
    projected = engine.replicated(run.auxiliary, device)

    def losses_of(batch: Batch) -> dict[str, torch.Tensor]:
        noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
        weights = active(settings.distill, run.epoch)
        with engine.autocast(device, settings.train):
            taught = asked(teacher, batch, noised, weights)
            output = answered(replica, projected, batch, noised, taught, weights)
        judged = on_labelled_pages(output, batch.targets) if settings.distill.alpha else output
        losses = criterion(judged, batch.targets, model.decoder.w, scheduled(settings.loss, run.epoch))
        losses = {name: settings.distill.beta * loss for name, loss in losses.items()}
        if taught:
            w = (model.decoder.w, teacher.decoder.w)
            losses |= distillation(output, taught, *w, batch.targets, weights, settings.distill, settings.loss.matcher)
        return losses

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
