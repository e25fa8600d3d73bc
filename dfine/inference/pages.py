"""Pages in, detections out: `dfine.load` gives a `Detector`, which takes images, PDFs and folders of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dfine.checkpoints.loading import EMBEDDED, load_model
from dfine.checkpoints.onnx_format import OnnxModel, is_onnx
from dfine.config import ConfigError, DataConfig
from dfine.data.sources import Source
from dfine.data.transforms import PageError, as_page, model_size, pad, sized
from dfine.data.workers import PageLoader
from dfine.inference import DEDUPE, DPI, THRESHOLD
from dfine.inference.documents import PageLocation, PagePixels, boxes_in_points, is_one_page, list_pages, read
from dfine.inference.evaluation import answer, finite, without_doubles
from dfine.inference.pictures import draw, grid, headed
from dfine.inference.windows import Box, best_seen_here, is_long, windows_of
from dfine.model.detector import DFine
from dfine.structures import Detections

Page = str | Path | Image.Image | np.ndarray


class PageResult(NamedTuple):
    """What is found on one page, the best first."""

    labels: list[str]  # K class names
    scores: np.ndarray  # (K,) from 0 to 1
    boxes: np.ndarray  # (K, 4) xyxy in pixels of the page as one sees it, that is after its (EXIF or PDF) rotation
    classes: np.ndarray  # (K,) int64, indices into `Detector.categories`
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
    ) -> PageResult: ...

    @overload  # what a path gives depends on its file
    def __call__(self, pages: str | Path, threshold: float = ..., dedupe: float = ..., **more: Any) -> Any: ...

    @overload
    def __call__(
        self, pages: Iterable[Page], threshold: float = ..., dedupe: float = ..., **more: Any
    ) -> list[PageResult]: ...

    def __call__(
        self, pages: Page | Iterable[Page], threshold: float = THRESHOLD, dedupe: float = DEDUPE, **more: Any
    ) -> PageResult | list[PageResult]:
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
        pages: Iterable[Page | PageLocation | PageError],
        threshold: float = THRESHOLD,
        dedupe: float = DEDUPE,
        batch_size: int = 8,
        dpi: float = DPI,
        numbers: str = "",
        workers: int = 0,
        on_error: Callable[[PageError], None] | None = None,
        tiles: bool = False,
    ) -> Iterator[PageResult]:
        """Finds the layout of any number of pages, one after the other: no more than some batches are in memory.

        Args:
            pages: paths of images, PDFs (with the extra `documents`) and folders, PIL images, (H, W, 3) uint8 RGB
                arrays, or what `list_pages` gives.
            threshold: the least score, from 0 to 1.
            dedupe: as for `without_doubles`.
            batch_size: pages that go through the model together.
            dpi: for PDFs.
            numbers: which pages of PDFs and TIFFs, such as "1-3,7"; empty: all.
            workers: processes that read pages; 0: this one does.
            on_error: gets what cannot be read, and the other pages go on.
            tiles: pages much longer than wide, or wider than long, go through the model in windows shaped like one
                page, which overlap by half; a box longer than that may come in parts. A model that sees such a page
                whole finds little; a warning says so, once for each file.
        Raises:
            PageError: a page cannot be read, or is no page, and there is no `on_error`; names file and page.
            FloatingPointError: a score or a box is not finite; names the page.
            WorkerError: a worker is gone.
            ValueError: `numbers` are not numbers of pages, or another argument means nothing.
        """
        for name, share in (("threshold", threshold), ("dedupe", dedupe)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, found {share}")
        if batch_size < 1 or not 0 < dpi < float("inf"):
            raise ValueError(f"batch_size and dpi must be positive, found {batch_size} and {dpi}")
        loader: Iterable[Any] = PageLoader(
            Reader(self.data, dpi, tiles),
            sampler=_one_by_one(pages, numbers),
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            generator=torch.Generator(torch.empty(0).device),  # or each call would change a host's random numbers
        )
        return self._stream(loader, threshold, dedupe, batch_size, on_error)

    def _stream(
        self,
        loader: Iterable[Any],
        threshold: float,
        dedupe: float,
        batch_size: int,
        on_error: Callable[[PageError], None] | None,
    ) -> Iterator[PageResult]:
        loaded, told = iter(loader), set[Any]()
        while batch := list(islice(loaded, batch_size)):
            pages = [page for page in batch if isinstance(page, Prepared)]
            results = self._results(pages, threshold, dedupe, batch_size)
            for page in batch:
                if isinstance(page, Prepared):
                    self._warn(page, told)
                    yield next(results)
                elif on_error is None:
                    raise page.error
                else:
                    on_error(page.error)

    def _warn(self, page: "Prepared", told: set[Any]) -> None:
        """Says of a file, once, that the model sees little of a page."""
        file = page.location.file if page.location else page.number
        if len(page.windows) > 1 or not is_long(page.size, self.data) or file in told:
            return
        told.add(file)
        (height, width), (h, w) = page.size, model_size(page.size, self.data.eval_short_edge, self.data)
        warnings.warn(
            f"{page}: {width}x{height} pixels are much {'longer than wide' if height > width else 'wider than long'}: "
            f"the model sees {w}x{h} of them and may find little; with tiles (--tiles) it sees them in windows",
            stacklevel=3,
        )

    def _results(
        self, pages: list["Prepared"], threshold: float, dedupe: float, batch_size: int
    ) -> Iterator[PageResult]:
        windows, seen = [window for page in pages for window in page.windows], list[Detections]()
        for first in range(0, len(windows), batch_size):
            together = windows[first : first + batch_size]
            images, sizes = pad([window.pixels.numpy() for window in together], self.stride)
            originals = [(y2 - y1, x2 - x1) for _, (x1, y1, x2, y2) in together]
            seen += answer(self.model, images, sizes, originals)
        answers = iter(seen)
        for page in pages:
            boxes, parts = [window.box for window in page.windows], []
            for index, (x1, y1, _, _) in enumerate(boxes):
                part = finite(next(answers), str(page))
                part = part._replace(boxes=part.boxes + part.boxes.new_tensor([x1, y1, x1, y1]))
                kept = (part.scores >= threshold) & best_seen_here(part.boxes, boxes, index)
                parts.append(Detections(*(x[kept] for x in part)))
            found = Detections(*(torch.cat(x) for x in zip(*parts, strict=True)))
            yield self._named(page, without_doubles(found, dedupe))

    def _named(self, page: "Prepared", found: Detections) -> PageResult:
        classes, boxes = found.labels.numpy(), found.boxes.double().numpy()
        names = [self.categories[label]["name"] for label in classes]
        file, number = page.location or (None, 1)
        points = None if page.to_points is None else boxes_in_points(boxes, page.to_points)
        return PageResult(names, found.scores.double().numpy(), boxes, classes, page.size, file, number, points)


def load(checkpoint: str | Path = EMBEDDED, device: str | torch.device | None = None, fast: bool = False) -> Detector:
    """A detector from a checkpoint: `detector = dfine.load("runs/quickstart/best.pt")`.

    Args:
        checkpoint: "embedded", the weights in the package; best.pt or last.pt of a run; a .pth of the original;
            published weights: a folder, a file, or a name on the Hugging Face hub such as
            "docling-project/docling-layout-egret-medium"; or an ONNX file of `python -m dfine.export`, which runs
            without torch's model.
        device: such as "cuda"; None: a GPU if there is one.
        fast: for many pages: in half precision, unless a CPU is slower with it, and on a GPU compiled (see `deploy`).
            Not for an ONNX file.
    Raises:
        CheckpointError: not a checkpoint. ConfigError: its config is of another version, or `fast` with an ONNX file.
    """
    if is_onnx(checkpoint):
        if fast:
            raise ConfigError(f"{checkpoint}: an ONNX file runs in the precision it was exported in, so leave out fast")
        file = OnnxModel(checkpoint, device)
        return Detector(file, file.config.data, file.categories)
    model, config, categories = load_model(checkpoint)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Detector(model.deploy(fast), config.data, categories)


class Window(NamedTuple):
    """A part of a page as the model takes it; mostly all of the page."""

    pixels: Tensor  # (h, w, 3) uint8, sized as in evaluation
    box: Box


class Prepared(NamedTuple):
    """A page as the model takes it, and what it takes to give its boxes in pixels and points of the page."""

    number: int  # of the page among all, from 0
    windows: list[Window]
    size: tuple[int, int]  # height, width of the page
    location: PageLocation | None
    to_points: np.ndarray | None

    def __str__(self) -> str:
        return str(self.location or f"page {self.number}")


class Failed(NamedTuple):
    """Why a page could not be read."""

    error: PageError


class Reader(Dataset):
    """Reads pages in the worker processes, and sends back no more of a page than the model needs."""

    def __init__(self, data: DataConfig, dpi: float, tiles: bool) -> None:
        self.data, self.dpi, self.tiles = data, dpi, tiles

    def __getitem__(self, item: tuple[int, Any]) -> Prepared | Failed:
        number, page = item
        location = page if isinstance(page, PageLocation) else None
        try:
            pixels, to_points = read(*location, self.dpi) if location else PagePixels(as_array(page, number), None)
        except PageError as error:
            return Failed(error)
        height, width = pixels.shape[:2]
        boxes = windows_of((height, width), self.data) if self.tiles else [(0, 0, width, height)]
        windows = []
        for x1, y1, x2, y2 in boxes:
            seen = sized(pixels[y1:y2, x1:x2], self.data.eval_short_edge, self.data)
            # A view of a host's array may run backwards, or not be for writing: of these torch makes no tensor.
            windows.append(Window(torch.from_numpy(np.require(seen, requirements=["C", "W"])), (x1, y1, x2, y2)))
        return Prepared(number, windows, (height, width), location, to_points)


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


def _one_by_one(pages: Iterable[Any], numbers: str) -> Iterator[tuple[int, Any]]:
    """Numbered from 0. PIL images become arrays here: on the way to a worker they would lose how many bits they had."""
    located = chain.from_iterable(
        list_pages([Path(page)], numbers) if isinstance(page, str | Path) else [page] for page in pages
    )
    for number, page in enumerate(located):
        try:
            item = as_array(page, number) if isinstance(page, Image.Image) else page
        except PageError as error:
            item = error
        yield number, item


def beside_truth(model: DFine, pages: Source, index: int, config: DataConfig) -> np.ndarray:
    """A picture (H, W, 3) uint8 of a page of a data set: what a `Detector` gives for it, and the truth."""
    page, labels, boxes = pages.read(index)
    names = [category["name"] for category in pages.categories]
    result = Detector(model, config, pages.categories)(page)
    predicted = draw(page, result.classes, result.boxes, names, result.scores)
    return grid([headed(predicted, "predicted"), headed(draw(page, labels, boxes, names), "truth")], columns=2)
