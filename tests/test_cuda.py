"""What a GPU computes, beside the CPU. Skipped where there is no GPU."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import freeze_batch_norms, noised, shaken, target, tiny_model
from torch import Tensor, nn

from dfine import distributed
from dfine.config import LossConfig, TrainConfig
from dfine.losses.criterion import criterion
from dfine.model.detector import DFine, detect, gather
from dfine.structures import Batch
from dfine.training import engine

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")
EVERY_CELL = 8 * 12 + 4 * 6 + 2 * 3  # as many queries: rounding may change their order, but not which they are
TARGETS = [target([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]], [0, 2]), target([[0.5, 0.5, 0.4, 0.2]], [1])]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """fp32 shall mean fp32; convolutions would be in TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def model() -> DFine:
    return freeze_batch_norms(shaken(tiny_model(queries=EVERY_CELL), 0.05).train())


def pages() -> Batch:
    """Two pages; the second is narrower than the canvas."""
    torch.manual_seed(2)
    return Batch(
        torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [64, 80]]), list(TARGETS)
    )


def losses(replica: nn.Module, device: torch.device, half: bool = False) -> dict[str, Tensor]:
    """All terms of a training step on the two pages, with the same noise on every device."""
    torch.manual_seed(3)
    noise = noised(TARGETS)
    noise = noise._replace(labels=noise.labels.to(device), boxes=noise.boxes.to(device))
    batch = pages().to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = replica(batch.images, batch.sizes, noise)
    w = next(module.w for module in replica.modules() if hasattr(module, "w"))
    return {name: term.sum() for name, term in criterion(output, batch.targets, w, LossConfig()).items()}


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-3), (True, 2e-2)])
def test_every_loss_is_the_cpus(half: bool, tolerance: float) -> None:
    """In bf16 terms differ by up to a hundredth, mostly in both directions: their sum by less than a thousandth."""
    expected, got = losses(model(), torch.device("cpu")), losses(model().to(GPU), GPU, half)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name].cpu(), expected[name], rtol=tolerance, atol=1e-4, msg=name)
    torch.testing.assert_close(total(got).cpu(), total(expected), rtol=1e-3, atol=0)


def test_every_gradient_in_fp32_is_the_cpus() -> None:
    here, there = model(), model().to(GPU)
    total(losses(here, torch.device("cpu"))).backward()
    total(losses(there, GPU)).backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        scale = a.grad.abs().max().item()
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=0, atol=2e-3 * scale + 1e-6, msg=name)


@torch.no_grad()
def answers(asked: DFine, device: torch.device, half: bool) -> tuple[Tensor, Tensor]:
    """Logits and boxes of every cell, in the cells' order. (B, S, C), (B, S, 4)"""
    batch = pages()
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        output = asked(batch.images.to(device), batch.sizes)
    order = output.queries.cells.argsort(1)
    return gather(output.refined.logits[-1], order).cpu(), gather(output.refined.boxes[-1], order).cpu()


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-3), (True, 5e-2)])
def test_logits_and_boxes_are_the_cpus(half: bool, tolerance: float) -> None:
    expected = answers(model().eval(), torch.device("cpu"), False)
    got = answers(model().eval().to(GPU), GPU, half)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_detections_in_fp32_are_the_cpus() -> None:
    found = []
    for device in (torch.device("cpu"), GPU):
        batch = pages()
        output = model().eval().to(device)(batch.images.to(device), batch.sizes)
        found += [page for page in detect(output, [(640, 960), (640, 800)], top=3)]
    for here, there in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(there.scores.cpu(), here.scores, rtol=1e-3, atol=0)
        torch.testing.assert_close(there.boxes.cpu(), here.boxes, rtol=0, atol=0.5)
        assert there.labels.cpu().equal(here.labels)


def test_deployed_fast_it_answers_nearly_the_same_on_every_canvas() -> None:
    plain = model().eval().to(GPU)
    fast = copy.deepcopy(plain).deploy(fast=True)
    torch.testing.assert_close(answers(fast, GPU, False), answers(plain, GPU, False), atol=0.05, rtol=0.05)
    tall = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8, device=GPU)
    with torch.no_grad():
        boxes, fast_boxes = plain(tall).refined.boxes, fast(tall).refined.boxes
    assert (boxes.sum() - fast_boxes.sum()).abs() < 0.01 * boxes.sum()  # whatever the order


def test_ddp_gives_the_gradients_of_the_bare_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, SyncBatchNorm and DDP with one process, as with many."""
    bare, wrapped = model().to(GPU), model().to(GPU)
    total(losses(bare, GPU)).backward()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: 2)  # so that it is wrapped
            replica = engine.parallel(wrapped, TrainConfig(), torch.device("cuda", 0))
        assert isinstance(replica, nn.parallel.DistributedDataParallel)
        total(losses(replica, GPU)).backward()
    finally:
        dist.destroy_process_group()
    for (name, a), b in zip(bare.named_parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4, msg=name)
