"""Parameter groups, optimizers, the learning-rate schedule, and the averaged weights."""

import functools
import math
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import muon
from timm.utils import ModelEmaV3
from torch import nn, optim

from dfine.config import TrainConfig
from dfine.model.detector import DFine, class_dependent


def parameter_groups(model: DFine, config: TrainConfig, auxiliary: nn.Module | None = None) -> list[dict]:
    """Backbone or not, decayed or not (norms, biases and other vectors are not), and what has a row for each class.

    There is nothing to orthogonalise between the rows of classes (class heads, denoising embedding): AdamW's always.

    Args:
        auxiliary: what is trained along with the model and is no part of it; grouped as its head.
    """
    rows_of_classes = class_dependent(model)
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    auxiliary = auxiliary or nn.Module()
    for name, parameter in [*model.named_parameters(), *auxiliary.named_parameters(prefix="auxiliary")]:
        decayed = parameter.dim() > 1
        key = (name.startswith("backbone."), decayed, decayed and name in rows_of_classes)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "name": ("classes" if classes else "backbone" if backbone else "head") + ("" if decayed else ", no decay"),
            "factor": (config.backbone_factor if backbone else 1.0) * (config.muon_factor or 1.0),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "use_fallback": classes or not decayed,
        }
        for (backbone, decayed, classes), parameters in groups.items()
    ]


class Muon(muon.Muon):
    """timm's, which orthogonalises in bf16; on CPUs in fp32 here: those without bf16 would take nine times as long."""

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        in_fp32 = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with patch.object(muon, "zeropower_via_newtonschulz", in_fp32):  # `muon` has no argument for it
            return super().step(closure)


def optimizer(model: DFine, config: TrainConfig, auxiliary: nn.Module | None = None) -> optim.Optimizer:
    """AdamW, or with `muon_factor` timm's Muon, which falls back to AdamW where it does not apply.

    Both with Nesterov's momentum then. Three Newton-Schulz iterations (timm: 5) are less work and taught no less.
    """
    groups = parameter_groups(model, config, auxiliary)
    if not config.muon_factor:
        return optim.AdamW(groups, lr=config.learning_rate, fused=True)
    return Muon(
        groups,
        nesterov=True,
        ns_steps=3,
        ns_coefficients="original",
        betas=(0.9, 0.999),
        fallback_lr_scale=1 / config.muon_factor,
    )


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to the minimum; a function of the step alone, so there is nothing to save.

    Args:
        step: optimizer steps done, from 0. steps: of the whole run.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    low = min(config.min_learning_rate, config.learning_rate)
    return low + (config.learning_rate - low) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


class Average(ModelEmaV3):
    """Exponential moving average of weights and buffers.

    While young it forgets faster: its decay in step n = 0, 1, ... is 1 - n^-0.75 (0 before n = 2), up to `ema_decay`.
    The tensors are listed once: timm's own update lists them in every step, which takes longer than averaging a small
    model.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        super().__init__(model, decay=config.ema_decay, use_warmup=True, warmup_power=0.75)
        own, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        pairs = list(zip(own, theirs, strict=True))
        self.averages, self.weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    def apply_update_(self, _: nn.Module, decay: float) -> None:
        torch._foreach_lerp_(self.averages, self.weights, weight=1 - decay)
        for copy, counter in self.counters:
            copy.copy_(counter)
