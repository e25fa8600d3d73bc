"""What the benchmark runs: pages of noise with random boxes, a model with random weights, and a step as in train.py."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfine import config as configs
from dfine.config import Config
from dfine.losses.criterion import criterion
from dfine.losses.distillation import active, distillation, student_forward, teacher_forward
from dfine.model.denoising import freshly_noised
from dfine.model.detector import DFine
from dfine.structures import Batch, DFineOutput, Target
from dfine.tools.stopwatch import Stopwatch
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


def total_loss(model: DFine, output: DFineOutput, batch: Batch, settings: Config) -> Tensor:
    """The sum of all losses of train.py."""
    losses = criterion(output, batch.targets, model.decoder.w, settings.loss)
    return torch.stack([term.sum() for term in losses.values()]).sum()


def distilled_loss(
    model: DFine, teacher: DFine, projection: nn.Module, batch: Batch, settings: Config, watch: Stopwatch
) -> Tensor:
    """The sum of all losses of distill.py, forward passes included."""
    noised = freshly_noised(batch.targets, model.classes, settings.model.denoising)
    weights = active(settings.distill, settings.distill.go_lsd.start_epoch)
    with autocast(model.mean.device, settings.train):
        taught = teacher_forward(teacher, batch, noised, weights)
        watch.mark("of which the teacher's forward pass")
        output = student_forward(model, projection, batch, noised, taught, weights)
    assert taught is not None, "no term has a weight"
    w = (model.decoder.w, teacher.decoder.w)
    losses = distillation(output, taught, *w, batch.targets, weights, settings.distill, settings.loss.matcher)
    own = settings.distill.beta * total_loss(model, output, batch, settings)
    return torch.stack([own, *(term.sum() for term in losses.values())]).sum()


def finish(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """Clips, steps and forgets the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def watched(model: DFine, watch: Stopwatch) -> Iterator[None]:
    """While this lasts, the end of backbone, encoder and decoder are marked."""
    parts = {"backbone": model.backbone, "encoder": model.encoder, "selection and decoder": model.decoder}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: watch.mark(f"{name}, forward"))
        for name, module in parts.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step(model: DFine, optimizer: torch.optim.Optimizer, batch: Batch, settings: Config, watch: Stopwatch) -> None:
    """A training step as in train.py, but for the average of the weights; its parts are marked."""
    with watched(model, watch):
        output = answers(model, batch, settings)
    loss = total_loss(model, output, batch, settings)
    watch.mark("matching and losses")
    loss.backward()
    watch.mark("backward")
    finish(model, optimizer, settings.train.clip)
    watch.mark("clipping and optimizer")


def distilled_step(
    model: DFine,
    teacher: DFine,
    projection: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Config,
    watch: Stopwatch,
) -> None:
    """A training step as in distill.py; the teacher's forward pass and the rest are marked."""
    distilled_loss(model, teacher, projection, batch, settings, watch).backward()
    finish(model, optimizer, settings.train.clip)
    watch.mark("rest")
