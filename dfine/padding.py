"""What padding does to a page's answer: `python -m dfine.padding --checkpoint runs/NAME/best.pt [key=value ...]`.

Pages of `data.val` are shown to the model alone, and in a batch with a page of quite another shape: their own quarter
turn, so that the canvas is a square.
"""

import argparse
import sys

import numpy as np
import torch
from torchvision.ops import box_iou
from tqdm import tqdm

from dfine import checkpoint, config
from dfine.config import DataConfig
from dfine.model import DFine, detect
from dfine.sources import open_source
from dfine.structures import Detections
from dfine.transforms import fit, pad, resize


@torch.inference_mode()
def alone_and_beside(model: DFine, page: np.ndarray, settings: DataConfig) -> tuple[Detections, Detections]:
    """What is found on a page (H, W, 3) alone, and beside its quarter turn; boxes in pixels of the page."""
    small = resize(page, fit(page.shape[:2], settings.eval_short_edge, settings.max_long_edge))
    found = []
    for batch in ([small], [small, np.rot90(small).copy()]):
        images, sizes = pad(batch, model.strides[-1])
        found.append(detect(model(images, sizes), [page.shape[:2]] * len(batch))[0])
    return found[0], found[1]


def differences(alone: Detections, beside: Detections, threshold: float) -> torch.Tensor:
    """(K, 2): how far each box of at least that score moves (its farthest edge, pixels), and its score.

    A box is looked for among all of the same label, where it overlaps most.
    """
    rows = []
    for score, label, box in zip(*alone, strict=True):
        if score >= threshold:
            candidates = beside.labels == label
            overlap = box_iou(box[None], beside.boxes)[0].masked_fill(~candidates, -1)
            same = int(overlap.argmax())
            rows.append(torch.stack([(beside.boxes[same] - box).abs().max(), (beside.scores[same] - score).abs()]))
    return torch.stack(rows) if rows else torch.zeros(0, 2)


def table(found: torch.Tensor) -> str:
    """How many boxes stay as they are, for people; found: (K, 2) of `differences`."""
    lines = [f"{len(found)} detections"]
    limits = (("box", 1.0, "1 pixel"), ("score", 0.01, "0.01")) if len(found) else ()
    for (name, limit, text), values in zip(limits, found.T, strict=False):
        median, most, nearly_all = torch.quantile(values, torch.tensor([0.5, 0.9, 0.99])).tolist()
        share = (values < limit).float().mean()
        spread = f"median {median:.2g}, 90% {most:.2g}, 99% {nearly_all:.2g}"
        lines.append(f"{name} moves by less than {text}: {share:.1%}; {spread}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--pages", type=int, default=100, help="at most so many (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.val.images=pages/test")
    arguments = parser.parse_intermixed_args()
    model, settings, _ = checkpoint.load_model(arguments.checkpoint)
    settings = config.override(settings, arguments.overrides)
    pages = open_source(settings.data.val, "data.val")
    found = [
        differences(*alone_and_beside(model, pages.read(i)[0], settings.data), arguments.threshold)
        for i in tqdm(range(min(arguments.pages, len(pages.ids))), unit="page")
    ]
    print(table(torch.cat(found)))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
