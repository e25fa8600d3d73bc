"""Two processes do what one does."""

import functools
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import ends, launch
from tiny import freeze_batch_norms, noised, random_boxes, shaken, target, tiny_config, tiny_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from dfine import distributed
from dfine.config import BackboneConfig, DenoisingConfig, LossConfig, TrainConfig
from dfine.losses.criterion import criterion
from dfine.model.backbone import Backbone
from dfine.model.denoising import freshly_noised
from dfine.model.detector import DFine
from dfine.structures import Batch, NoisedTruth, Target
from dfine.training import engine
from dfine.training.metrics import finite_means


def pages(boxes: tuple[int, ...]) -> list[Target]:
    """Pages with so many random boxes each."""
    torch.manual_seed(3)
    return [
        Target(torch.randint(3, (count,)), random_boxes(count, dtype=torch.float32), i, (64, 96))
        for i, count in enumerate(boxes)
    ]


def gradients(boxes: tuple[int, ...], backbone: str, file: Path) -> None:
    """The gradient of one global batch; each process takes its share of the pages and of their denoising queries."""
    device = distributed.start()
    model = freeze_batch_norms(shaken(tiny_model(backbone=backbone)))
    replica = engine.parallel(model, TrainConfig(), device)
    targets = pages(boxes)
    torch.manual_seed(4)
    images = torch.rand(len(boxes), 3, 64, 96)
    sizes = torch.tensor([[64, 96], [50, 96], [64, 70], [40, 60]])
    queries = noised(targets)
    share = slice(distributed.rank(), None, distributed.world_size())
    queries = NoisedTruth(queries.labels[share], queries.boxes[share], queries.groups)
    losses = criterion(replica(images[share], sizes[share], queries), targets[share], model.decoder.w, LossConfig())
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    if distributed.is_main():
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, file)
    distributed.finish()


@pytest.mark.parametrize(
    ("boxes", "backbone"),
    [((3, 2, 1, 3), "test_convnext"), ((4, 0, 2, 0), "test_convnext"), ((4, 0, 2, 0), "test_vit3")],
    ids=["boxes everywhere", "one has empty pages alone", "a plain transformer"],
)
def test_a_global_batch_has_the_same_gradients_on_one_and_on_two_processes(
    tmp_path: Path, boxes: tuple[int, ...], backbone: str
) -> None:
    gradients(boxes, backbone, tmp_path / "one")
    assert ends(launch(gradients, boxes, backbone, tmp_path / "two")) == [0, 0]
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert max(gradient.abs().max() for gradient in one.values()) > 0.5
    assert max((two[name] - gradient).abs().max() for name, gradient in one.items()) < 1e-5


def exchanges_of_a_step_of_two_batches(folder: Path) -> None:
    device = distributed.start()
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    replica, count = engine.replicated(model), 0
    assert isinstance(replica, DistributedDataParallel)

    def counted(group: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal count
        count += 1
        return allreduce_hook(group, bucket)

    replica.register_comm_hook(None, counted)
    pages = [torch.tensor([page]) * 3 ** distributed.rank() for page in ([1.0, 2.0], [4.0, 8.0])]
    for page in pages:
        with engine.autocast(device, TrainConfig()), engine.exchange(page is pages[-1], replica):
            output = replica(page)
        output.sum().backward()
    torch.save((count, model.weight.grad), folder / str(distributed.rank()))
    distributed.finish()


def test_processes_exchange_gradients_once_a_step_however_many_batches_it_has(tmp_path: Path) -> None:
    assert ends(launch(exchanges_of_a_step_of_two_batches, tmp_path)) == [0, 0]
    for rank in "01":
        count, gradient = torch.load(tmp_path / rank)
        assert count == 1
        assert gradient.tolist() == [[10.0, 20.0]]  # 1 + 4 of the one, three times that of the other: the mean


def losses_of_a_rank(folder: Path) -> None:
    distributed.start()
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]]), [target([])])
    loss = {"vfl": torch.tensor(1.0 + 2 * distributed.rank())}
    values = finite_means(3, [batch], [loss], torch.tensor(5.0))
    (folder / str(distributed.rank())).write_text(f"{values}")
    distributed.finish()


def test_logged_losses_are_means_over_the_processes(tmp_path: Path) -> None:
    assert ends(launch(losses_of_a_rank, tmp_path)) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["{'vfl': 2.0, 'gradient_norm': 5.0}"] * 2


def test_ddp_waits_for_no_gradient_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """HRNet has weights for its stride of 4 alone, and without denoising its labels are unused."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(engine, "DistributedDataParallel", lambda model, **_: model)
    off = DenoisingConfig(queries=0)
    config = tiny_config(backbone="hrnet_w18_small").model_copy(update={"denoising": off})
    model = engine.parallel(DFine(config, 3), TrainConfig(), torch.device("cpu"))
    targets = pages((2, 0))
    output = model(torch.rand(2, 3, 64, 96), noised=freshly_noised(targets, 3, off))
    monkeypatch.undo()
    losses = criterion(output, targets, model.decoder.w, LossConfig())
    torch.stack([loss.sum() for loss in losses.values()]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None and p.requires_grad} == set()


def values_of(rank_file: Path) -> None:
    distributed.start()
    rank = distributed.rank()
    found = (
        distributed.sum_over_processes(torch.tensor([1.0 + rank])).item(),
        distributed.any_process(rank == 1),
        distributed.any_process(False),
        distributed.gather(("rank", rank)),
        distributed.gather(rank, to=1),
    )
    buffers = torch.nn.BatchNorm1d(2)
    buffers.running_mean += rank
    distributed.broadcast_buffers(buffers)
    torch.save((*found, buffers.running_mean), rank_file.with_name(f"rank{rank}"))
    distributed.finish()


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    assert ends(launch(values_of, tmp_path / "rank")) == [0, 0]
    for rank in range(2):
        total, one_of_them, none_of_them, everywhere, at_1, mean = torch.load(tmp_path / f"rank{rank}")
        assert (total, one_of_them, none_of_them) == (3, True, False)
        assert everywhere == [("rank", 0), ("rank", 1)]
        assert at_1 == ([0, 1] if rank == 1 else [])
        assert mean.tolist() == [0, 0]


def slow_main(rank_file: Path) -> None:
    """What the main process does alone takes longer than torch would wait."""
    start = dist.init_process_group
    dist.init_process_group = functools.partial(start, timeout=timedelta(seconds=1))  # 30 minutes, sooner
    distributed.start()
    asked = [lambda: distributed.any_process(False), lambda: distributed.gather(1), lambda: distributed.on_main(int)]
    for question in asked:
        if distributed.is_main():
            time.sleep(2)
        question()
    rank_file.with_name(f"rank{distributed.rank()}").touch()
    distributed.finish()


def test_processes_wait_for_the_main_process_however_long_it_takes(tmp_path: Path) -> None:
    assert ends(launch(slow_main, tmp_path / "rank")) == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"rank0", "rank1"}


def mistaken_main(rank_file: Path, ask: str) -> None:
    distributed.start()
    try:
        getattr(distributed, ask)(lambda: int("no number"))
    except ValueError as error:
        rank_file.with_name(f"rank{distributed.rank()}").write_text(str(error))
    distributed.finish()


@pytest.mark.parametrize("ask", ["on_main", "once_a_machine"])
def test_what_stops_the_main_process_stops_all_with_the_same_words(tmp_path: Path, ask: str) -> None:
    assert ends(launch(mistaken_main, tmp_path / "rank", ask)) == [0, 0]
    assert "no number" in (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


def shares_arrays(folder: Path, machines: int) -> None:
    tempfile.tempdir = str(folder / "temporary")
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = str(0 if machines == 2 else rank)
    distributed.start()

    def work() -> dict[str, Any]:
        (folder / f"worked{rank}").touch()
        return {"numbers": np.arange(5) + rank, "flags": np.array([True, False, True]), "rest": ["x", rank]}

    found = distributed.once_a_machine(work)
    assert not any(found[key].flags.writeable for key in ("numbers", "flags"))
    (folder / str(rank)).write_text(json.dumps([found["numbers"].tolist(), found["flags"].tolist(), found["rest"]]))
    distributed.finish()


@pytest.mark.parametrize("machines", [1, 2])
def test_one_process_of_each_machine_works_for_all_and_leaves_no_file(tmp_path: Path, machines: int) -> None:
    (tmp_path / "temporary").mkdir()
    assert ends(launch(shares_arrays, tmp_path, machines)) == [0, 0]
    for rank in range(2):
        of = rank if machines == 2 else 0
        expected = [[*range(of, of + 5)], [True, False, True], ["x", of]]
        assert json.loads((tmp_path / str(rank)).read_text()) == expected
        assert (tmp_path / f"worked{rank}").exists() == (rank < machines)
    assert list((tmp_path / "temporary").iterdir()) == []


def sees_a_loss_that_is_not_finite_on_rank_1(folder: Path, everywhere: bool) -> None:
    distributed.start()
    rank = distributed.rank()
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    batch = Batch(torch.zeros(1, 3, 32, 32), torch.tensor([[32, 32]]), [target([], image_id=10 + rank)])
    try:
        finite_means(3, [batch], [{"vfl": one, "l1": one if everywhere or not rank else nan}], nan)
    except FloatingPointError as error:
        (folder / str(rank)).write_text(str(error))
    distributed.finish()


@pytest.mark.parametrize(
    ("everywhere", "said"), [(False, "l1, gradient_norm; image ids [11]"), (True, "gradient_norm; image ids [10, 11]")]
)
def test_all_processes_name_the_pages_of_the_one_whose_loss_is_not_finite(
    tmp_path: Path, everywhere: bool, said: str
) -> None:
    assert ends(launch(sees_a_loss_that_is_not_finite_on_rank_1, tmp_path, everywhere)) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"step 3: not finite: {said}"] * 2


def test_one_process_asks_nobody() -> None:
    x = torch.ones(2)
    assert distributed.sum_over_processes(x) is x
    assert distributed.any_process(True)
    assert distributed.gather(5) == [5]
    assert distributed.on_main(lambda: 5) == distributed.once_a_machine(lambda: 5) == 5
    assert distributed.is_main()


def test_synchronised_batch_norms_keep_the_activations_that_timm_puts_inside():
    torch.manual_seed(0)
    backbone = Backbone(BackboneConfig(name="test_efficientnet", pretrained=False), (8, 16, 32)).eval()
    images = torch.rand(1, 3, 64, 64)
    before = backbone(images)
    for one, other in zip(before, engine.convert_sync_batchnorm(backbone)(images), strict=True):
        torch.testing.assert_close(one, other)
