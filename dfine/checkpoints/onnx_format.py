"""ONNX files: a model that runs without this project, and without torch. Needs the extra `export`.

    in   images     (B, 3, H, W) uint8 RGB; H and W are multiples of the last stride, padding is right and below
         sizes      (B, 2) int64: valid height, width of each page on that canvas
         originals  (B, 2) int64: height, width that boxes are wanted in, such as those of the scans
    out  scores     (B, K) from 0 to 1, the best first; K is 300 unless queries times classes are fewer
         labels     (B, K) int64, indices into `categories`
         boxes      (B, K, 4) xyxy in pixels of `originals`, clipped to the page

One file takes any number of pages and any canvas. Only pages that need the same canvas should go into one call: on a
larger canvas convolutions read more padding, and scores change a little. The metadata of a file are texts:

    categories     JSON list: `id` and `name` of each class, in the order of the labels
    preprocessing  JSON: how a scan becomes a page of `images` (see `preprocessing`)
    config         JSON: the run's config, for `evaluate.py`
    dfine_version  of the project that wrote it
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim

from dfine import config as configs
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config
from dfine.model.detector import DFine, by_canvas, ranked
from dfine.structures import Detections

OPSET = 20  # the first with Gelu; onnxruntime from 1.17 on
INSTALL = "ONNX needs the extra `export`: pip install 'dfine[export]'"
HALF_FROM = 1024  # elements: smaller tensors, such as biases, weigh nothing


class Exported(nn.Module):
    """A deployed model and `detect` as one function of tensors."""

    def __init__(self, model: DFine) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor, originals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores, labels, boxes = ranked(self.model(images, sizes), top=300)
        return scores, labels, boxes * originals.flip(-1).repeat(1, 2).to(boxes.dtype)[:, None]


def write(path: Path, model: DFine, config: Config, categories: list[dict[str, Any]], half: bool = False) -> None:
    """Writes a model, which stays as it is, as one ONNX file.

    Args:
        half: weights in half precision, which makes half the file; the runtime computes in single precision.
    Raises:
        CheckpointError: the extra is not installed, or the file cannot be written.
    """
    try:
        import onnxscript  # noqa: F401  # torch needs it, and would say so in its own way
    except ImportError as error:
        raise CheckpointError(INSTALL) from error
    deployed, stride = copy.deepcopy(model).cpu().deploy(), model.strides[-1]
    fix_padding(deployed)
    pages = torch.tensor([[3 * stride - 1, 4 * stride], [3 * stride, 4 * stride - 1]])  # any: all sizes are symbols
    images = torch.zeros(2, 3, 3 * stride, 4 * stride, dtype=torch.uint8)
    batch, rows, columns = Dim("batch"), Dim("rows"), Dim("columns")
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Exported(deployed),
            (images, pages, pages.clone()),  # of one tensor twice the trace would make one input
            input_names=["images", "sizes", "originals"],
            output_names=["scores", "labels", "boxes"],
            dynamic_shapes=({0: batch, 2: stride * rows, 3: stride * columns}, {0: batch}, {0: batch}),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph: Any = program.model.graph
    for part in (graph, *graph.all_nodes()):
        part.metadata_props.clear()  # where in the source each node came from, folders of this machine included
    settings = configs.to_dict(config)
    del settings["distill"]
    program.model.metadata_props.update(
        categories=json.dumps(categories),
        preprocessing=json.dumps(preprocessing(config, stride)),
        config=json.dumps(settings),
        dfine_version=metadata.version("dfine"),
    )
    if half:
        store_in_half(program.model.graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.writing")
    try:
        program.save(beside, external_data=False)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot save ({error})") from error


def fix_padding(model: nn.Module) -> None:
    """Replaces TensorFlow's padding, which depends on a map's size, by what it comes to on pages of whole strides.

    There every map divides by the stride of its convolution. Without this torch derives formulas for the sizes of maps
    for more than ten minutes.
    """
    for name, conv in [*model.named_modules()]:
        if isinstance(conv, Conv2dSame):
            needed = [d * (k - 1) + 1 - s for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)]
            high, wide = (max(0, pixels) for pixels in needed)
            conv.__class__ = nn.Conv2d  # type: ignore[assignment]
            pad = nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2))
            model.set_submodule(name, nn.Sequential(pad, conv))


def preprocessing(config: Config, stride: int) -> dict[str, Any]:
    """How a scan becomes a page of `images`, for programs and people."""
    data = config.data
    said: dict[str, Any] = {"colour": "RGB, uint8; normalised inside"}
    said |= {"sizing": data.sizing, "short_edge": data.eval_short_edge}
    if data.sizing == "keep_aspect":
        how = "area averaging where the height shrinks, else bilinear (OpenCV's INTER_AREA, INTER_LINEAR)"
        said |= {"max_long_edge": data.max_long_edge, "interpolation": how}
    else:
        said |= {"height_by_width": data.squash_aspect, "interpolation": "bilinear with antialiasing (Pillow)"}
    return said | {"multiple_of": stride, "padding": "0, right and below"}


def store_in_half(graph: Any) -> None:
    """Makes every large fp32 weight fp16, followed by a cast, which runtimes compute when they load the file."""
    import onnx_ir

    for weight in [*graph.initializers.values()]:
        if weight.dtype != onnx_ir.DataType.FLOAT or weight.const_value.size < HALF_FROM:
            continue
        stored = onnx_ir.Value(
            name=f"{weight.name}_half",
            shape=weight.shape,
            type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT16),
            const_value=onnx_ir.tensor(weight.const_value.numpy().astype(np.float16)),
        )
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT.value})
        weight.replace_all_uses_with(cast.outputs[0])
        graph.initializers.pop(weight.name)
        graph.initializers.add(stored)
        graph.insert_before(graph[0], cast)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporters' log and warnings."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class OnnxModel:
    """An ONNX file of ours as a function from a batch of pages to detections.

    Attributes:
        strides: of the model. config: of the run. categories: `id` and `name` of each class.
    """

    def __init__(self, path: str | Path, device: str | torch.device | None = None) -> None:
        """
        Args:
            device: None: a GPU if onnxruntime can use one; "cpu" or "cuda".
        Raises:
            CheckpointError: not an ONNX file of this project, the extra is not installed, or no such device.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise CheckpointError(f"{path}: {INSTALL}") from error
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such file")
        wanted = None if device is None else torch.device(device)
        usable = onnxruntime.get_available_providers()
        if wanted is not None and wanted.type != "cpu" and "CUDAExecutionProvider" not in usable:
            raise CheckpointError(f"{path}: onnxruntime cannot use {device} here: install onnxruntime-gpu, or take cpu")
        providers: list[Any] = ["CPUExecutionProvider"]
        if "CUDAExecutionProvider" in usable and (wanted is None or wanted.type == "cuda"):
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": (wanted and wanted.index) or 0}))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others read and draw pages meanwhile
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime has a class of its own for each of its codes
            raise CheckpointError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from error
        texts = self.session.get_modelmeta().custom_metadata_map
        missing = {"config", "categories"} - texts.keys()
        if missing:
            raise CheckpointError(f"{path}: not an ONNX file of this project: lacks {', '.join(sorted(missing))}")
        self.config = configs.from_dict(json.loads(texts["config"]))
        self.categories: list[dict[str, Any]] = json.loads(texts["categories"])
        self.strides = self.config.model.strides

    def __call__(self, images: Tensor, sizes: Tensor, originals: list[tuple[int, int]]) -> list[Detections]:
        """What `detect` gives for a `DFine`; pages that need different canvases go through the file separately.

        Args:
            images: (B, 3, H, W) uint8. sizes: (B, 2) valid height, width.
            originals: height, width of each page in the pixels that boxes are wanted in.
        """
        found: dict[int, Detections] = {}
        for (height, width), pages in by_canvas(sizes, self.strides[-1]).items():
            feed = {
                "images": images[pages, :, :height, :width].numpy(),
                "sizes": sizes[pages].numpy(),
                "originals": np.array([originals[page] for page in pages]),
            }
            answers = [torch.from_numpy(answer) for answer in self.session.run(["scores", "labels", "boxes"], feed)]
            for page, (scores, labels, boxes) in zip(pages, zip(*answers, strict=True), strict=True):
                k = int((scores != 0).sum())  # as in `detect`
                found[page] = Detections(scores[:k], labels[:k], boxes[:k])
        return [found[page] for page in range(len(originals))]


def is_onnx(name: str | Path) -> bool:
    """Whether a checkpoint's name is that of an ONNX file."""
    return Path(name).suffix.lower() == ".onnx"
