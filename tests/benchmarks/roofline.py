"""How large models are and how fast a step could be: `python tests/benchmarks/roofline.py configs/*.yaml`.

Prints the parameters of each config's model, its FLOPs on one page (a product and its sum are 2), and of a training
step the FLOPs, the bytes, and the least time that a card needs for them (floor). Nothing is computed: tensors
have types and shapes alone (the device `meta`), for which the model takes the forms that it has on a GPU.

The floor is the sum over operators of the longer of FLOPs / peak rate and bytes / bandwidth: an operator reads each of
its inputs and writes each of its outputs once, all in bf16: what autocast leaves in fp32 comes on top, for the teacher
a fifth. A step is three forward passes, since a backward pass counts as two, as is usual. Losses and optimizer (2% for
the teacher) and what a compiler saves are left out.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from workload import CLASSES, Case, built, made_up, size

from dfine import config as configs
from dfine.config import Config
from dfine.model.denoising import freshly_noised


class Card(NamedTuple):
    """Peak rates, as data sheets give them (without sparsity)."""

    bf16: float  # TFLOP/s
    bandwidth: float  # GB/s


CARDS = {
    "h100": Card(989, 3350),
    "h200": Card(989, 4800),
    "a100": Card(312, 2039),
    "l4": Card(121, 300),
    "rtx4090": Card(165, 1008),
}


class Account(TorchDispatchMode):
    """Sums up what runs while it is active."""

    def __init__(self, card: Card = CARDS["h100"]) -> None:
        super().__init__()
        self.card = card
        self.flops, self.bytes, self.floor = 0.0, 0.0, 0.0  # the floor in ms

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        inputs, outputs = ([x for x in tree_leaves(xs) if isinstance(x, Tensor)] for xs in ((args, kwargs), result))
        known = {x.untyped_storage()._cdata for x in inputs}
        writes = function._schema.is_mutable or any(x.untyped_storage()._cdata not in known for x in outputs)
        if writes and "empty" not in function._schema.name:  # else a view, or memory that nothing is written to
            count = flop_registry.get(function.overloadpacket)
            self.add(count(*args, **kwargs, out_val=result) if count else 0, [*inputs, *outputs])
        return result

    def add(self, flops: float, tensors: list[Tensor]) -> None:
        sizes = [(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) // x.itemsize, x) for x in tensors]
        moved = sum(numbers * (2 if x.is_floating_point() else x.itemsize) for numbers, x in sizes)
        self.flops += flops
        self.bytes += moved
        self.floor += max(flops / (1e9 * self.card.bf16), moved / (1e6 * self.card.bandwidth))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """In the place of `F.scaled_dot_product_attention`: its operators, and what torch counts, depend on device
        and version."""
        result = torch.empty_like(query)
        self.add(4 * query.numel() * key.shape[-2], [query, key, value, result])
        return result


def forward(settings: Config, case: Case, card: Card = CARDS["h100"], training: bool = True) -> Account:
    """A forward pass, of training or of inference."""
    model, batch = (
        built(settings, case.queries, torch.device("cpu")).train(training),
        made_up(case, torch.device("cpu")),
    )
    noised = freshly_noised(batch.targets, CLASSES, settings.model.denoising) if training else None
    account = Account(card)
    for norm in model.modules():
        if hasattr(norm, "_fast_norm"):
            norm.__dict__["_fast_norm"] = False  # timm's fast layer norms ask for autocast, which `meta` does not have
    with account, mock.patch.object(F, "scaled_dot_product_attention", account.attention):
        model.to("meta")(batch.images.to("meta"), None, tree_map_only(Tensor, lambda x: x.to("meta"), noised))
    return account


def line(path: Path, case: Case, card: Card) -> str:
    """A config's line of the table."""
    settings = configs.load(path)
    step = forward(settings, case, card)
    page = forward(settings, case._replace(batch=1), training=False)
    parameters = sum(x.numel() for x in built(settings, case.queries, torch.device("cpu")).parameters())
    return (
        f"| {path.stem} | {parameters / 1e6:.1f} | {page.flops / 1e9:.0f} | {3 * step.flops / 1e12:.2f} | "
        f"{3 * step.bytes / 1e9:.0f} | {3 * step.floor:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", metavar="FILE", help="YAML files of configs/")
    parser.add_argument("--card", choices=CARDS, default="h100", help="default: h100")
    parser.add_argument("--batch", type=int, default=16, help="pages a step (default: 16)")
    parser.add_argument("--size", type=size, default=(832, 640), metavar="HxW", help="default: 832x640")
    parser.add_argument("--boxes", type=int, default=40, help="boxes a page (default: 40)")
    arguments = parser.parse_args()
    height, width = arguments.size
    print("| config | parameters, M | GFLOPs a page | TFLOP a step | GB a step | floor of a step, ms |")
    print("|---|---|---|---|---|---|")
    for path in arguments.configs:
        queries = configs.load(path).model.decoder.queries
        case = Case(arguments.batch, height, width, arguments.boxes, queries)
        print(line(path, case, CARDS[arguments.card]), flush=True)


if __name__ == "__main__":
    main()
