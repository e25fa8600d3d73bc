"""Parameter groups, optimizers, the learning-rate schedule, and that of the averaged weights."""

import math
from typing import Any

import torch
from timm.optim import muon
from torch import Tensor, nn, optim

from dfine.boxes import multiplies_bf16
from dfine.config import TrainConfig
from dfine.model.detector import DFine, class_dependent


def parameter_groups(model: DFine, config: TrainConfig, auxiliary: nn.Module | None = None) -> list[dict]:
    """Backbone or not, decayed or not (norms, biases and other vectors are not), what has a row for each class, Muon's.

    There is nothing to orthogonalise between the rows of classes (class heads, denoising embedding), nor where there is
    no proper matrix (`is_matrix`): AdamW's always.

    Args:
        auxiliary: what is trained along with the model and is no part of it; grouped as its head.
    """
    rows_of_classes = class_dependent(model)
    groups: dict[tuple[bool, bool, bool, bool], list[nn.Parameter]] = {}
    auxiliary = auxiliary or nn.Module()
    for name, parameter in [*model.named_parameters(), *auxiliary.named_parameters(prefix="auxiliary")]:
        decayed = parameter.dim() > 1
        classes = decayed and name in rows_of_classes
        by_muon = config.muon_factor > 0 and not classes and is_matrix(parameter)
        groups.setdefault((name.startswith("backbone."), decayed, classes, by_muon), []).append(parameter)
    return [
        {
            "params": parameters,
            "name": ("classes" if classes else "backbone" if backbone else "head")
            + (", Muon" if by_muon else "" if decayed else ", no decay"),
            "factor": (config.backbone_factor if backbone else 1.0) * (config.muon_factor if by_muon else 1.0),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "muon": by_muon,
        }
        for (backbone, decayed, classes, by_muon), parameters in groups.items()
    ]


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight (M, ...) has rows to orthogonalise: a vector and a depthwise convolution have none.

    By timm's rules, M rows of N numbers need at least 4 of either and no more than 128 times as many of one.
    """
    if weight.dim() < 2 or 1 in weight.shape[:2]:
        return False
    short, long = sorted((len(weight), weight[0].numel()))
    return short >= 4 and long <= 128 * short


class Muon(optim.AdamW):
    """AdamW, but groups marked `muon` step along their orthogonalised momentum: https://kellerjordan.github.io/posts/muon.

    timm's Muon takes the same step for one matrix after another, always in bf16. Here all of one shape are
    orthogonalised at once, which halves the time, and in fp32 on CPUs on which bf16 is slow: there timm's takes 14
    times as long, as much as the rest of a step of the quickstart.
    """

    MOMENTUM = 0.95
    ITERATIONS = 3  # of Newton and Schulz; timm's 5 are more work and taught no more
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of all weights with a gradient. Those of `muon` groups lose theirs: AdamW then leaves them alone."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = {}
            for weight in group["params"] if group["muon"] else ():
                if weight.grad is not None:
                    shapes.setdefault((len(weight), weight[0].numel()), []).append(weight)
            for weights in shapes.values():
                self.step_orthogonally(weights, [weight.grad for weight in weights], group["lr"], group["weight_decay"])
                for weight in weights:
                    weight.grad = None
        super().step()

    def step_orthogonally(self, weights: list[Tensor], gradients: Any, rate: float, decay: float) -> None:
        """One step of K weights (M, ...) and their gradients, all alike as matrices (M, N)."""
        for weight in weights:
            if not self.state[weight]:  # AdamW asks for `step` when it loads a state
                self.state[weight] = {"step": torch.tensor(0.0), "momentum": torch.zeros_like(weight)}
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)  # Nesterov's
        matrices = torch.stack([update.flatten(1) for update in ahead])  # (K, M, N)
        precision = torch.bfloat16 if multiplies_bf16(matrices.device) else torch.float32
        steps = muon.zeropower_via_newtonschulz(matrices, self.ITERATIONS, [self.COEFFICIENTS], dtype=precision)
        size = rate * muon.get_lr_scale(matrices.shape[1:])  # makes steps as large as AdamW's, times the group's factor
        torch._foreach_mul_(weights, 1 - rate * decay)
        for weight, step in zip(weights, steps.to(matrices.dtype), strict=True):
            weight.sub_(step.view_as(weight), alpha=size)


def optimizer(model: DFine, config: TrainConfig, auxiliary: nn.Module | None = None) -> optim.Optimizer:
    """AdamW, or with `muon_factor` Muon and AdamW."""
    kind = Muon if config.muon_factor else optim.AdamW
    return kind(parameter_groups(model, config, auxiliary), lr=config.learning_rate, fused=True)


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


def average_decay(step: int, config: TrainConfig) -> float:
    """The decay of the weights' moving average, which forgets faster while it is young; the original's ramp.

    Args:
        step: optimizer steps done before this one, from 0.
    """
    return config.ema_decay * (1 - math.exp(-(step + 1) / config.ema_warmup))
