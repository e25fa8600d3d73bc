"""What stands before the first step: pages, model, processes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dfine import distributed
from dfine.boxes import multiplies_bf16
from dfine.checkpoints.loading import initialise
from dfine.checkpoints.ours import bare_model
from dfine.config import Config, ConfigError, TrainConfig
from dfine.data.batches import TrainBatches, evaluation_loader, train_loader
from dfine.data.sources import Source, open_source
from dfine.data.workers import make_room
from dfine.distributed import say
from dfine.model.deploy import compile_parts
from dfine.model.detector import DFine
from dfine.structures import Batch


class Data(NamedTuple):
    """The pages of a run, and this process's batches of them."""

    train: Source
    val: Source
    batches: DataLoader[Batch]
    sampler: TrainBatches  # says which pages `batches` gives
    val_batches: DataLoader[Batch]

    @property
    def categories(self) -> list[dict[str, Any]]:
        return self.train.categories


def prepare(config: Config) -> None:
    """Seeds, threads and open files of this process.

    Raises:
        ConfigError: see `make_room`.
    """
    make_room(config.data.workers, "data.workers")
    if config.train.threads:
        torch.set_num_threads(min(config.train.threads, distributed.cores()))
    torch.manual_seed(config.train.seed)  # the same in every process: all start from the same weights


def open_data(config: Config) -> Data:
    """Opens the pages and says what they are, so that a mistake shows before it costs.

    Raises:
        ConfigError: no pages are named, or those of training and validation have other categories. PageError: see
            `CocoPages`.
    """
    train = open_source(config.data.train, "data.train", may_lack=config.data.skip_unreadable)
    val = open_source(config.data.val, "data.val")
    if train.categories != val.categories:
        raise ConfigError(
            f"data.val.annotations: its categories {val.categories} are not those of data.train: {train.categories}"
        )
    labels = ", ".join(f"{label} {c['name']} (id {c['id']})" for label, c in enumerate(train.categories))
    queries = config.model.decoder.queries
    say(f"train: {train.summary(queries)}\nval: {val.summary(queries)}\nlabels: {labels}")
    batches, sampler = train_loader(train, config)
    return Data(train, val, batches, sampler, evaluation_loader(val, config))


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
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    precision = "bf16" if in_bf16(device, config.train) else "fp32"
    say(f"model: {config.model.backbone.name}, {millions:.1f} M parameters, in {precision} on {device}")
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
        compile_parts(model)
    if distributed.world_size() == 1:
        return model
    if device.type == "cuda" and pages < ENOUGH_PAGES:
        convert_sync_batchnorm(model)  # timm's: torch's drops the activations inside timm's batch norms
    return replicated(model)


def replicated(module: nn.Module) -> nn.Module:
    """The module with its gradients averaged over the processes, if it has any weights and there are several.

    It takes its inputs as they are: told of a device, DDP would also copy there what is on the CPU, and wait.
    """
    if distributed.world_size() == 1 or not list(module.parameters()):
        return module
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


@contextmanager
def exchange(now: bool, *replicas: nn.Module) -> Iterator[None]:
    """Around a forward pass: its backward pass averages gradients over the processes if `now`, else only adds them up.

    Of the batches of one step the last one's exchange is enough: it has the gradients of all.
    """
    with ExitStack() as stack:
        for replica in replicas:
            if not now and isinstance(replica, DistributedDataParallel):
                stack.enter_context(replica.no_sync())
        yield


def in_bf16(device: torch.device, config: TrainConfig) -> bool:
    """Whether the configured precision for this device is bf16, and the device multiplies it."""
    asked = config.bf16 if device.type == "cuda" else config.bf16_cpu
    return asked and multiplies_bf16(device)


def autocast(device: torch.device, config: TrainConfig) -> torch.autocast:
    """bf16 or not, see `in_bf16`; what needs more (boxes, softmax, losses) raises itself to fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, config))
