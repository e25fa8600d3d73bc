"""One epoch of steps, and what a script does before the first."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from dfine import distributed
from dfine.boxes import multiplies_bf16
from dfine.checkpoints.loading import initialise
from dfine.checkpoints.ours import bare_model
from dfine.config import Config, ConfigError, TrainConfig
from dfine.data.batches import TrainBatches, WorkerError
from dfine.data.sources import Source
from dfine.data.transforms import PageError
from dfine.distributed import say
from dfine.model.detector import DFine
from dfine.structures import Batch
from dfine.training import optim
from dfine.training.run import Run

Losses = Callable[[Batch], dict[str, Tensor]]


def prepare(config: Config) -> None:
    """Seeds and threads of this process."""
    if config.train.threads:
        torch.set_num_threads(min(config.train.threads, distributed.cores()))
    torch.manual_seed(config.train.seed)  # the same in every process: all start from the same weights


def check_categories(train: Source, val: Source) -> None:
    """Raises ConfigError unless both mean the same by every label."""
    if train.categories != val.categories:
        raise ConfigError(
            f"data.val.annotations: its categories {val.categories} are not those of data.train: {train.categories}"
        )


def describe(train: Source, val: Source) -> str:
    """What is about to be trained on: pages, boxes and the category map, so that a mistake shows before it costs."""
    labels = ", ".join(f"{label} {c['name']} (id {c['id']})" for label, c in enumerate(train.categories))
    return f"train: {train.summary()}\nval: {val.summary()}\nlabels: {labels}"


def build(config: Config, categories: list[dict[str, Any]], device: torch.device, resumed: bool) -> DFine:
    """The model as the run starts with it.

    Args:
        resumed: all weights are in the run folder, and neither `model.init_from` nor timm's are looked for.
    """
    if resumed:
        model = bare_model(config, categories)
    else:
        model = DFine(config.model, len(categories))
        if config.model.init_from:
            say(initialise(model, config.model.init_from, categories, config.model.match_classes))
    return model.to(device).to(memory_format=torch.channels_last)  # convolutions are faster so


# Batch norms of fewer pages a process take their statistics over all processes: from 16 on a batch norm loses nothing
# with a process's own (arXiv 1803.08494, table 2), and the exchange, twice for each, is most of all communication.
ENOUGH_PAGES = 16


def parallel(model: DFine, config: TrainConfig, device: torch.device, pages: int = 1) -> nn.Module:
    """The model as every process trains it: gradients are averaged over the processes.

    Args:
        pages: in a batch of one process.
    """
    if distributed.world_size() > 1:
        model.backbone.freeze_unused()
    if config.compile:
        model.compile_parts()
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda" and pages < ENOUGH_PAGES:
        convert_sync_batchnorm(model)  # timm's: torch's drops the activations inside timm's batch norms
    return replicated(model, device)


def replicated(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over the processes, if it has any weights and there are several."""
    if distributed.world_size() == 1 or not list(module.parameters()):
        return module
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 as configured for this device; what needs more (boxes, softmax, losses) raises itself to fp32."""
    asked = config.bf16 if device.type == "cuda" else config.bf16_cpu
    return torch.autocast(device.type, torch.bfloat16, enabled=asked and multiplies_bf16(device))


def step_seed(seed: int, step: int) -> int:
    """The seed of everything that torch draws in one step of this process."""
    return int(np.random.SeedSequence([seed, step, distributed.rank()]).generate_state(1)[0])


def train_epoch(run: Run, loader: DataLoader[Batch], sampler: TrainBatches, losses_of: Losses) -> Iterator[int]:
    """Trains to the end of the current epoch (or of the run), yielding where something may be due.

    That is after every optimizer step, at the start of a resumed run, and before leaving early.

    Raises:
        FloatingPointError: a loss or the gradient is not finite; names term, step and image ids. Nothing is saved.
        PageError: a page cannot be read; names it. Raised after a yield, at which the run is saved.
        WorkerError: a process that loads pages is gone. Likewise.
    """
    if run.evaluation_due:
        yield run.step
    config = run.config.train
    epoch, start = divmod(run.step, run.epoch_steps)
    sampler.set_position(epoch, start * config.accumulate)
    batches = iter(loader)
    last = min(run.last_step, (epoch + 1) * run.epoch_steps)
    title, shown = f"epoch {epoch + 1}", ("loss", "vfl", "l1", "giou", "fgl", "pages_per_second")
    hidden = not distributed.is_main()
    with tqdm(None, title, run.epoch_steps, initial=start, unit="step", mininterval=0.5, disable=hidden) as bar:
        while run.step < last and not run.interrupted:
            began = time.perf_counter()
            trained, failure = fetch(batches, config.accumulate)
            run.interrupted = distributed.any_process(run.signalled or failure is not None)
            if run.interrupted:
                yield run.step
                if failure is not None:
                    cause = f"{failure}; stopped at step {run.step}, go on with --resume once it is mended"
                    raise type(failure)(cause) from failure
                say(f"told to stop; saved at step {run.step}, go on with --resume")
                return
            torch.manual_seed(step_seed(config.seed, run.step))
            values = optimize(run, [batch.to(run.device) for batch in trained], losses_of)
            run.step += 1
            pages = sum(len(batch.targets) for batch in trained) * distributed.world_size()
            values["pages_per_second"] = pages / (time.perf_counter() - began)
            values["padded_share"] = float(np.mean([padded_share(batch) for batch in trained]))
            if run.board:
                run.since_evaluation.append(values)
                if run.step % run.LOG_EVERY == 0:
                    for name, value in values.items():
                        run.board.add_scalar(f"train/{name}", value, run.step)
            known = {} if run.ap is None else {"AP": f"{run.ap:.3f}"}
            bar.set_postfix(known | {key: f"{values[key]:.3g}" for key in shown}, refresh=False)
            bar.update()
            yield run.step


def fetch(batches: Iterator[Batch], count: int) -> tuple[list[Batch], PageError | WorkerError | None]:
    """The next batches, or why there are none: other processes must hear of it before this one stops."""
    try:
        return [next(batches) for _ in range(count)], None
    except (PageError, WorkerError) as error:
        return [], error


def optimize(run: Run, batches: list[Batch], losses_of: Losses) -> dict[str, float]:
    """One optimizer step over the batches' mean loss. Returns every term, the gradient norm and the learning rate."""
    config = run.config.train
    frozen = run.step < config.freeze_backbone_steps
    run.model.train()
    run.model.backbone.train(not frozen)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        terms = {name: term.sum() / len(batches) for name, term in losses_of(batch).items()}
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        for name, term in {"loss": total, **terms}.items():
            sums[name] = sums.get(name, 0) + term.detach()
    if frozen:
        for parameter in run.model.backbone.parameters():
            parameter.grad = None
    norm = nn.utils.clip_grad_norm_([*run.model.parameters(), *run.auxiliary.parameters()], config.clip)
    values = dict(zip([*sums, "gradient_norm"], torch.stack([*sums.values(), norm]).tolist(), strict=True))
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        pages = [target.image_id for batch in batches for target in batch.targets]
        raise FloatingPointError(f"step {run.step}: not finite: {', '.join(wrong)}; image ids {pages}")
    rate = optim.learning_rate(run.step, config.epochs * run.epoch_steps, config)
    optim.set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.ema.update(run.model, run.step)
    return values | {"learning_rate": rate, "learning_rate_backbone": rate * config.backbone_factor}


def padded_share(batch: Batch) -> float:
    """The share of a batch's pixels that belong to no page."""
    return 1 - float(batch.sizes.prod(1).sum()) / (len(batch.sizes) * batch.images.shape[-2] * batch.images.shape[-1])
