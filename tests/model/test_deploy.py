"""A model for use: the same answers from merged batch norms, in half precision and compiled."""

import copy

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock
from tiny import same, trained
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dfine.model.decoder import DecoderLayer
from dfine.model.deploy import compile_parts, merge_backbone
from dfine.model.detector import DFine
from dfine.model.hybrid_encoder import AIFI, RepNCSPELAN4, RepVGG
from dfine.model.query_selection import gather


def pages(count: int = 2, height: int = 64, width: int = 96) -> Tensor:
    """uint8 noise."""
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


def settled(**config: object) -> DFine:
    """Trained, in evaluation mode, with running statistics away from 0 and 1."""
    model = trained(**config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("backbone", ["test_convnext", "test_resnet", "test_efficientnet", "test_byobnet"])
def test_the_deployed_model_gives_the_same_answers_without_a_batch_norm(backbone: str):
    """The second has torch's batch norms, the others timm's, which hold their activation, or none."""
    model = settled(backbone=backbone)
    with torch.no_grad():
        expected, answer = model(pages()), copy.deepcopy(model).deploy()(pages())
    assert torch.equal(answer.queries.cells, expected.queries.cells)
    for ours, theirs in zip(answer.refined, expected.refined, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.deploy().modules())


def test_a_deployed_repvgg_block_is_one_convolution():
    blocks = [module for module in settled().deploy().modules() if isinstance(module, RepVGG)]
    assert blocks
    for block in blocks:
        assert [type(module) for module in block.modules() if isinstance(module, nn.Conv2d)] == [nn.Conv2d]


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_deployed_fast_it_is_in_half_precision_where_that_is_faster_and_answers_nearly_the_same(
    multiplies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Every cell is a query, in whatever order: bf16 ranks them otherwise."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    model = settled(queries=8 * 12 + 4 * 6 + 2 * 3)
    fast, computed = copy.deepcopy(model).deploy(fast=True), []
    fast.decoder.layers[0].feedforward.register_forward_hook(lambda module, x, y: computed.append(y.dtype))
    with torch.no_grad():
        expected, answer = model(pages()), fast(pages())
    assert computed == [dtype]
    assert fast.decoder.layers[0].feedforward[0].weight.dtype == dtype
    assert fast.backbone.body.stem_0.weight.is_contiguous(memory_format=torch.channels_last)
    assert answer.refined.logits.dtype == answer.refined.boxes.dtype == torch.float32
    ours, theirs = (gather(torch.cat(x.refined[:2], -1)[0], x.queries.cells.argsort(1)) for x in (answer, expected))
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_the_narrower_decoder_can_be_deployed_too():
    model = settled(encoder_dim=48)
    with torch.no_grad():
        expected, answer = model(pages()), copy.deepcopy(model).deploy()(pages())
    torch.testing.assert_close(answer.refined.boxes, expected.refined.boxes, atol=1e-4, rtol=0)


def test_a_norm_whose_convolution_speaks_to_others_as_well_stays():
    """Otherwise the others would hear the norm."""

    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.conv(x)
            return [x + self.norm(x)]

    backbone = settled().backbone
    backbone.body, backbone.indices = Forked().eval(), [0]
    x = torch.rand(1, 3, 8, 8)
    expected = backbone.body(x)
    merge_backbone(backbone)
    torch.testing.assert_close(backbone.body(x), expected)
    assert isinstance(backbone.body.norm, nn.BatchNorm2d)


# Compilation


def test_compiled_blocks_serve_every_size_of_pages_and_answer_the_same(monkeypatch: pytest.MonkeyPatch):
    """Nothing is traced anew after the second canvas, and no graph is broken; one code serves all equal blocks."""
    compiler = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiler(self, backend="eager", **how))
    torch._dynamo.reset()
    counters.clear()
    model = trained(layers=2).eval()
    plain, graphs = copy.deepcopy(model), []
    compile_parts(model)
    with torch.inference_mode():
        for height, width in ((64, 96), (96, 64), (64, 160), (96, 96)):
            page, size = pages(1, height, width), torch.tensor([[height, width]])
            same(model(page, size).refined, plain(page, size).refined)
            graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[0] > 0
    assert set(graphs[1:]) == {graphs[1]}
    blocks = sum(isinstance(module, ConvNeXtBlock | RepNCSPELAN4 | AIFI | DecoderLayer) for module in model.modules())
    assert graphs[-1] < blocks
