"""Layout of pages: `python -m dfine.predict --checkpoint runs/NAME/best.pt FILE_OR_FOLDER ... --out DIR`.

Takes images, TIFFs of several pages, PDFs (with the extra `documents`) and folders of all these. In folders it leaves
out the pictures that it drew itself. Writes predictions.json, page by page: a list of pages with `file`, `page` (from
1), `width`, `height`, `picture` and `detections`, each with `label`, `category_id`, `score` and `box`: [x1, y1, x2, y2]
in pixels of the page as one sees it, that is after its (EXIF or PDF) rotation. Detections on a PDF have `points` as
well: the box in points as the PDF counts them, y upwards, whatever its rotation and crop box. A page that cannot be
read or drawn is named and the others go on; the exit status is then 1.
"""

import argparse
import os
from pathlib import Path

from dfine.arguments import fraction, open_streams, page_ranges, threads_sleep
from dfine.inference import DEDUPE, DPI, THRESHOLD


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--checkpoint",
        default="embedded",
        help="best.pt, an ONNX file, published weights, or org/NAME; without it the weights in the package",
    )
    add("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER")
    add("--out", required=True, type=Path, help="folder for predictions.json and the pictures")
    add("--resume", action="store_true", help="go on after the pages in predictions.json; give the same options again")
    add("--threshold", type=fraction, default=THRESHOLD, help="least score, from 0 to 1 (default: %(default)s)")
    add(
        "--dedupe",
        type=fraction,
        default=DEDUPE,
        metavar="IOU",
        help="drop boxes that overlap a better one by more (default: %(default)s; 1: none)",
    )
    add("--pages", type=page_numbers, default="", help="of PDFs and TIFFs, such as 1-3,7 or 5- (default: all)")
    add("--dpi", type=positive, default=DPI, help="for PDFs (default: %(default)g, two pixels a point)")
    add(
        "--pictures",
        choices=("none", "png", "jpg"),
        default="png",
        help="pages with their boxes (default: %(default)s)",
    )
    add(
        "--coco",
        type=Path,
        metavar="JSON",
        help="a COCO json with these images: writes detections.json as well, COCO results with its image ids, in its "
        "pixels (for AP use --threshold 0 --dedupe 1)",
    )
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that read pages, and as many that draw (default: %(default)s; 0: none)",
    )
    add("--tiles", action="store_true", help="look at pages much longer than wide, or wider than long, in windows")
    add("--fast", action="store_true", help="for many pages: in bf16 where that is faster, and on a GPU compiled")
    return parser.parse_intermixed_args(line)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def page_numbers(text: str) -> str:
    try:
        page_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    threads_sleep()
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import json
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import Dataset
from tqdm import tqdm

from dfine.data.transforms import PageError
from dfine.data.workers import PageLoader, make_room
from dfine.files import lock, write_whole
from dfine.inference.documents import MARK, PageLocation, list_pages, read
from dfine.inference.pages import Detector, PageResult, as_it_is, load
from dfine.inference.pictures import draw
from dfine.inference.results import CocoImages, JsonList, page_entry, read_predictions


def main() -> int:
    """Returns 1 if a page could not be read or drawn, else 0."""
    options = arguments()
    make_room(options.workers, "--workers")
    detector = load(options.checkpoint, fast=options.fast)
    coco = CocoImages(options.coco, detector.categories, str(options.checkpoint)) if options.coco else None
    listed = list(list_pages(options.paths, options.pages))
    locations = [location for location in listed if not isinstance(location, PageError)]
    errors: list[PageError] = []

    def report(error: PageError) -> None:
        tqdm.write(f"error: {error}", file=sys.stderr)
        errors.append(error)

    for error in listed:
        if isinstance(error, PageError):
            report(error)
    if not locations:
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with lock(options.out, "--out"):
        predict(options, detector, coco, locations, report)
    return int(bool(errors))


def predict(
    options: argparse.Namespace,
    detector: Detector,
    coco: CocoImages | None,
    locations: list[PageLocation],
    report: Callable[[PageError], None],
) -> None:
    """Writes what is found on the pages into the folder, and says so."""
    predictions = options.out / "predictions.json"
    former = read_predictions(predictions) if options.resume else []
    done = {(entry["file"], entry["page"]) for entry in former}
    results = JsonList(predictions, former)
    locations = [location for location in locations if (str(location.file), location.page) not in done]
    page_results = detector.stream(
        locations,
        options.threshold,
        options.dedupe,
        dpi=options.dpi,
        workers=options.workers,
        on_error=report,
        tiles=options.tiles,
    )
    drawn: Any = PageLoader(
        Drawing(options.out, options.pictures, options.dpi, detector.categories),
        sampler=enumerate(page_results, results.length),
        batch_size=None,
        num_workers=0 if options.pictures == "none" else options.workers,
        collate_fn=as_it_is,
    )
    for entry, error in tqdm(drawn, "predicting", total=len(locations), unit="page"):
        results.append(entry)
        if error is not None:
            report(error)
    written = ["predictions.json"]
    if options.pictures != "none":
        written.append("pictures")
    if coco is not None:
        write_coco(coco, predictions, options.out / "detections.json", report)
        written.append("detections.json")
    print(f"{results.length} pages in {options.out}: {', '.join(written)}")


class Drawing(Dataset):
    """Draws in processes of its own. Each reads its page once more, so that no queue of pages fills the memory."""

    def __init__(self, folder: Path, kind: str, dpi: float, categories: list[dict[str, Any]]) -> None:
        self.folder, self.kind, self.dpi, self.categories = folder, kind, dpi, categories

    def __getitem__(self, item: tuple[int, PageResult]) -> tuple[dict[str, Any], PageError | None]:
        """A page's entry in predictions.json, and why it has no picture.

        Args:
            item: the number of the entry, by which the picture is named, and what is found.
        """
        number, result = item
        assert result.file is not None
        picture, failure = None, None
        if self.kind != "none":
            # Numbered: files in different folders may share their name. A name has at most 255 bytes, a letter 4.
            name = f"{number:05d}_{result.file.stem[:50]}{f'_{result.page}' if result.page > 1 else ''}.{self.kind}"
            try:
                self.draw(result, self.folder / name)
                picture = name
            except (OSError, PageError) as error:
                location = PageLocation(result.file, result.page)
                failure = PageError(f"{location}: its detections are saved, but its picture cannot be: {error}")
        return page_entry(result, picture, self.categories), failure

    def draw(self, result: PageResult, path: Path) -> None:
        """
        Raises:
            OSError: the picture cannot be written; nothing is left of it. PageError: the page cannot be read any more.
        """
        assert result.file is not None
        page = read(result.file, result.page, self.dpi).pixels
        names = [category["name"] for category in self.categories]
        picture = Image.fromarray(draw(page, result.classes, result.boxes, names, result.scores))
        mark = PngInfo()
        mark.add_text("Comment", MARK)  # so that it can be told from a page
        try:
            # zlib's first level: .6 s for an A4 scan at 300 dpi; its sixth takes 2 s, for 6% less.
            picture.save(path, comment=MARK, pnginfo=mark, compress_level=1, quality=85)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def write_coco(coco: CocoImages, predictions: Path, path: Path, report: Callable[[PageError], None]) -> None:
    """Writes the COCO results of all pages; those that are not in the json are reported."""
    results = []
    for entry in read_predictions(predictions):
        try:
            results += coco.results(entry)
        except PageError as error:
            report(error)
    write_whole({path: json.dumps(results)})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"note: {message}", file=sys.stderr)
    try:
        sys.exit(main())
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: predictions.json has the pages up to here; --resume goes on with the others", file=sys.stderr)
        sys.exit(130)
