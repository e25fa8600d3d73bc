"""How D-FINE comes to its boxes: `python -m dfine.explain --checkpoint runs/NAME/best.pt PAGE --out explain.html`.

Writes one HTML file that needs nothing else: the page with its boxes, from the anchors to the last decoder layer, and
for each query what the layers say: the four edge distributions over W(n) (paper section 4.1), the class score with and
without LQE, and where its attention reads. `--annotations`, a COCO json with the page, adds who is matched with what,
the union of the matchings (section 4.2), and what each loss says. The numbers are those of `dfine.predict`.
"""

import argparse
from pathlib import Path

from dfine.arguments import open_streams


def arguments() -> argparse.Namespace:
    open_streams()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        default="embedded",
        help="best.pt, published weights, or org/NAME; without it the weights in the package",
    )
    parser.add_argument("file", type=Path, metavar="PAGE", help="an image, or a PDF or TIFF")
    parser.add_argument("--out", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--annotations", type=Path, metavar="JSON", help="COCO json with the page")
    parser.add_argument("--page", default="1", metavar="NUMBER", help="of a PDF or TIFF (default: %(default)s)")
    options = parser.parse_args()
    if options.out.suffix != ".html":
        parser.error(f"--out must end in .html, found {options.out}")
    return options


if __name__ == "__main__":
    arguments()  # before torch is imported, which takes seconds: --help need not wait for it

import base64
import io
import json
import sys
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import nms

from dfine.boxes import cxcywh_to_xyxy, iou
from dfine.checkpoints.loading import load_model
from dfine.checkpoints.onnx_format import is_onnx
from dfine.config import Config, ConfigError, DataConfig, LossConfig
from dfine.data.transforms import PageError, pad, sized
from dfine.files import try_writing, write_whole
from dfine.inference import DEDUPE
from dfine.inference.documents import list_pages, read
from dfine.inference.evaluation import finite
from dfine.inference.results import truth_of
from dfine.losses.criterion import Normalisers, Truth, scheduled, stack, supervise
from dfine.losses.golsd import union
from dfine.losses.matcher import match
from dfine.model.deformable_attention import DeformableAttention
from dfine.model.detector import DFine, detect, gather
from dfine.model.fdr import LQE, encode, expectation, soft_bins
from dfine.structures import DFineOutput, Matches, Prediction, Refinement, Target

SHOWN = 50  # queries, the best; those that a head matches are shown as well
LONGEST = 1600  # pixels, of the page's picture in the file


class Seen(NamedTuple):
    """What the model makes of one page (B = 1)."""

    output: DFineOutput  # of all heads
    anchors: Tensor  # (1, Q, 4) of the cells that the queries come from
    plain: Tensor  # (L, 1, Q, C) class logits without LQE
    points: Tensor  # (L, 1, Q, heads, P, 3) where attention reads: x, y as fractions of the page, and the weight


def main() -> None:
    options = arguments()
    if is_onnx(options.checkpoint):
        raise ConfigError(f"{options.checkpoint}: an ONNX file hides its layers: name the checkpoint that it is from")
    location = next(list_pages([options.file], options.page))
    if isinstance(location, PageError):
        raise location
    page, target = read(*location).pixels, None
    model, config, categories = load_model(options.checkpoint)
    if options.annotations is not None:
        target = truth_of(location, page.shape[:2], options.annotations, categories, options.checkpoint)
    try_writing(options.out.parent, "--out")
    model.deploy()
    data = explained(model, config, categories, page, str(location), target) | {"checkpoint": options.checkpoint}
    write_whole({options.out: as_html(data)})
    print(f"{options.out}: {location} with {len(data['queries'])} queries; open it in a browser")


@torch.inference_mode()
def look(model: DFine, data: DataConfig, page: np.ndarray) -> Seen:
    """The forward pass that `dfine.predict` makes of a page (H, W, 3) uint8, but all heads answer."""
    images, sizes = pad([sized(page, data.eval_short_edge, data)], model.strides[-1])
    plain: list[Tensor] = []
    points: list[Tensor] = []

    def attended(attention: Any, args: Any, _: Any) -> None:
        locations, weights = attention.sampling(*args[:2])
        points.append(torch.cat([locations, weights[..., None]], dim=-1))

    hooks: dict[Any, Any] = {LQE: lambda _, args, __: plain.append(args[0]), DeformableAttention: attended}
    with ExitStack() as stack:
        for module in model.decoder.modules():
            if type(module) in hooks:
                stack.enter_context(module.register_forward_hook(hooks[type(module)]))
        stack.callback(model.eval)
        model.training = model.selection.training = True  # all heads answer; what is inside stays as in evaluation
        output = model(images, sizes)
    shapes = [(images.shape[-2] // stride, images.shape[-1] // stride) for stride in model.strides]
    anchors = gather(model.selection.anchors(shapes, sizes, model.decoder.w)[0], output.queries.cells)
    return Seen(output, anchors, torch.stack(plain), torch.stack(points))


@torch.inference_mode()
def explained(
    model: DFine, config: Config, categories: list[dict[str, Any]], page: np.ndarray, file: str, target: Target | None
) -> dict[str, Any]:
    """What the HTML file shows, as plain values: boxes are xyxy pixels of the page, heads are in the order of time.

    Args:
        model: deployed, as in `dfine.load`, and on the CPU. page: (H, W, 3) uint8. file: its name, for people.
    Raises:
        FloatingPointError: a score, a box or a matching cost is not finite.
    """
    seen, w, (height, width) = look(model, config.data, page), model.decoder.w, page.shape[:2]
    finite(detect(seen.output, [(height, width)])[0], file)
    output, edge_logits = seen.output, seen.output.refined.edge_logits[:, 0]
    heads = stack(output.refined, output.initial, output.encoder)
    pixels = torch.tensor([width, height, width, height])
    cxcywh = torch.cat([seen.anchors, in_time(heads.boxes)[:, 0]])  # (H + 1, Q, 4)
    boxes = cxcywh_to_xyxy(cxcywh).clamp(0, 1) * pixels  # (H + 1, Q, 4)
    scores, labels = in_time(heads.logits)[:, 0].sigmoid().max(-1)  # (H, Q) each
    plain = seen.plain[:, 0].sigmoid().amax(-1)  # (L, Q); LQE adds the same to all classes
    kept = set(nms(boxes[-1], scores[-1], DEDUPE).tolist())  # whatever the threshold: a box gives way to better ones
    best = [q for q in scores[-1].argsort(descending=True).tolist() if scores[-1, q] > 0]
    if not best:
        raise PageError(f"{file}: no cell of the model's maps lies on the page")
    verdicts = None if target is None else judged(output, heads, target, w, scheduled(config.loss, float("inf")))
    queries = [
        {
            "query": q,
            "kept": q in kept,
            "boxes": rounded(boxes[:, q], 3),
            "labels": labels[:, q].tolist(),
            "scores": rounded(scores[:, q], 6),
            "plain": rounded(plain[:, q], 6),
            "edges": rounded(edge_logits[:, q].softmax(-1), 4),  # (L, 4, N + 1)
            "offsets": rounded(expectation(edge_logits[:, q], w), 5),  # (L, 4)
            "points": rounded(seen.points[:, 0, q], 4),  # (L, heads, P, 3)
        }
        | (verdicts[q] if verdicts else {})
        for rank, q in enumerate(best)
        if rank < SHOWN or (verdicts and verdicts[q]["truth"] is not None)
    ]
    truth = target and {"labels": target.labels.tolist(), "boxes": rounded(cxcywh_to_xyxy(target.boxes) * pixels, 3)}
    about = {"file": file, "width": width, "height": height, "href": data_uri(page), "dedupe": DEDUPE}
    about |= {"classes": [category["name"] for category in categories], "w": rounded(w, 5)}
    about["steps"] = ["anchor", "proposal", "initial box", *(f"layer {i + 1}" for i in range(len(edge_logits)))]
    about["strides"] = np.repeat(model.strides, config.model.decoder.points).tolist()  # (P,) of what a point reads
    return about | {"queries": queries, "truth": truth}


def in_time(x: Tensor) -> Tensor:
    """(L + 2, ...) from `criterion`'s order of heads to that of time: proposals, initial boxes, layers 1 to L."""
    return x[[-1, -2, *range(len(x) - 2)]]


def judged(
    output: DFineOutput, heads: Prediction, target: Target, w: Tensor, config: LossConfig
) -> list[dict[str, Any]]:
    """What the truth says of each of the Q queries; lists over heads are in the order of time.

    Args:
        heads: all L + 2, as `criterion` stacks them.
    Returns:
        `matched`, the box that each head's matching gives the query; `truth`, the one that the union gives it, with
        the heads' `iou` and the `bins` of each edge (the left one and both weights); `losses`, what the query adds to
        each weighted term of `criterion`: the sums over all queries are the losses of the page.
    """
    refined, valid = output.refined, output.queries.valid
    layers, count = len(refined.logits), valid.shape[1]
    matches = match(heads.logits, heads.boxes, [target], config.matcher, config.matcher.encoder_queries, valid)
    union_pairs = union(matches, count, last=layers - 1)
    matched = torch.full((layers + 2, count), -1)
    matched[matches.layer, matches.query] = matches.target
    counts = torch.tensor(
        [len(target.labels), len(union_pairs.query), int(valid.sum()) - len(union_pairs.query)], dtype=w.dtype
    )
    share = counts.clamp(min=1)
    normalisers, truth = Normalisers(share[0], share[1], share[1:], counts[1:]), Truth(target.labels, target.boxes)
    verdicts = []
    for q in range(count):
        logits, boxes, edge_logits = (x[:, :, q : q + 1] for x in refined[:3])
        alone = Refinement(logits, boxes, edge_logits, refined.initial_boxes[:, q : q + 1])
        answers, pair = Prediction(*(x[:, :, q : q + 1] for x in heads)), of_query(union_pairs, q)
        terms = supervise(alone, answers, of_query(matches, q), pair, truth, w, normalisers, config)
        losses = {name: rounded(in_time(terms[name]), 6) for name in ("vfl", "l1", "giou")}
        losses |= {"fgl": [None, None, *rounded(terms["fgl"], 6)], "ddf": [None, None, *rounded(terms["ddf"], 6), None]}
        verdict: dict[str, Any] = {"truth": None, "iou": None, "bins": None, "losses": losses}
        verdict["matched"] = [i if i >= 0 else None for i in in_time(matched)[:, q].tolist()]
        for i in pair.target.tolist():  # one or none
            left, *weights = soft_bins(encode(refined.initial_boxes[0, q], truth.boxes[i]), w)  # (4,) each
            verdict |= {"truth": i, "iou": rounded(iou(in_time(heads.boxes)[:, 0, q], truth.boxes[i]), 4)}
            verdict["bins"] = rounded(torch.stack([left, *weights], dim=-1), 4)
        verdicts.append(verdict)
    return verdicts


def of_query(matches: Matches, query: int) -> Matches:
    """The pairs of one query of the only page, as if there were no other query."""
    mine = matches.query == query
    layer = None if matches.layer is None else matches.layer[mine]
    return Matches(layer, matches.batch[mine], torch.zeros_like(matches.query[mine]), matches.target[mine])


def rounded(x: Tensor, digits: int) -> Any:
    return x.double().numpy().round(digits).tolist()


def data_uri(page: np.ndarray) -> str:
    image, file = Image.fromarray(page), io.BytesIO()
    image.thumbnail((LONGEST, LONGEST))
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def as_html(data: dict[str, Any]) -> str:
    """The template with the data in it, escaped so that a class's name cannot end the script."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Path(__file__).with_name("explain.html").read_text(encoding="utf-8").replace("{data}", text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
