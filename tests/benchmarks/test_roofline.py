"""What is counted for an operator and for a model, without computing anything."""

import sys
from pathlib import Path

import pytest
import roofline
import torch
import torch.nn.functional as F
from roofline import Account, Card, forward
from torch import Tensor
from workload import Case

from dfine import config as configs

SLOW = Card(bf16=1e-6, bandwidth=1e-3)  # 1,000 FLOPs and 1,000 bytes a ms
CONFIGS = Path(__file__).parents[2] / "configs"


def counted(run: object, *tensors: Tensor) -> Account:
    """What a function of tensors costs on the slow card."""
    with Account(SLOW) as account:
        run(*tensors)
    return account


def test_a_matrix_product_costs_two_flops_a_pair_and_reads_and_writes_everything_once_in_bf16():
    for dtype in (torch.float32, torch.bfloat16):
        account = counted(torch.mm, torch.ones(3, 5, dtype=dtype), torch.ones(5, 7, dtype=dtype))
        assert (account.flops, account.bytes) == (2 * 3 * 5 * 7, 2 * (15 + 35 + 21))
        assert account.floor == pytest.approx(max(0.210, 0.142))


def test_a_depthwise_convolution_costs_a_kernel_for_each_number_it_writes():
    x, weight = torch.ones(2, 8, 16, 16), torch.ones(8, 1, 3, 3)
    assert counted(lambda x, w: F.conv2d(x, w, padding=1, groups=8), x, weight).flops == 2 * 2 * 8 * 16 * 16 * 9


def test_attention_costs_its_two_products_and_no_memory_for_the_matrix_between():
    account = Account(SLOW)
    query, key = torch.ones(2, 4, 10, 8), torch.ones(2, 4, 30, 8)
    assert account.attention(query, key, key).shape == query.shape
    assert account.flops == 2 * 2 * (2 * 4 * 10 * 30 * 8)
    assert account.bytes == 2 * (2 * query.numel() + 2 * key.numel())


def test_views_and_empty_memory_cost_nothing_and_writing_in_place_does():
    assert counted(lambda x: x.view(6)[2:].unsqueeze(0), torch.ones(2, 3)).bytes == 0
    assert counted(lambda x: torch.empty_like(x), torch.ones(2, 3)).bytes == 0
    assert counted(lambda x: x.add_(1), torch.ones(2, 3)).bytes == 24  # read and written


def test_an_expanded_tensor_is_read_as_large_as_it_is_in_memory():
    assert counted(lambda x: x.expand(100, 3).sum(), torch.ones(1, 3)).bytes == 6 + 2


def test_the_forward_pass_of_training_also_answers_in_all_layers_and_to_denoising_queries():
    settings = configs.load(CONFIGS / "quickstart.yaml")
    case = Case(1, 96, 96, 1, 100)
    page, step = forward(settings, case, training=False), forward(settings, case)
    assert page.flops < step.flops < 1.5 * page.flops


@pytest.mark.parametrize(("config", "gflops"), [("quickstart", 7), ("student_vit_pe_small", 230)])
def test_the_readmes_models_have_the_flops_that_it_says(
    config: str, gflops: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Those of a ViT are to a third attention, which torch's own counter counts on some devices and versions."""
    monkeypatch.setattr(sys, "argv", ["roofline", str(CONFIGS / f"{config}.yaml"), "--batch", "2", "--boxes", "3"])
    roofline.main()
    cells = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (cells[0], cells[2]) == (config, str(gflops))
    assert all(float(cell) > 0 for cell in cells[1:])
