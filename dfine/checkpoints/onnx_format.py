"""ONNX files: a model that runs without this project, and without torch. Needs the extra `export`.

`python -m dfine.export --help` says what is in a file.
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
from dfine.checkpoints import ours
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError
from dfine.model.deploy import in_half
from dfine.model.detector import DFine, by_canvas, ranked
from dfine.structures import Detections

OPSET = 20  # the first with Gelu; onnxruntime from 1.17 on
INSTALL = "ONNX needs the extra `export`: pip install 'dfine[export]'"


class Exported(nn.Module):
    """A deployed model and `detect` as one function of tensors."""

    def __init__(self, model: DFine, fp16: bool) -> None:
        super().__init__()
        self.model, self.fp16 = model, fp16

    def forward(self, images: Tensor, sizes: Tensor, originals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.float16, enabled=self.fp16):
            scores, labels, boxes = ranked(self.model(images, sizes), top=300)
        return scores, labels, boxes * originals.flip(-1).repeat(1, 2).to(boxes.dtype)[:, None]


def write(path: Path, model: DFine, config: Config, categories: list[dict[str, Any]], half: bool = False) -> None:
    """Writes a model, which stays as it is, as one ONNX file.

    Args:
        half: in fp16, but for what autocast leaves in fp32: FDR, LQE, box heads, ranking, where attention reads. Half
            the file; a runtime without fp16, such as onnxruntime on a CPU, converts and computes in fp32.
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
    if half:
        in_half(deployed, torch.float16)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Exported(deployed, half),
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
    match_norms(graph)
    refuse_other_canvases(graph, stride)
    settings = configs.to_dict(config)
    del settings["distill"]
    program.model.metadata_props.update(
        categories=json.dumps(categories),
        preprocessing=json.dumps(preprocessing(config, stride)),
        config=json.dumps(settings),
        dfine_version=metadata.version("dfine"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.writing")
    try:
        program.save(beside, external_data=False)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot save ({error})") from error


def refuse_other_canvases(graph: Any, stride: int) -> None:
    """Lets a runtime fail, instead of giving other boxes, on canvases and sizes that are not as described.

    ONNX has no assertion: a Gather looks up what is wrong in a list of one number, which fails unless that is 0. Not
    in OpenVINO, which takes 0 for what a list lacks.
    """
    import onnx_ir

    images, sizes = graph.inputs[:2]
    readers, first, nodes = [*sizes.uses()], graph[0], []

    def constant(name: str, value: Any) -> Any:
        tensor = onnx_ir.tensor(np.array(value, np.int64), name=name)
        graph.initializers.add(onnx_ir.val(name, const_value=tensor))
        return graph.initializers[name]

    def node(kind: str, *inputs: Any, name: str | None = None, **attributes: int) -> Any:
        nodes.append(onnx_ir.node(kind, inputs, attributes, name=name))
        return nodes[-1].outputs[0]

    canvas = node("Shape", images, start=2)  # (2,)
    whole = onnx_ir.DataType.INT64.value
    beyond = node("Cast", node("Greater", sizes, canvas), to=whole)  # (B, 2)
    below = node("Cast", node("Less", sizes, constant("one_pixel", 1)), to=whole)
    wrong = node("Add", node("Add", beyond, below), node("Mod", canvas, constant("last_stride", stride)))
    said = f"sides of images are no multiples of {stride}, or sizes are not (height, width) within them"
    zero = node("Gather", constant("nothing_wrong", [0]), node("ReduceMax", wrong, keepdims=0), name=said)
    checked = node("Add", sizes, zero)
    for reader, index in readers:
        reader.replace_input_with(index, checked)
    graph.insert_before(first, nodes)


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


def match_norms(graph: Any) -> None:
    """Casts the weights of layer norms to the type of what they are fed, as ONNX has it; torch takes two types."""
    import onnx_ir

    for node in [*graph]:
        for i in (1, 2) if node.op_type == "LayerNormalization" else ():
            if node.inputs[i] is not None and node.inputs[i].dtype != node.inputs[0].dtype:
                cast = onnx_ir.node("Cast", [node.inputs[i]], {"to": node.inputs[0].dtype.value})
                graph.insert_before(node, cast)
                node.replace_input_with(i, cast.outputs[0])


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
        self.path, self.device = path, device
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
        try:
            said = {name: json.loads(texts[name]) for name in ("config", "categories")}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its metadata are not JSON: {error}") from error
        ours.require(path, said, {"config": dict, "categories": list})
        try:
            self.config = configs.from_dict(said["config"])
        except (ConfigError, RecursionError) as error:
            raise ConfigError(f"{path}: written by another version of dfine ({error}): use that version") from error
        self.categories: list[dict[str, Any]] = said["categories"]
        self.strides = self.config.model.strides

    def __reduce__(self) -> Any:
        return OnnxModel, (self.path, self.device)  # a session cannot be copied: a copy opens the file again

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
