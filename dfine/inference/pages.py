"""A page in, detections out: `dfine.load` gives a `Detector`; below it are functions of a model and arrays."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torchvision.ops import nms

from dfine.checkpoints.loading import load_model
from dfine.checkpoints.onnx_format import OnnxModel, is_onnx
from dfine.config import ConfigError, DataConfig
from dfine.data.sources import Source
from dfine.data.transforms import PageError, as_page, pad, read_page, sized
from dfine.inference.evaluation import answer, finite
from dfine.inference.pictures import draw, grid
from dfine.model.detector import DFine
from dfine.structures import Detections

Page = str | Path | Image.Image | np.ndarray


class Found(NamedTuple):
    """What is found on one page, the best first."""

    labels: list[str]  # K class names
    scores: np.ndarray  # (K,) from 0 to 1
    boxes: np.ndarray  # (K, 4) xyxy in pixels of the page as one sees it, that is after its EXIF rotation
    classes: np.ndarray  # (K,) int64, places in `Detector.categories`


class Detector:
    """A trained model, ready for use: `detector(pages)`.

    Attributes:
        model: in evaluation mode, deployed; or an ONNX file.
        data: how the model's pages are sized.
        categories: `id` and `name` of each class, as in the COCO json that the model was trained on.
    """

    def __init__(self, model: DFine | OnnxModel, data: DataConfig, categories: list[dict[str, Any]]) -> None:
        self.model, self.data, self.categories = model, data, categories

    @overload  # a string is one page, although it is iterable
    def __call__(  # type: ignore[overload-overlap]
        self, pages: Page, threshold: float = ..., dedupe: float = ..., batch_size: int = ...
    ) -> Found: ...

    @overload
    def __call__(
        self, pages: Iterable[Page], threshold: float = ..., dedupe: float = ..., batch_size: int = ...
    ) -> list[Found]: ...

    def __call__(
        self, pages: Page | Iterable[Page], threshold: float = 0.3, dedupe: float = 1.0, batch_size: int = 8
    ) -> Found | list[Found]:
        """Finds the layout of one page or of many.

        Args:
            pages: one page or several: paths of images, PIL images or (H, W, 3) uint8 RGB arrays.
            threshold: the least score, from 0 to 1.
            dedupe: of boxes that overlap with more than this IoU only the best stays, whatever their classes; 1: all.
            batch_size: pages that go through the model together.
        Returns:
            For one page what is found on it; for several a list, in their order.
        Raises:
            PageError: a page cannot be read, or is no page; names the file, or the page's place.
            FloatingPointError: a score or a box is not finite.
        """
        if isinstance(pages, Page):
            return self([pages], threshold, dedupe, batch_size)[0]
        arrays = (as_array(page, place) for place, page in enumerate(pages))
        found: list[Detections] = []
        while batch := list(islice(arrays, batch_size)):
            found += predict_pages(self.model, batch, self.data, threshold, dedupe)
        return [self._named(page) for page in found]

    def _named(self, found: Detections) -> Found:
        classes = found.labels.numpy()
        names = [self.categories[label]["name"] for label in classes]
        return Found(names, found.scores.double().numpy(), found.boxes.double().numpy(), classes)


def load(checkpoint: str | Path, device: str | torch.device | None = None, fast: bool = False) -> Detector:
    """A detector from a checkpoint: `detector = dfine.load("runs/quickstart/best.pt")`.

    Args:
        checkpoint: best.pt or last.pt of a run, a .pth of the original, or published weights: a folder, a file, or a
            name on the Hugging Face hub such as "docling-project/docling-layout-egret-medium"; or an ONNX file of
            `python -m dfine.export`, which runs without torch's model.
        device: such as "cuda"; None: a GPU if there is one.
        fast: half precision, and compiled on a GPU: for many pages (see `DFine.deploy`). Not of an ONNX file.
    Raises:
        CheckpointError: not a checkpoint. ConfigError: its config is of another version, or an ONNX file shall be fast.
    """
    if is_onnx(checkpoint):
        if fast:
            raise ConfigError(f"{checkpoint}: an ONNX file runs in the precision it was exported in, so leave out fast")
        file = OnnxModel(checkpoint, device)
        return Detector(file, file.config.data, file.categories)
    model, config, categories = load_model(checkpoint)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Detector(model.deploy(fast), config.data, categories)


def as_array(page: Page, place: int) -> np.ndarray:
    """A page as (H, W, 3) uint8 RGB.

    Args:
        place: of the page among others, for messages.
    Raises:
        PageError: it cannot be read, or the array has another shape or type.
    """
    if isinstance(page, str | Path):
        return read_page(page)
    if isinstance(page, Image.Image):
        return as_page(page)
    if not isinstance(page, np.ndarray):
        raise PageError(f"page {place}: expected a path, a PIL image or an array, found {type(page).__name__}")
    if page.dtype != np.uint8 or page.ndim != 3 or page.shape[2] != 3 or page.size == 0:
        raise PageError(f"page {place}: expected (H, W, 3) uint8 RGB, found {page.shape} {page.dtype}")
    return page


@torch.inference_mode()
def predict_pages(
    model: DFine | OnnxModel, pages: list[np.ndarray], config: DataConfig, threshold: float = 0.3, dedupe: float = 1.0
) -> list[Detections]:
    """What the model finds on each page of a batch, prepared as in evaluation.

    Args:
        model: in evaluation mode. pages: (H, W, 3) uint8 RGB, of any sizes. threshold: the least score.
        dedupe: of boxes that overlap with more than this IoU only the best stays, whatever their classes; 1: all stay.
    Returns:
        On the CPU, boxes in pixels of the page.
    Raises:
        FloatingPointError: a score or a box is not finite.
    """
    images, sizes = pad([sized(page, config.eval_short_edge, config) for page in pages], model.strides[-1])
    batch = []
    for found in answer(model, images, sizes, [page.shape[:2] for page in pages]):
        found = finite(found, "the page")
        found = Detections(*(x[found.scores >= threshold] for x in found))
        batch.append(Detections(*(x[nms(found.boxes, found.scores, dedupe)] for x in found)))
    return batch


def predict_page(
    model: DFine, page: np.ndarray, config: DataConfig, threshold: float = 0.3, dedupe: float = 1.0
) -> Detections:
    """`predict_pages` of one page."""
    return predict_pages(model, [page], config, threshold, dedupe)[0]


def beside_truth(model: DFine, pages: Source, index: int, config: DataConfig, threshold: float = 0.3) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a page of a data set: predictions on the left, truth on the right."""
    page, labels, boxes = pages.read(index)
    names = [category["name"] for category in pages.categories]
    found = predict_page(model, page, config, threshold)
    predicted = draw(page, found.labels.numpy(), found.boxes.numpy(), names, found.scores.numpy())
    return grid([predicted, draw(page, labels, boxes, names)], columns=2)
