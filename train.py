"""Trains a detector: `torchrun train.py --config configs/teacher.yaml [key=value ...]`, or plain `python train.py`."""

from dfine.arguments import training

if __name__ == "__main__":
    training(__doc__)  # before torch is imported, which takes seconds: --help need not wait for it

import sys

from torch.nn.utils import clip_grad_norm_

from dfine import config, distributed
from dfine.losses.criterion import criterion, scheduled, total
from dfine.model.denoising import freshly_noised
from dfine.training import engine
from dfine.training.metrics import finite_means
from dfine.training.optim import average_decay, learning_rate, set_learning_rate
from dfine.training.run import Run
from dfine.training.saved import resumes


def main() -> None:
    options = training(__doc__)
    settings = config.load(options.config, options.overrides)
    if settings.distill != config.DistillConfig():
        raise config.ConfigError(
            f"{options.config}: distill: train.py knows no teacher; leave it out or use distill.py"
        )
    resumed = resumes(settings, options.resume)

    device = distributed.start()
    engine.prepare(settings)
    data = engine.open_data(settings)
    model = engine.build(settings, data.categories, device, resumed)
    run = Run(settings, data, model, device)
    run.open(options.resume)
    replica = engine.parallel(model, settings.train, device, settings.data.batch_size)

    if run.evaluation_due:  # the run was stopped in this evaluation
        run.evaluate()
    for batches in run.steps():  # of one optimizer step; train.accumulate of them
        losses_of = []
        for batch in batches:
            noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
            with engine.autocast(device, settings.train), engine.exchange(batch is batches[-1], replica):
                output = replica(batch.images, batch.sizes, noised)
            losses = criterion(output, batch.targets, model.decoder.w, scheduled(settings.loss, run.epoch))
            loss = total(losses)
            (loss / len(batches)).backward()
            losses_of.append({"loss": loss, **losses})
        if run.backbone_frozen:
            model.backbone.zero_grad()
        norm = clip_grad_norm_(model.parameters(), settings.train.clip)
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
