"""Small things to test with: truth from plain numbers, a model that fits in a pocket, pages with two rectangles."""

import numpy as np
import torch
from torch import Tensor, nn

from dfine.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from dfine.model.denoising import draw_noise, noised_truth
from dfine.model.detector import DFine
from dfine.structures import NoisedTruth, Refinement, Target


def target(
    boxes: list[list[float]], labels: list[int] | None = None, image_id: int = 1, dtype: torch.dtype = torch.float32
) -> Target:
    """The truth of a page; all labels are 0 unless given."""
    truth = torch.tensor(boxes, dtype=dtype).view(-1, 4)
    return Target(torch.tensor(labels or [0] * len(truth), dtype=torch.int64), truth, image_id, (100, 100))


def random_boxes(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(*shape, 4) cxcywh boxes inside the page, from torch's global generator."""
    size = 0.05 + 0.4 * torch.rand(*shape, 2, dtype=dtype)
    return torch.cat([size / 2 + (1 - size) * torch.rand(*shape, 2, dtype=dtype), size], dim=-1)


def tiny_config(
    strides: tuple[int, ...] = (8, 16, 32), encoder_dim: int = 0, backbone: str = "test_convnext", **decoder: object
) -> ModelConfig:
    """0.3 million weights, 8 queries, 3 layers; further keywords change the decoder."""
    return ModelConfig(
        backbone=BackboneConfig(name=backbone, pretrained=False),
        strides=strides,
        hidden_dim=32,
        encoder=EncoderConfig(hidden_dim=encoder_dim, heads=4, feedforward_dim=32, depth_mult=0.34, expansion=0.5),
        decoder=DecoderConfig(
            **dict(heads=4, feedforward_dim=32, layers=3, points=(1, 2, 1), queries=8, bins=8) | decoder
        ),
    )


def tiny_model(classes: int = 3, **config: object) -> DFine:
    """In training mode with torch's global generator reseeded, so that all calls give the same weights."""
    torch.manual_seed(0)
    return DFine(tiny_config(**config), classes)


def shaken(module: nn.Module, scale: float = 0.1) -> nn.Module:
    """The module with noise on every weight: nothing is at its initial value, where many answers are trivially 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def freeze_batch_norms(model: nn.Module) -> nn.Module:
    """Batch norms use their running statistics although the rest of the model may be in training mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def noised(targets: list[Target], queries: int = 4, classes: int = 3) -> NoisedTruth:
    """Denoising queries with fresh noise."""
    return noised_truth(targets, draw_noise(targets, queries, classes), queries, classes, 0.25, 1.0)


def drawn_page(height: int = 120, width: int = 90) -> np.ndarray:
    """A line of black and a blue picture on white, (H, W, 3)."""
    page = np.full((height, width, 3), 255, np.uint8)
    page[10:30, 8 : width - 20] = 0
    page[height // 2 :, 5 : width // 2] = (40, 90, 160)
    return page


def trained(**config: object) -> DFine:
    """In training mode, but batch norm uses its running statistics, as in evaluation mode."""
    return freeze_batch_norms(shaken(tiny_model(**config)))


def same(ours: Refinement, theirs: Refinement) -> None:
    """The answers of two models are equal up to rounding."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def anchor(cell: int, height: int, width: int, canvas: tuple[int, int] | None = None) -> list[float]:
    """The anchor of a memory cell, for a page of height x width on its canvas."""
    canvas = canvas or (height, width)
    for level, stride in enumerate((8, 16, 32)):
        rows, columns = canvas[0] // stride, canvas[1] // stride
        if cell < rows * columns:
            x, y = (cell % columns + 0.5) * stride / width, (cell // columns + 0.5) * stride / height
            return [x, y, 0.05 * 2**level, 0.05 * 2**level]
        cell -= rows * columns
    raise AssertionError("no such cell")
