"""The account of a step: what is counted for an operator, and that a step of any size is counted without a GPU."""

import argparse
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfine import config as configs
from dfine.tools import benchmark
from dfine.tools.roofline import CARDS, Account, Card, Phase, card, step_flops
from dfine.tools.workload import Case

CPU = torch.device("cpu")
SLOW = Card(half=2e-6, single=1e-6, bandwidth=1e-3)  # 2,000 and 1,000 FLOPs a ms, 1,000 bytes a ms
OVERRIDES = ["model.backbone.name=test_resnet", "model.backbone.pretrained=false", "model.hidden_dim=32"]
OVERRIDES += ["model.encoder.depth_mult=0.34", "model.decoder.layers=2"]

PHASES = ["backbone, forward", "encoder, forward", "selection and decoder, forward", "matching and losses", "backward"]
PHASES += ["clipping and optimizer"]


def settings() -> configs.Config:
    return configs.override(configs.Config(), OVERRIDES)


def counted(run: object, *tensors: Tensor) -> Phase:
    """What a function of tensors costs on the slow card."""
    with Account(SLOW, CPU) as account:
        kept = run(*tensors)
        account.mark("all")
    del kept
    return account.phases["all"]


def test_a_matrix_product_costs_two_flops_a_pair_and_reads_and_writes_everything_once():
    phase = counted(torch.mm, torch.ones(3, 5), torch.ones(5, 7))
    assert (phase.flops, phase.bytes, phase.launches) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21), 1)
    assert phase.floor == pytest.approx(max(0.210, 0.284))


def test_in_half_precision_it_is_half_the_bytes_and_at_that_rate():
    phase = counted(torch.mm, torch.ones(10, 50, dtype=torch.bfloat16), torch.ones(50, 10, dtype=torch.bfloat16))
    assert (phase.flops, phase.bytes) == (10_000, 2_200)
    assert phase.floor == pytest.approx(5)  # FLOPs; the bytes alone would take 2.2 ms


def test_views_and_empty_memory_cost_nothing_and_writing_in_place_does():
    assert counted(lambda x: x.view(6)[2:].unsqueeze(0), torch.ones(2, 3)).launches == 0
    assert counted(lambda x: torch.empty_like(x), torch.ones(2, 3)).launches == 0
    assert counted(lambda x: x.add_(1), torch.ones(2, 3)).bytes == 48  # read and written


def test_an_expanded_tensor_is_read_as_large_as_it_is_in_memory():
    assert counted(lambda x: x.expand(100, 3).sum(), torch.ones(1, 3)).bytes == 12 + 4


def test_a_depthwise_convolution_costs_in_its_backward_pass_twice_its_forward_pass():
    x, weight = torch.ones(2, 8, 16, 16, requires_grad=True), torch.ones(8, 1, 3, 3, requires_grad=True)
    forward = counted(lambda x, w: F.conv2d(x, w, padding=1, groups=8), x, weight).flops
    both = counted(lambda x, w: F.conv2d(x, w, padding=1, groups=8).sum().backward(), x, weight).flops
    assert forward == 2 * 2 * 8 * 16 * 16 * 9
    assert both == 3 * forward


def test_peak_memory_is_what_is_in_use_at_once():
    def two_at_once(x: Tensor) -> Tensor:
        return (x + 1) * 2  # x, the sum, the product

    def one_after_the_other(x: Tensor) -> None:
        for _ in range(5):
            x + 1

    assert counted(two_at_once, torch.ones(100)).peak == 1200
    assert counted(one_after_the_other, torch.ones(100)).peak == 800


def test_a_step_of_any_size_is_counted_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = ["--roofline", "--card", "100,10,1000", "--batch", "64", "--size", "640x480", "--boxes", "3"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *OVERRIDES, *options])
    benchmark.main()
    printed = capsys.readouterr().out.splitlines()
    case = Case(64, 640, 480, 3, 300)
    assert printed[0] == str(case)
    rows = [line.strip("| ").split(" | ") for line in printed if line.endswith("- |")]
    names, tflop, gb, launches, peak, floor, _ = zip(*rows, strict=True)
    assert list(names) == [*PHASES, "training step"]
    assert float(tflop[-1]) == pytest.approx(1e-12 * step_flops(settings(), case), rel=0.15)
    assert float(floor[-1]) > max(float(gb[-1]), 10 * float(tflop[-1]))
    assert all(int(number) > 0 for number in launches)
    activations = 64 * 320 * 240 * 32 * 2 / 2**30  # in bf16 after the first convolution
    assert float(peak[0]) > activations
    assert torch.ones(1).item() == 1  # numbers are back


def test_a_card_is_known_by_name_or_by_its_rates():
    assert card("h100") == CARDS["h100"]
    assert card("989,67,3350") == Card(989, 67, 3350)
    for wrong in ("h9000", "1,2", "1,2,x"):
        with pytest.raises(argparse.ArgumentTypeError, match="h100"):
            card(wrong)
