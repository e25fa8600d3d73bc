"""Pages in, detections out: `dfine.load` gives a `Detector`, which takes images, PDFs and folders of them."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import nms

from dfine.checkpoints.loading import load_model
from dfine.checkpoints.onnx_format import OnnxModel, is_onnx
from dfine.config import ConfigError, DataConfig
from dfine.data.batches import PageLoader, leave_signals_to_the_main_process
from dfine.data.sources import Source
from dfine.data.transforms import PageError, as_page, canvas_of, pad, sized
from dfine.inference.documents import DPI, Place, boxes_in_points, is_one_page, list_pages, read
from dfine.inference.evaluation import answer, finite
from dfine.inference.pictures import draw, grid
from dfine.model.detector import DFine
from dfine.structures import Detections

Page = str | Path | Image.Image | np.ndarray
# Doubled boxes are what people complain about most, and no two true boxes of 878 real pages overlap by more than half.
# Without it a model has AP .208 on 165 of them, with it .305; with .6 or .8 the same to .003 (tools/MEASURED.md).
DEDUPE = 0.7


class Found(NamedTuple):
    """What is found on one page, the best first."""

    labels: list[str]  # K class names
    scores: np.ndarray  # (K,) from 0 to 1
    boxes: np.ndarray  # (K, 4) xyxy in pixels of the page as one sees it, that is after its (EXIF or PDF) rotation
    classes: np.ndarray  # (K,) int64, places in `Detector.categories`
    size: tuple[int, int]  # height, width of the page in these pixels
    file: Path | None = None  # None: it was an array or a PIL image
    page: int = 1  # of the file, from 1
    points: np.ndarray | None = None  # (K, 4) the boxes of a PDF's page in points, as `dfine.inference.documents` says


class Detector:
    """A trained model, ready for use: `detector(pages)`.

    Attributes:
        model: in evaluation mode, deployed; or an ONNX file.
        data: how the model's pages are sized.
        categories: `id` and `name` of each class, as in the COCO json that the model was trained on.
    """

    def __init__(self, model: DFine | OnnxModel, data: DataConfig, categories: list[dict[str, Any]]) -> None:
        self.model, self.data, self.categories = model, data, categories
        self.stride = model.strides[-1]

    @overload
    def __call__(
        self, pages: Image.Image | np.ndarray, threshold: float = ..., dedupe: float = ..., **more: Any
    ) -> Found: ...

    @overload  # what a path gives depends on its file
    def __call__(self, pages: str | Path, threshold: float = ..., dedupe: float = ..., **more: Any) -> Any: ...

    @overload
    def __call__(
        self, pages: Iterable[Page], threshold: float = ..., dedupe: float = ..., **more: Any
    ) -> list[Found]: ...

    def __call__(
        self, pages: Page | Iterable[Page], threshold: float = 0.3, dedupe: float = DEDUPE, **more: Any
    ) -> Found | list[Found]:
        """Finds the layout of one page or of many.

        Args:
            pages, threshold, dedupe, more: as for `stream`.
        Returns:
            For one image what is found on it. For a PDF, a TIFF of several pages, a folder, or several of anything a
            list: all pages of all files, in order.
        Raises:
            PageError, FloatingPointError, ValueError: as `stream`.
        """
        if isinstance(pages, Image.Image | np.ndarray) or (isinstance(pages, str | Path) and is_one_page(Path(pages))):
            return next(self.stream([pages], threshold, dedupe, **more | {"on_error": None}))
        return list(self.stream([pages] if isinstance(pages, str | Path) else pages, threshold, dedupe, **more))

    def stream(
        self,
        pages: Iterable[Page | Place | PageError],
        threshold: float = 0.3,
        dedupe: float = DEDUPE,
        batch_size: int = 8,
        dpi: float = DPI,
        numbers: str = "",
        workers: int = 0,
        on_error: Callable[[PageError], None] | None = None,
    ) -> Iterator[Found]:
        """Finds the layout of any number of pages, one after the other: no more than some batches are in memory.

        Args:
            pages: paths of images, PDFs (with the extra `documents`) and folders, PIL images, (H, W, 3) uint8 RGB
                arrays, or what `list_pages` gives.
            threshold: the least score, from 0 to 1.
            dedupe: of boxes that overlap with more than this IoU only the best stays, whatever their classes; 1: all.
            batch_size: pages that go through the model together.
            dpi: for PDFs.
            numbers: which pages of PDFs and TIFFs, such as "1-3,7"; empty: all.
            workers: processes that read pages; 0: this one does.
            on_error: gets what cannot be read, and the other pages go on.
        Raises:
            PageError: a page cannot be read, or is no page, and there is no `on_error`; names file and page.
            FloatingPointError: a score or a box is not finite; names the page.
            WorkerError: a worker is gone.
            ValueError: `numbers` is something else.
        """
        loader: Any = PageLoader(
            Reader(self.data, dpi),
            sampler=enumerate(_one_by_one(pages, numbers)),
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals_to_the_main_process,
        )
        answers: dict[int, Found | PageError] = {}
        given = 0
        for batch in equal_canvases(loader, batch_size, self.stride):
            answers |= self._answers(batch, threshold, dedupe)
            while given in answers:
                found = answers.pop(given)
                given += 1
                if not isinstance(found, PageError):
                    yield found
                elif on_error is None:
                    raise found
                else:
                    on_error(found)

    @torch.inference_mode()
    def _answers(
        self, batch: list["Prepared | Failed"], threshold: float, dedupe: float
    ) -> dict[int, Found | PageError]:
        answers: dict[int, Found | PageError] = {page.number: page.error for page in batch if isinstance(page, Failed)}
        pages = [page for page in batch if isinstance(page, Prepared)]
        if not pages:
            return answers
        images, sizes = pad([page.pixels.numpy() for page in pages], self.stride)
        detections = answer(self.model, images, sizes, [page.size for page in pages])
        for page, found in zip(pages, detections, strict=True):
            found = finite(found, str(page.place or f"page {page.number}"))
            found = Detections(*(x[found.scores >= threshold] for x in found))
            found = Detections(*(x[nms(found.boxes, found.scores, dedupe)] for x in found))
            answers[page.number] = self._named(page, found)
        return answers

    def _named(self, page: "Prepared", found: Detections) -> Found:
        classes, boxes = found.labels.numpy(), found.boxes.double().numpy()
        names = [self.categories[label]["name"] for label in classes]
        file, number = page.place or (None, 1)
        points = None if page.to_points is None else boxes_in_points(boxes, page.to_points)
        return Found(names, found.scores.double().numpy(), boxes, classes, page.size, file, number, points)


def load(checkpoint: str | Path, device: str | torch.device | None = None, fast: bool = False) -> Detector:
    """A detector from a checkpoint: `detector = dfine.load("runs/quickstart/best.pt")`.

    Args:
        checkpoint: best.pt or last.pt of a run, a .pth of the original, or published weights: a folder, a file, or a
            name on the Hugging Face hub such as "docling-project/docling-layout-egret-medium"; or an ONNX file of
            `python -m dfine.export`, which runs without torch's model.
        device: such as "cuda"; None: a GPU if there is one.
        fast: half precision, but not on a CPU where that is slower, and compiled on a GPU: for many pages (see
            `DFine.deploy`). Not of an ONNX file.
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


class Prepared(NamedTuple):
    """A page as the model takes it, and what is needed to say where its boxes are."""

    number: int  # of the page among all, from 0
    pixels: Tensor  # (h, w, 3) uint8, sized as in evaluation
    size: tuple[int, int]  # height, width before that
    place: Place | None
    to_points: np.ndarray | None


class Failed(NamedTuple):
    """A page that could not be read."""

    number: int
    error: PageError


class Reader(Dataset):
    """What the worker processes do: they read a page, and send home no more of it than the model needs."""

    def __init__(self, data: DataConfig, dpi: float) -> None:
        self.data, self.dpi = data, dpi

    def __getitem__(self, item: tuple[int, Any]) -> Prepared | Failed:
        number, page = item
        place = page if isinstance(page, Place) else None
        try:
            if place is not None:
                pixels, to_points = read(place.file, place.page, self.dpi)
            else:
                pixels, to_points = as_array(page, number), None
        except PageError as error:
            return Failed(number, error)
        size = pixels.shape[:2]
        seen = sized(pixels, self.data.eval_short_edge, self.data)
        return Prepared(number, torch.from_numpy(seen), size, place, to_points)


def as_array(page: Any, number: int) -> np.ndarray:
    """An image or array as (H, W, 3) uint8 RGB.

    Args:
        number: of the page among others, for messages.
    Raises:
        PageError: it cannot be read, is of another shape or type, or is an error itself.
    """
    if isinstance(page, PageError):
        raise page
    if isinstance(page, Image.Image):
        try:
            return as_page(page)
        except Exception as error:  # a file that was opened, but not read yet
            raise PageError(f"page {number}: cannot read the image: {str(error) or type(error).__name__}") from error
    if not isinstance(page, np.ndarray):
        raise PageError(f"page {number}: expected a path, a PIL image or an array, found {type(page).__name__}")
    if page.dtype != np.uint8 or page.ndim != 3 or page.shape[2] != 3 or page.size == 0:
        raise PageError(f"page {number}: expected (H, W, 3) uint8 RGB, found {page.shape} {page.dtype}")
    return page


def as_it_is(page: Any) -> Any:
    """For a `DataLoader` whose items are no batches."""
    return page


def equal_canvases(
    pages: Iterable[Prepared | Failed], batch_size: int, stride: int
) -> Iterator[list[Prepared | Failed]]:
    """Batches of pages that need the same canvas; none waits until more than `4 * batch_size` others have come."""
    waiting: dict[tuple[int, int], list[Prepared | Failed]] = {}  # by canvas; the group that was begun first is first
    for page in pages:
        if isinstance(page, Failed):
            yield [page]
            continue
        canvas = canvas_of([(page.pixels.shape[0], page.pixels.shape[1])], stride)
        waiting.setdefault(canvas, []).append(page)
        if len(waiting[canvas]) == batch_size:
            yield waiting.pop(canvas)
        if waiting and page.number - next(iter(waiting.values()))[0].number >= 4 * batch_size:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _one_by_one(pages: Iterable[Any], numbers: str) -> Iterator[Any]:
    return chain.from_iterable(
        list_pages([Path(page)], numbers) if isinstance(page, str | Path) else [page] for page in pages
    )


def beside_truth(model: DFine, pages: Source, index: int, config: DataConfig, threshold: float = 0.3) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a page of a data set: predictions on the left, truth on the right."""
    page, labels, boxes = pages.read(index)
    names = [category["name"] for category in pages.categories]
    found = Detector(model, config, pages.categories)(page, threshold, dedupe=1.0)
    predicted = draw(page, found.classes, found.boxes, names, found.scores)
    return grid([predicted, draw(page, labels, boxes, names)], columns=2)
