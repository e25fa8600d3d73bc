"""What distillation costs: `python -m dfine.cost --config FILE distill.teacher=PATH [key=value ...]`.

Time per step and peak memory against plain training of the same student, measured in turns in one run. "Losses" are
those of the shared queries with their backward pass; the shared pass, with its own, is what remains of the difference.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dfine import checkpoint, distributed, engine
from dfine import config as configs
from dfine.config import Config
from dfine.criterion import criterion
from dfine.data import train_loader
from dfine.denoising import freshly_noised
from dfine.distillation import active, distillation
from dfine.model import DFine
from dfine.run import Run
from dfine.sources import open_source
from dfine.structures import Batch, DFineOutput, Refinement


class Pair:
    """A student and, once it is set, its teacher; what is done in a step, part by part."""

    def __init__(self, settings: Config, model: DFine) -> None:
        self.settings, self.model, self.device = settings, model, model.mean.device
        self.weights = active(settings.distill, settings.distill.go_lsd.start_epoch)
        self.teacher: DFine = model

    def ask(self, batch: Batch) -> DFineOutput:
        with torch.no_grad(), engine.autocast(self.device, self.settings.train):
            return self.teacher(batch.images, batch.sizes)

    def answer(self, batch: Batch, taught: DFineOutput | None) -> DFineOutput:
        noised = freshly_noised(batch.targets, self.model.classes, self.settings.model.denoising)
        with engine.autocast(self.device, self.settings.train):
            return self.model(batch.images, batch.sizes, noised, taught.queries if taught else None)

    def plain(self, batch: Batch) -> dict[str, Tensor]:
        return criterion(self.answer(batch, None), batch.targets, self.model.decoder.w, self.settings.loss)

    def distilled(self, batch: Batch) -> dict[str, Tensor]:
        taught = self.ask(batch)
        output = self.answer(batch, taught)
        assert output.shared is not None
        losses = criterion(output, batch.targets, self.model.decoder.w, self.settings.loss)
        return losses | self.shared_losses(output.shared, taught, batch)

    def shared_losses(self, shared: Refinement, taught: DFineOutput, batch: Batch) -> dict[str, Tensor]:
        w, config = (self.model.decoder.w, self.teacher.decoder.w), self.settings
        return distillation(
            shared, taught.refined, *w, batch.targets, self.weights, config.distill, config.loss.matcher
        )


def measure(pair: Pair, run: Run, batches: list[Batch]) -> dict[str, float]:
    """Milliseconds of each part: the median over the batches, after a warm-up on the first two."""
    spent: dict[str, list[float]] = {}

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> None:
        began = now(pair.device)
        work(*arguments)
        spent.setdefault(part, []).append(1000 * (now(pair.device) - began))

    def learn(shared: Refinement, taught: DFineOutput, batch: Batch) -> None:
        torch.cat(list(pair.shared_losses(shared, taught, batch).values())).sum().backward()

    for batch in tqdm(batches[:2] + batches, "measuring", unit="step", leave=False):
        timed("plain", engine.optimize, run, [batch], pair.plain)
        timed("distilled", engine.optimize, run, [batch], pair.distilled)
        taught = pair.ask(batch)
        shared = pair.answer(batch, taught).shared
        assert shared is not None
        logits, boxes, edge_logits = (x.detach().requires_grad_() for x in shared[:3])
        leaves = Refinement(logits, boxes, edge_logits, shared.initial_boxes)
        timed("losses", learn, leaves, taught, batch)
        timed("teacher", pair.ask, batch)
        with torch.no_grad(), engine.autocast(pair.device, pair.settings.train):
            timed("student", pair.model.eval(), batch.images, batch.sizes)
    return {part: median(times[2:]) for part, times in spent.items()}


def now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak(device: torch.device) -> float:
    """Most memory so far, in GiB: of the GPU's tensors, or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def table(spent: dict[str, float], program: float, plain: float, distilled: float) -> str:
    """A Markdown table.

    Args:
        spent: milliseconds, see `measure`. program, plain, distilled: GiB before training and at its two peaks.
    """
    shared = spent["distilled"] - spent["plain"] - spent["teacher"] - spent["losses"]
    parts = {"teacher forward": spent["teacher"], "shared pass": shared, "losses": spent["losses"]}
    lines = ["| | plain | distilled | ratio |", "|---|---|---|---|"]
    lines.append(
        f"| step, ms | {spent['plain']:.0f} | {spent['distilled']:.0f} | {spent['distilled'] / spent['plain']:.2f} |"
    )
    lines += [f"| {part}, ms | | {time:.0f} | {time / spent['plain']:.2f} |" for part, time in parts.items()]
    lines.append(
        f"| memory beside the program's {program:.2f} GiB, GiB | {plain - program:.2f} | {distilled - program:.2f} | "
        f"{f'{(distilled - program) / (plain - program):.2f}' if plain > program else '-'} |"
    )
    ratio = spent["teacher"] / spent["student"]
    return "\n".join([*lines, "", f"The teacher's forward pass takes {ratio:.2f} times the student's."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="the student's YAML file")
    parser.add_argument("--steps", type=int, default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as distill.teacher=PATH")
    arguments = parser.parse_intermixed_args()
    settings = configs.load(arguments.config, arguments.overrides)

    if not active(settings.distill, settings.distill.go_lsd.start_epoch):
        raise configs.ConfigError("distill: no term has a weight, so there is nothing to measure")

    device = distributed.start()
    engine.prepare(settings)
    pages = open_source(settings.data.train, "data.train")
    loader, sampler = train_loader(pages, settings)
    batches = [batch.to(device) for batch in islice(loader, 8)]
    program = peak(device)
    model = DFine(settings.model, len(pages.categories)).to(device).to(memory_format=torch.channels_last)
    run = Run(settings, pages.categories, model, device, len(sampler))
    pair = Pair(settings, model)
    for batch in batches:  # before there is a teacher: its weights are part of what distillation costs
        engine.optimize(run, [batch], pair.plain)
    plain = peak(device)
    pair.teacher = checkpoint.load_teacher(settings, arguments.config, pages.categories)
    pair.teacher.to(device).to(memory_format=torch.channels_last)
    spent = measure(pair, run, list(islice(cycle(batches), arguments.steps)))
    print(table(spent, program, plain, peak(device)))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
