"""One process or many: the few things that differ. Imports nothing of ours."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def start() -> torch.device:
    """Joins the processes that `torchrun` started, if it did, and returns this process's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # CPU tensors always go through gloo, so that a flag can be shared without waiting for the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def cores() -> int:
    """CPU cores for this process: its share of those that the processes on this machine may run on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def say(text: str) -> None:
    """Prints on the main process only, above a progress bar."""
    if is_main():
        tqdm.write(text)


def sum_over_processes(x: Tensor) -> Tensor:
    """The same sum in every process; `x` itself where there is only one."""
    if world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; every process must ask."""
    return bool(sum_over_processes(torch.tensor(float(flag))).item())


def gather(item: Any) -> list[Any]:
    """Every process's item, in order of rank, in every process."""
    items: list[Any] = [None] * world_size()
    if world_size() == 1:
        return [item]
    dist.all_gather_object(items, item)
    return items


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Gives every process the main process's buffers."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
