"""How long a step takes, part by part: `python -m dfine.benchmark [--json FILE] [--peer] [key=value ...]`.

Every number is a median over repeats after a warm-up, with the lowest and the highest tenth beside it; on a GPU the
clock is the GPU's own (events), under bf16 autocast as in training. Pages are noise with random boxes: no part's time
depends on what is on a page, except matching, which random boxes make hard. `--peer` compares with D-FINE of
`transformers` (the extra `bench`) around the same timm backbone on the same tensors, the two in turns.
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfine import config as configs
from dfine import optim
from dfine.config import Config
from dfine.criterion import criterion, stack
from dfine.data import train_loader
from dfine.sources import open_source
from dfine.denoising import draw_noise, noised_truth
from dfine.engine import autocast
from dfine.matcher import match
from dfine.model import DFine, detect
from dfine.structures import Batch, DFineOutput, NoisedTruth, Target
from dfine.synthetic import write_folder

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


class Stopwatch:
    """Milliseconds between marks: wall clock on a CPU, events on a GPU, which it does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Ends the part `name`; the first mark only starts."""
        moment: Any = time.perf_counter()
        if self.cuda:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((name, moment))

    def read(self) -> dict[str, float]:
        """The parts and their sum, `whole`; starts anew."""
        if self.cuda:
            torch.cuda.synchronize()
        moments = [moment for _, moment in self.marks]
        spans = [a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in zip(moments, moments[1:], strict=False)]
        parts = {name: span for (name, _), span in zip(self.marks[1:], spans, strict=True)}
        self.marks = []
        return parts | {"whole": sum(spans)}


def measure(run: Callable[[Stopwatch], None], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every part that `run` marks, one a repeat; a fifth of the repeats (at least one) warms up."""
    watch = Stopwatch(device)
    times: dict[str, list[float]] = {}
    for repeat in range(-max(1, repeats // 5), repeats):
        watch.mark("start")
        run(watch)
        for part, span in watch.read().items():
            if repeat >= 0:
                times.setdefault(part, []).append(span)
    return times


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest tenth."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return statistics.median(ordered), ordered[tenth], ordered[-1 - tenth]


def made_up(case: Case, device: torch.device) -> Batch:
    """Pages of noise with random boxes, the same for the same case."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.batch, 3, case.height, case.width), dtype=torch.uint8, generator=generator)
    targets = []
    for page in range(case.batch):
        size = 0.02 + 0.2 * torch.rand(case.boxes, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(case.boxes, 2, generator=generator)
        labels = torch.randint(0, CLASSES, (case.boxes,), generator=generator)
        targets.append(Target(labels, torch.cat([centre, size], dim=-1), page, (case.height, case.width)))
    return Batch(images, torch.tensor([[case.height, case.width]] * case.batch), targets).to(device)


def built(settings: Config, queries: int, device: torch.device) -> DFine:
    """The config's model with random weights, as train.py lays it out in memory."""
    overrides = ["model.backbone.pretrained=false", "model.backbone.weights=", f"model.decoder.queries={queries}"]
    torch.manual_seed(0)
    model = DFine(configs.override(settings, overrides).model, CLASSES)
    return model.to(device).to(memory_format=torch.channels_last)


def noise(settings: Config, targets: list[Target]) -> NoisedTruth:
    """Denoising queries, as train.py draws them."""
    part = settings.model.denoising
    drawn = draw_noise(targets, part.queries, CLASSES)
    return noised_truth(targets, drawn, part.queries, CLASSES, part.label_noise, part.box_noise)


def answers(model: DFine, batch: Batch, settings: Config) -> DFineOutput:
    """The forward pass of training."""
    noised = noise(settings, batch.targets)
    with autocast(model.mean.device, settings.train):
        return model(batch.images, batch.sizes, noised)


def total_loss(model: DFine, output: DFineOutput, batch: Batch, settings: Config) -> Tensor:
    losses = criterion(output, batch.targets, model.decoder.w, settings.loss)
    return torch.stack([term.sum() for term in losses.values()]).sum()


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
    yield
    for hook in hooks:
        hook.remove()


def training(settings: Config, case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """A training step and its parts; matching and losses are also timed on their own, `matching` alone as well."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    optimizer = optim.adamw(model, settings.train)

    def step(watch: Stopwatch) -> None:
        with watched(model, watch):
            output = answers(model, batch, settings)
        loss = total_loss(model, output, batch, settings)
        watch.mark("matching and losses")
        loss.backward()
        watch.mark("backward")
        finish(model, optimizer, settings.train.clip)
        watch.mark("clipping and optimizer")

    times = measure(step, device, repeats)
    times["training step"] = times.pop("whole")
    output = answers(model, batch, settings)
    heads = stack(output.refined, output.initial, output.encoder)

    def matching(watch: Stopwatch) -> None:
        match(heads.logits, heads.boxes, batch.targets, settings.loss.matcher)
        watch.mark("of which matching")

    return times | measure(matching, device, repeats)


@torch.inference_mode()
def inference(
    settings: Config, case: Case, device: torch.device, repeats: int, compiled: bool
) -> dict[str, list[float]]:
    """From pixels to detections: the model as trained, deployed, and as recommended on a GPU."""
    batch = made_up(case, device)
    sizes = [target.size for target in batch.targets]
    times: dict[str, list[float]] = {}
    for name in ("inference", "inference, deployed", *(["inference, deployed and compiled"] if compiled else [])):
        model = built(settings, case.queries, device).eval()
        if "deployed" in name:
            model.deploy(fast="compiled" in name)

        def run(watch: Stopwatch, model: DFine = model, name: str = name) -> None:
            detect(model(batch.images, batch.sizes), sizes)
            watch.mark(name)

        times |= {name: measure(run, device, repeats)[name]}
    return times


def memory(settings: Config, case: Case, device: torch.device) -> float:
    """MiB of a training step: on a GPU its peak, on a CPU what the forward pass keeps for the backward pass."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        optimizer = optim.adamw(model, settings.train)
        for _ in range(2):  # the optimizer's state comes with the first step
            total_loss(model, answers(model, batch, settings), batch, settings).backward()
            finish(model, optimizer, settings.train.clip)
        return torch.cuda.max_memory_allocated() / 2**20
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = total_loss(model, answers(model, batch, settings), batch, settings)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    del loss  # until here nothing that was kept could be freed, so that no address comes twice
    return sum(size for address, size in kept.items() if address not in weights) / 2**20


def matmul_rate(device: torch.device, bf16: bool) -> float:
    """FLOPs a second of a large matrix product: what this chip can do, whatever its data sheet says."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)

    def multiply(watch: Stopwatch) -> None:
        for _ in range(4):
            a @ a
        watch.mark("matmul")

    return 4 * 2 * size**3 / (1e-3 * statistics.median(measure(multiply, device, 10)["matmul"]))


def step_flops(settings: Config, case: Case) -> int:
    """FLOPs of the matrix products and convolutions of a training step, forward and backward; counted, not run."""
    model = built(settings, case.queries, torch.device("cpu")).train().to("meta")
    batch = made_up(case, torch.device("cpu")).to(torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        output = model(batch.images, batch.sizes, noise(settings, batch.targets))
        answer = [*output.refined[:3], *(output.encoder or ()), *(output.initial or ())]
        torch.cat([x.flatten() for x in answer]).sum().backward()
    return counter.get_total_flops()
