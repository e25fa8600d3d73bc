"""What the benchmarks run: pages of noise with random boxes, a model with random weights, and a step as in train.py."""

import argparse
from typing import NamedTuple

import torch
from stopwatch import Stopwatch
from torch import nn

from dfine import config as configs
from dfine.config import Config
from dfine.losses.criterion import criterion, total
from dfine.losses.distillation import active, distillation, student_forward, teacher_forward
from dfine.model.denoising import freshly_noised
from dfine.model.detector import DFine
from dfine.structures import Batch, DFineOutput, Target
from dfine.training.engine import autocast

CLASSES = 11


class Case(NamedTuple):
    """What is fed: pages a batch, height and width of a page, boxes a page, queries."""

    batch: int
    height: int
    width: int
    boxes: int
    queries: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.height}x{self.width}, {self.boxes} boxes, {self.queries} queries"


def made_up(case: Case, device: torch.device, classes: int = CLASSES) -> Batch:
    """Pages of noise with random boxes, the same for the same case."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.batch, 3, case.height, case.width), dtype=torch.uint8, generator=generator)
    targets = []
    for page in range(case.batch):
        size = 0.02 + 0.2 * torch.rand(case.boxes, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(case.boxes, 2, generator=generator)
        labels = torch.randint(0, classes, (case.boxes,), generator=generator)
        targets.append(Target(labels, torch.cat([centre, size], dim=-1), page, (case.height, case.width)))
    return Batch(images, torch.tensor([[case.height, case.width]] * case.batch), targets).to(device)


def built(settings: Config, queries: int, device: torch.device, classes: int = CLASSES) -> DFine:
    """The config's model with random weights, as train.py lays it out in memory."""
    overrides = ["model.backbone.pretrained=false", "model.backbone.weights=", f"model.decoder.queries={queries}"]
    torch.manual_seed(0)
    model = DFine(configs.override(settings, overrides).model, classes)
    return model.to(device).to(memory_format=torch.channels_last)


def answers(model: DFine, batch: Batch, settings: Config) -> DFineOutput:
    """The forward pass of training."""
    noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
    with autocast(model.mean.device, settings.train):
        return model(batch.images, batch.sizes, noised)


def step(model: DFine, optimizer: torch.optim.Optimizer, batch: Batch, settings: Config, watch: Stopwatch) -> None:
    """A training step as in train.py, but for the average of the weights; its parts are marked."""
    output = answers(model, batch, settings)
    watch.mark("forward pass")
    loss = total(criterion(output, batch.targets, model.decoder.w, settings.loss))
    watch.mark("matching and losses")
    loss.backward()
    watch.mark("backward pass")
    finish(model, optimizer, settings.train.clip)
    watch.mark("clipping and optimizer")


def distilled_step(
    model: DFine,
    teacher: DFine,
    projection: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Config,
) -> None:
    """A training step as in distill.py, but for the average of the weights."""
    noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
    weights = active(settings.distill, settings.distill.go_lsd.start_epoch)
    with autocast(model.mean.device, settings.train):
        taught = teacher_forward(teacher, batch, noised, weights)
        output = student_forward(model, projection, batch, noised, taught, weights)
    assert taught is not None, "no term has a weight"
    losses = criterion(output, batch.targets, model.decoder.w, settings.loss)
    losses = {name: settings.distill.beta * term for name, term in losses.items()}
    w = (model.decoder.w, teacher.decoder.w)
    losses |= distillation(output, taught, *w, batch.targets, weights, settings.distill, settings.loss.matcher)
    total(losses).backward()
    finish(model, optimizer, settings.train.clip)


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """Clips, steps and forgets the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def size(text: str) -> tuple[int, int]:
    """`640x480` -> (640, 480)."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 32 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of 32, such as 640x480")
    return int(sides[0]), int(sides[1])
