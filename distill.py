"""Trains a student with a frozen teacher: `torchrun distill.py --config configs/student_tiny.yaml [key=value ...]`.

The teacher is a checkpoint, `distill.teacher=PATH`, which a resumed run needs too; what is saved is a plain detector.
The script is train.py with a teacher.
"""

from dfine.arguments import training

if __name__ == "__main__":
    training(__doc__)  # before torch is imported, which takes seconds: --help need not wait for it

import sys

import torch
from torch.nn.utils import clip_grad_norm_

from dfine import config, distributed
from dfine.checkpoints.loading import load_teacher
from dfine.losses.criterion import criterion, scheduled, total
from dfine.losses.distillation import (
    active,
    distillation,
    end_epoch,
    memory_projection,
    on_labelled_pages,
    student_forward,
    teacher_forward,
)
from dfine.model.denoising import freshly_noised
from dfine.training import engine
from dfine.training.metrics import finite_means
from dfine.training.optim import average_decay, learning_rate, set_learning_rate
from dfine.training.run import Run
from dfine.training.saved import resumes


def main() -> None:
    options = training(__doc__)
    settings = config.load(options.config, options.overrides)
    resumed = resumes(settings, options.resume)

    device = distributed.start()
    engine.prepare(settings)
    data = engine.open_data(settings)
    model = engine.build(settings, data.categories, device, resumed)
    teacher = load_teacher(settings, options.config, data.categories)
    teacher.to(device).to(memory_format=torch.channels_last)
    projection = memory_projection(model, teacher).to(device) if "memory" in active(settings.distill, 0) else None
    run = Run(settings, data, model, device, projection)
    run.open(options.resume)
    ends, blank = end_epoch(settings.distill), 0 if data.train.counts is None else (data.train.counts == 0).sum()
    if settings.distill.alpha and blank and ends < run.last_step / run.epoch_steps:
        distributed.say(
            f"distillation ends after epoch {ends:g}: {blank} pages without boxes teach nothing from then on"
        )
    replica = engine.parallel(model, settings.train, device, settings.data.batch_size)
    projected = engine.replicated(run.auxiliary)

    if run.evaluation_due:  # the run was stopped in this evaluation
        run.evaluate()
    for batches in run.steps():  # of one optimizer step; train.accumulate of them
        losses_of = []
        for batch in batches:
            noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
            weights = active(settings.distill, run.epoch)
            with engine.autocast(device, settings.train), engine.exchange(batch is batches[-1], replica, projected):
                taught = teacher_forward(teacher, batch, noised, weights)
                output = student_forward(replica, projected, batch, noised, taught, weights)
            judged = on_labelled_pages(output, batch.targets) if settings.distill.alpha else output
            losses = criterion(judged, batch.targets, model.decoder.w, scheduled(settings.loss, run.epoch))
            losses = {name: settings.distill.beta * term for name, term in losses.items()}
            if taught:
                w = (model.decoder.w, teacher.decoder.w)
                matcher = settings.loss.matcher
                losses |= distillation(output, taught, *w, batch.targets, weights, settings.distill, matcher)
            loss = total(losses)
            (loss / len(batches)).backward()
            losses_of.append({"loss": loss, **losses})
        if run.backbone_frozen:
            model.backbone.zero_grad()
        norm = clip_grad_norm_([*model.parameters(), *run.auxiliary.parameters()], settings.train.clip)
        values = finite_means(run.step, batches, losses_of, norm)

        rate = learning_rate(run.step, run.schedule_steps, settings.train)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.decay = average_decay(run.step, settings.train)
        run.ema.update(model)

        values |= {"learning_rate": rate, "learning_rate_backbone": rate * settings.train.backbone_factor}
        run.step_done(values)
        if run.save_due:
            run.save()
        if run.evaluation_due:
            run.evaluate()
    if not run.interrupted:
        distributed.say(run.what_next())
    distributed.finish()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
