"""How long each way of running a model takes: `python tests/benchmarks/speed.py [--models NAME ...] [--threads 1 2]`.

Prints a Markdown table: GFLOPs (counted; a product and its sum are 2), latency of one page, and
throughput in batches of eight, for the model as it was trained (eager), `deploy()`, `deploy(fast=True)`, its ONNX file
in onnxruntime and OpenVINO, and the D-FINE of transformers (eager). They run in turns in one process. Ours are timed
from uint8 pixels to detections, transformers without its pre- and postprocessing. Weights are random. It needs the
extras `export` and `bench`, and a machine with nothing else to do.

The ratios are times as shares of those of transformers. Whether `deploy(fast=True)` is in bf16 depends on the CPU;
OpenVINO is told not to be, since it would round where attention reads as well.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from roofline import forward
from stopwatch import in_turns, spread
from workload import CLASSES, Case, built, made_up

from dfine import config as configs
from dfine.checkpoints import onnx_format, transformers_format
from dfine.checkpoints.onnx_format import OnnxModel
from dfine.config import Config
from dfine.inference.evaluation import answer
from dfine.structures import Batch

SHIPPED = Path(__file__).parents[2] / "configs"
NANO = [  # D-FINE-N as published
    "model.backbone.name=hgnetv2_b0",
    "model.strides=[16,32]",
    "model.hidden_dim=128",
    "model.encoder={feedforward_dim: 512, depth_mult: 0.5, expansion: 0.34}",
    "model.decoder={feedforward_dim: 512, layers: 3, points: [6, 6]}",
    "model.mean=[0,0,0]",
    "model.std=[1,1,1]",
]
CPU = torch.device("cpu")
PEER = "transformers, eager"


class Entry(NamedTuple):
    """A model of the table: its config and the size of its pages."""

    file: str = ""  # of configs/; empty: the defaults
    overrides: tuple[str, ...] = ()
    size: tuple[int, int] = (640, 640)


MODELS = {
    "quickstart": Entry("quickstart.yaml", size=(352, 256)),
    "HGNetV2-N": Entry(overrides=tuple(NANO)),
    "HGNetV2-S": Entry("student_hgnet_s.yaml"),
    "HGNetV2-M": Entry("student_hgnet_m.yaml"),
    "ConvNeXt-T": Entry(overrides=("model.backbone.name=convnext_tiny",)),
}
Run = Callable[[Batch], Any]


def settings_of(entry: Entry) -> Config:
    base = configs.load(SHIPPED / entry.file) if entry.file else Config()
    return configs.override(base, list(entry.overrides))


def ways(settings: Config, folder: Path) -> dict[str, Run]:
    """Each way of running the model as a function of a batch; exports the model into the folder."""
    from peer import DFineForObjectDetection, peer_of  # only here: it needs the extra

    queries = settings.model.decoder.queries
    eager, deployed = (built(settings, queries, CPU).eval() for _ in range(2))
    categories = [{"id": i, "name": f"class {i}"} for i in range(CLASSES)]
    file = folder / "model.onnx"
    if not file.exists():
        onnx_format.write(file, eager, settings, categories)
    if settings.model.backbone.name.startswith("hgnetv2"):  # for these it has a backbone of its own
        one_size = configs.override(settings, ["data.sizing=squash"])
        transformers_format.write(folder / "published", eager, one_size, categories)
        peer = DFineForObjectDetection.from_pretrained(folder / "published").eval()
    else:
        peer = peer_of(eager, settings).eval()
    return {
        "eager": partial(ours, eager),
        "deploy()": partial(ours, deployed.deploy()),
        "deploy(fast=True)": partial(ours, built(settings, queries, CPU).deploy(fast=True)),
        "onnxruntime": partial(ours, OnnxModel(file, "cpu")),
        "OpenVINO": in_openvino(file),
        PEER: lambda batch: peer(pixel_values=eager.normalise(batch.images, None)),
    }


def in_openvino(file: Path) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.compile_model(file, "CPU", settings)
    return lambda batch: model([batch.images.numpy(), batch.sizes.numpy(), [target.size for target in batch.targets]])


def ours(model: Any, batch: Batch) -> Any:
    return answer(model, batch.images, batch.sizes, [target.size for target in batch.targets])


@torch.inference_mode()
def milliseconds(runs: dict[str, Run], case: Case, repeats: int) -> dict[str, float]:
    """Medians of a batch."""
    batch = made_up(case, CPU)
    times = in_turns({name: partial(run, batch) for name, run in runs.items()}, CPU, repeats)
    return {name: spread(times[name])[0] for name in runs}


def rows(name: str, threads: list[int], repeats: int) -> list[str]:
    """The lines of one model, for each number of threads."""
    settings, (height, width) = settings_of(MODELS[name]), MODELS[name].size
    case = Case(1, height, width, 10, settings.model.decoder.queries)
    gflops = forward(settings, case, training=False).flops / 1e9
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number in threads:
            torch.set_num_threads(number)
            runs = ways(settings, Path(folder))
            one, eight = (
                milliseconds(runs, case, repeats),
                milliseconds(runs, case._replace(batch=8), max(3, repeats // 4)),
            )
            for way in runs:
                lines.append(
                    f"| {name}, {height}x{width} | {gflops:.0f} | {number} | {way} | {one[way]:.0f} "
                    f"| {one[way] / one[PEER]:.2f} | {8000 / eight[way]:.2f} | {eight[way] / eight[PEER]:.2f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=12, help="of one page; of eight a quarter (default: 12)")
    arguments = parser.parse_args()
    print("| model, page | GFLOPs | threads | way | ms a page | of peer | pages/s by eights | of peer |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        print("\n".join(rows(name, arguments.threads, arguments.repeats)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
