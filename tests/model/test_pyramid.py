"""Detectors on plain vision transformers: a pyramid from their one map, and all that other backbones can do."""

from pathlib import Path

import pytest
import torch
from tiny import noised, shaken, target, tiny_config, tiny_model
from torch import Tensor
from torchvision.ops import box_iou

from dfine.boxes import cxcywh_to_xyxy
from dfine.checkpoints import ours
from dfine.config import Config, LossConfig
from dfine.losses.criterion import criterion
from dfine.model.detector import DFine, detect
from dfine.model.pyramid import SimplePyramid

VIT = "test_vit3"  # by itself timm lets it see squares of 160 pixels alone
TRUTH = [target([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2]], labels=[0, 2]), target([])]


def pages() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)


def total(model: DFine, images: Tensor, sizes: Tensor | None = None) -> Tensor:
    losses = criterion(model(images, sizes, noised(TRUTH)), TRUTH, model.decoder.w, LossConfig())
    return torch.stack([loss.sum() for loss in losses.values()]).sum()


def test_a_pyramid_has_a_map_for_each_stride():
    pyramid = SimplePyramid(12, (8, 16, 32))
    assert pyramid.channels == [6, 12, 12]
    shapes = [tuple(x.shape) for x in pyramid([torch.rand(2, 12, 4, 6)])]
    assert shapes == [(2, 6, 8, 12), (2, 12, 4, 6), (2, 12, 2, 3)]
    assert [x.shape[-1] for x in SimplePyramid(12, (16, 32))([torch.rand(1, 12, 4, 6)])] == [6, 3]


def test_every_map_is_normalised():
    maps = SimplePyramid(12, (8, 16, 32))([5 + 3 * torch.randn(1, 12, 4, 6)])
    for x in maps:
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.var(1, correction=0), torch.ones_like(x[:, 0]), atol=1e-3, rtol=0)


def test_a_cell_knows_only_what_lies_below_it():
    """The cell in row 1, column 2 of stride 16 is changed."""
    torch.manual_seed(0)
    pyramid, x = SimplePyramid(12, (8, 16, 32)), torch.randn(1, 12, 4, 6)
    other = x.clone()
    other[..., 1, 2] += torch.randn(12)
    changed = [(a != b).any(1)[0].nonzero().tolist() for a, b in zip(pyramid([x]), pyramid([other]), strict=True)]
    assert changed == [[[2, 4], [2, 5], [3, 4], [3, 5]], [[1, 2]], [[0, 1]]]


def test_every_parameter_learns():
    model = shaken(tiny_model(backbone=VIT))
    total(model, pages()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or (p.grad == 0).all()] == []


@torch.no_grad()
@pytest.mark.parametrize("backbone", [VIT, "convnextv2_atto"])
def test_a_page_is_answered_as_alone_whatever_shape_its_neighbours_have(backbone: str):
    """Both kinds of backbone read the whole canvas: attention, and the global response norm of ConvNeXt V2."""
    model = shaken(tiny_model(backbone=backbone), 0.02).eval()
    sizes = torch.tensor([[60, 90], [150, 40]])
    images = torch.randint(256, (2, 3, 160, 96), dtype=torch.uint8)
    together = model(images, sizes).refined
    for i, (height, width) in enumerate([(64, 96), (160, 64)]):
        alone = model(images[i : i + 1, :, :height, :width], sizes[i : i + 1]).refined
        torch.testing.assert_close(together.boxes[:, i : i + 1], alone.boxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(together.logits[:, i : i + 1], alone.logits, atol=1e-3, rtol=0)


def test_one_batch_is_learned():
    """Of two pages of noise, one with boxes: there the surest detection is right, and surer than any on the other."""
    model, images = tiny_model(backbone=VIT), pages()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=100, pct_start=0.1)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = total(model, images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * losses[0]
    with torch.no_grad():
        first, second = detect(model.eval()(images), [(100, 100)] * 2)
    of_its_class = TRUTH[0].labels == first.labels[0]
    assert box_iou(first.boxes[:1], cxcywh_to_xyxy(100 * TRUTH[0].boxes[of_its_class])).max() > 0.5
    assert first.scores[0] > 3 * second.scores[0]


def test_a_checkpoint_holds_the_pyramid(tmp_path: Path):
    model = shaken(tiny_model(backbone=VIT)).eval()
    categories = [{"id": i, "name": name} for i, name in enumerate("abc")]
    ours.save(tmp_path / "best.pt", ours.weights(Config(model=tiny_config(backbone=VIT)), categories, model))
    again = ours.load_model(tmp_path / "best.pt")[0]
    assert torch.equal(again(pages()).refined.boxes, model(pages()).refined.boxes)


@torch.no_grad()
def test_it_can_be_deployed():
    model = shaken(tiny_model(backbone=VIT)).eval()
    expected = model(pages()).refined.boxes
    torch.testing.assert_close(model.deploy()(pages()).refined.boxes, expected, atol=1e-4, rtol=0)
