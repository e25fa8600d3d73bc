"""How fast a training step could be: its FLOPs, bytes and launches, and the least time that a card needs for them.

The floor is the sum over operators of the longer of FLOPs / peak rate and bytes / bandwidth: kernels run one after the
other, and an operator reads each of its inputs and writes each of its outputs in full, once. Matrix products,
convolutions and attention have FLOPs. An operator counts as one launch, though some are several. What a compiler fuses
saves bytes and launches, and is not counted.

On a GPU a step runs. Elsewhere nothing is computed: tensors have types and shapes alone, and the operators are a GPU's.
"""

import contextlib
import weakref
from argparse import ArgumentTypeError
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from dfine.config import Config
from dfine.losses import criterion
from dfine.model import decoder, deformable_attention
from dfine.model.cpu_kernels import DepthwiseConv2d
from dfine.model.denoising import freshly_noised
from dfine.model.detector import DFine
from dfine.structures import Batch, Matches
from dfine.tools.workload import CLASSES, Case, built, made_up, step
from dfine.training import optim

aten = torch.ops.aten


class Card(NamedTuple):
    """Peak rates, as data sheets give them (without sparsity)."""

    half: float  # TFLOP/s in bf16
    single: float  # TFLOP/s in fp32
    bandwidth: float  # GB/s


CARDS = {
    "h100": Card(989, 67, 3350),
    "h200": Card(989, 67, 4800),
    "a100": Card(312, 19.5, 2039),
    "l4": Card(121, 30.3, 300),
    "rtx4090": Card(165, 82.6, 1008),
}


def card(text: str) -> Card:
    """`h100`, or the rates of another card: `989,67,3350`."""
    if text in CARDS:
        return CARDS[text]
    try:
        half, single, bandwidth = map(float, text.split(","))
    except ValueError:
        known = ", ".join(CARDS)
        message = f"{text!r} is none of {known}, nor TFLOP/s in bf16, TFLOP/s in fp32 and GB/s, such as 989,67,3350"
        raise ArgumentTypeError(message) from None
    return Card(half, single, bandwidth)


@dataclass
class Phase:
    """Sums over the operators of a part of a step."""

    flops: float = 0
    bytes: float = 0
    launches: int = 0
    peak: int = 0  # bytes in use at the worst moment
    floor: float = 0  # ms


class Account(TorchDispatchMode):
    """Counts what runs while it is active; in the place of a `Stopwatch` its marks end the phases."""

    def __init__(self, card: Card, device: torch.device) -> None:
        super().__init__()
        self.card, self.cuda = card, device.type == "cuda"
        self.sizes: dict[int, int] = {}  # bytes of the storages in use
        self.used = 0
        self.restart()

    def restart(self) -> None:
        self.phases: dict[str, Phase] = {}
        self.phase = Phase()

    def mark(self, name: str) -> None:
        if self.cuda:
            self.phase.peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.phases[name], self.phase = self.phase, Phase()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in (*inputs, *outputs):
            self.keep(x)
        known = {x.untyped_storage()._cdata for x in inputs}
        writes = function._schema.is_mutable or any(x.untyped_storage()._cdata not in known for x in outputs)
        if writes and "empty" not in function._schema.name:  # else a view, or memory that nothing is written to
            self.add(flops(function.overloadpacket, args, kwargs, result), [*inputs, *outputs])
        return result

    def add(self, work: float, tensors: list[Tensor]) -> None:
        moved = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)
        single = any(x.dtype == torch.float32 for x in tensors)
        rate = 1e9 * (self.card.single if single else self.card.half)  # FLOP/ms
        self.phase.flops += work
        self.phase.bytes += moved
        self.phase.launches += 1
        self.phase.floor += max(work / rate, moved / (1e6 * self.card.bandwidth))

    def keep(self, x: Tensor) -> None:
        """Notes a storage until it is freed."""
        storage = x.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.used += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata)
        self.phase.peak = max(self.phase.peak, self.used)

    def forget(self, storage: int) -> None:
        self.used -= self.sizes.pop(storage)


def flops(operator: Any, args: Any, kwargs: Any, result: Any) -> float:
    """FLOPs of an operator; a product and its sum are 2."""
    if operator is aten.convolution_backward:  # torch's own count is many times too high for depthwise convolutions
        gradient, _, weight, *_, needed = args
        return 2 * sum(needed[:2]) * gradient.numel() * weight[0].numel()
    return flop_registry[operator](*args, **kwargs, out_val=result) if operator in flop_registry else 0


def roofline(settings: Config, case: Case, device: torch.device, card: Card) -> dict[str, Phase]:
    """The phases of a training step as in train.py: of the second one, since the first makes the optimizer's state."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    with contextlib.ExitStack() as stack:
        if device.type != "cuda":
            batch = stack.enter_context(imagined(model, batch, settings))
        optimizer = optim.optimizer(model, settings.train)
        account = stack.enter_context(Account(card, device))
        for _ in range(2):
            account.restart()
            step(model, optimizer, batch, settings, account)
    return account.phases


@contextlib.contextmanager
def imagined(model: DFine, batch: Batch, settings: Config) -> Iterator[Batch]:
    """The batch without numbers; while this lasts no tensor has any, and the model takes the forms it has on a GPU."""
    mode = weightless(model)
    for module in model.modules():
        if isinstance(module, DepthwiseConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    precision = torch.autocast("cpu", torch.bfloat16, enabled=settings.train.bf16)
    model.forward = precision(model.forward)  # type: ignore[method-assign]
    boxes = sum(len(target.labels) for target in batch.targets)

    def match(logits: Tensor, *_: Any, **__: Any) -> Matches:
        return Matches(*(torch.zeros(len(logits) * boxes, dtype=torch.int64) for _ in range(4)))

    def union(matches: Matches, *_: Any, **__: Any) -> Matches:
        return Matches(None, *(index[:boxes] for index in matches[1:]))

    with (
        mode,
        mock.patch.object(deformable_attention, "by_embedding_bag", deformable_attention.by_grid_sample),
        mock.patch.object(decoder, "attend", F.scaled_dot_product_attention),
        mock.patch.object(nn.utils, "clip_grad_norm_", partial(nn.utils.clip_grad_norm_, foreach=True)),
        mock.patch.object(criterion, "match", match),  # in which heads agree, as after some training
        mock.patch.object(criterion, "union", union),
    ):
        yield Batch(*tree_map_only(Tensor, mode.from_tensor, batch))


def weightless(model: nn.Module) -> FakeTensorMode:
    """Takes the numbers out of a model: under the mode returned it computes types and shapes, whatever their size."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            tensors |= {name: mode.from_tensor(x) for name, x in tensors.items() if x is not None}
    return mode


def step_flops(settings: Config, case: Case) -> int:
    """FLOPs of a training step: three times those of the forward pass, as is usual; counted, not run."""
    model = built(settings, case.queries, torch.device("cpu")).train()
    batch = made_up(case, torch.device("cpu"))
    noised = freshly_noised(batch.targets, CLASSES, settings.model.denoising)
    with torch.no_grad(), weightless(model), FlopCounterMode(display=False) as counter:
        model(batch.images, None, noised)
    return 3 * counter.get_total_flops()


def size_of_model(settings: Config, height: int, width: int) -> dict[str, float]:
    """Parameters in millions, and GFLOPs of inference on one page (a product and its sum are 2); counted, not run."""
    model = built(settings, settings.model.decoder.queries, torch.device("cpu")).eval()
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    with torch.no_grad(), weightless(model), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, height, width))
    return {"parameters_M": millions, "gflops": counter.get_total_flops() / 1e9}


def account_of(phases: dict[str, Phase], times: dict[str, float]) -> str:
    """The account as Markdown.

    Args:
        times: measured ms of each phase, where there is a card.
    """
    lines = ["| phase | TFLOP | GB | launches | peak, GiB | floor, ms | reached |", "|---|---|---|---|---|---|---|"]
    total = Phase(
        flops=sum(phase.flops for phase in phases.values()),
        bytes=sum(phase.bytes for phase in phases.values()),
        launches=sum(phase.launches for phase in phases.values()),
        peak=max(phase.peak for phase in phases.values()),
        floor=sum(phase.floor for phase in phases.values()),
    )
    for name, phase in (phases | {"training step": total}).items():
        reached = f"{phase.floor / times[name]:.0%}" if name in times else "-"
        numbers = f"{phase.flops / 1e12:.2f} | {phase.bytes / 1e9:.1f} | {phase.launches} | {phase.peak / 2**30:.1f}"
        lines.append(f"| {name} | {numbers} | {phase.floor:.1f} | {reached} |")
    return "\n".join(lines)
