"""How long a step takes, part by part: `python -m dfine.tools.benchmark [--json FILE] [--peer] [key=value ...]`.

Times are medians over repeats after a warm-up, with the lowest and the highest tenth. Training runs as in train.py: in
bf16 on a GPU, and with `train.bf16_cpu=true` on a CPU. Pages are noise with random boxes of random classes: only
matching asks what is on them. Without `--config` the model is the default one around a ConvNeXt-T; weights are always
random. `--peer` adds a comparison with the D-FINE of `transformers` (the extra `bench`), see `dfine.tools.peer`.
With `distill.teacher=PATH` it also says what a step of distill.py costs beside one of train.py. `--roofline` does not
time, but counts: how far from a card's limits a training step is, see `dfine.tools.roofline`.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfine import config as configs
from dfine.checkpoints.loading import load_model, load_teacher
from dfine.config import Config, ConfigError
from dfine.data.batches import train_loader
from dfine.data.sources import open_source
from dfine.data.synthetic.pages import write_folder
from dfine.losses.criterion import stack
from dfine.losses.distillation import active, memory_projection
from dfine.losses.matcher import match
from dfine.model.detector import DFine, detect
from dfine.tools.roofline import Card, account_of, card, roofline, size_of_model, step_flops
from dfine.tools.stopwatch import Stopwatch, measure, spread
from dfine.tools.workload import (
    Case,
    answers,
    built,
    distilled_loss,
    distilled_step,
    finish,
    made_up,
    step,
    total_loss,
)
from dfine.training import optim
from dfine.training.engine import autocast


def training(settings: Config, case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """A training step and its parts; matching is also timed on its own."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    optimizer = optim.optimizer(model, settings.train)
    times = measure(lambda watch: step(model, optimizer, batch, settings, watch), device, repeats)
    times["training step"] = times.pop("whole")
    output = answers(model, batch, settings)
    heads, config = stack(output.refined, output.initial, output.encoder), settings.loss.matcher

    def matching(watch: Stopwatch) -> None:
        match(heads.logits, heads.boxes, batch.targets, config, config.encoder_queries)
        watch.mark("of which matching")

    return times | {"of which matching": measure(matching, device, repeats)["whole"]}


def inference(settings: Config, case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """From pixels to detections: the model as trained, deployed, and deployed as recommended on a GPU."""
    batch = made_up(case, device)
    sizes = [target.size for target in batch.targets]
    valid = torch.tensor(sizes)  # on the CPU, as in evaluation
    plain = built(settings, case.queries, device).eval()
    forms = {"inference": plain}
    forms["inference, deploy()"] = built(settings, case.queries, device).deploy()
    forms["inference, deploy(fast=True)"] = built(settings, case.queries, device).deploy(fast=True)
    times: dict[str, list[float]] = {}
    for name, model in forms.items():

        @torch.inference_mode()
        def run(watch: Stopwatch, model: DFine = model) -> None:
            detect(model(batch.images, valid), sizes)
            watch.mark("detections")

        times[name] = measure(run, device, repeats)["whole"]
    return times


def distilled(settings: Config, case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows on a step with the teacher of `distill.teacher`, in turns with a step without it."""
    if not active(settings.distill, settings.distill.go_lsd.start_epoch):
        raise ConfigError("distill: no term has a weight, so there is nothing to measure")
    categories = load_model(settings.distill.teacher)[2]
    teacher = load_teacher(settings, "the student", categories).to(device).to(memory_format=torch.channels_last)
    model = built(settings, case.queries, device, len(categories)).train()
    batch = made_up(case, device, len(categories))
    projection = memory_projection(model, teacher).to(device)
    optimizer = optim.optimizer(model, settings.train, projection)

    def both(watch: Stopwatch) -> None:
        distilled_step(model, teacher, projection, optimizer, batch, settings, watch)
        step(model, optimizer, batch, settings, watch)

    times = measure(both, device, repeats)
    asked = times["of which the teacher's forward pass"]
    whole = [teachers + rest for teachers, rest in zip(asked, times["rest"], strict=True)]
    plain = [everything - distilled for everything, distilled in zip(times["whole"], whole, strict=True)]
    ratios = [with_teacher / without for with_teacher, without in zip(whole, plain, strict=True)]
    rows = [row("distillation step", "ms", whole), row("of which the teacher's forward pass", "ms", asked)]
    rows.append(row("distillation step, in training steps", "x", ratios))
    loss = partial(distilled_loss, model, teacher, projection, batch, settings, Stopwatch(device))
    return [*rows, row(f"memory of a distillation step, {kind(device)}", "MiB", [memory(model, loss, settings)])]


def memory(model: DFine, loss_of: Callable[[], Tensor], settings: Config) -> float:
    """MiB of a training step: on a GPU its peak, on a CPU what the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    if model.mean.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        optimizer = optim.optimizer(model, settings.train)
        for _ in range(2):  # the optimizer's state comes with the first step
            loss_of().backward()
            finish(model, optimizer, settings.train.clip)
        return torch.cuda.max_memory_allocated() / 2**20
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loss_of()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    del loss  # until here nothing that was kept could be freed, so that no address comes twice
    return sum(size for address, size in kept.items() if address not in weights) / 2**20


def matmul_rate(device: torch.device, precision: torch.autocast) -> float:
    """FLOPs a second of a large matrix product: what this chip can do, whatever its data sheet says."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device)
    with precision:
        a = a @ a  # now of the type in which a training step multiplies

    def multiply(watch: Stopwatch) -> None:
        a @ a
        watch.mark("matmul")

    return 2 * size**3 / (1e-3 * statistics.median(measure(multiply, device, 10)["matmul"]))


def data_loading(settings: Config, case: Case, repeats: int) -> dict[str, list[float]]:
    """Reading, resizing, augmenting and padding a batch in one process, from a folder of drawn pages (PNG)."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        write_folder(pages, seed=0, pages=2 * case.batch)
        overrides = [
            f"data.train.images={pages / 'images'}",
            f"data.train.annotations={pages / 'annotations.json'}",
            f"data.batch_size={case.batch}",
            f"data.short_edges=[{min(case.height, case.width)}]",
            f"data.max_long_edge={max(case.height, case.width, settings.data.eval_short_edge)}",
            "data.workers=0",
        ]
        loading = configs.override(settings, overrides)
        loader, sampler = train_loader(open_source(loading.data.train, "data.train"), loading)
        epoch = iter(range(10**9))

        def load(watch: Stopwatch) -> None:
            sampler.set_position(next(epoch), 0)
            next(iter(loader))
            watch.mark("data loading, one process")

        times = measure(load, torch.device("cpu"), repeats)
    times.pop("whole")
    return times


def profile(settings: Config, case: Case, device: torch.device, repeats: int, rate: float) -> list[dict[str, Any]]:
    """One row for each part of a case; `rate` is the chip's, in FLOPs a second."""
    times = data_loading(settings, case, repeats)
    times |= training(settings, case, device, repeats)
    times |= inference(settings, case, device, repeats)
    rows = [row(part, "ms", spans) for part, spans in times.items()]
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    kept = memory(model, lambda: total_loss(model, answers(model, batch, settings), batch, settings), settings)
    rows.append(row(f"memory of a training step, {kind(device)}", "MiB", [kept]))
    seconds = 1e-3 * spread(times["training step"])[0]
    share = 100 * step_flops(settings, case) / seconds / rate
    rows.append(row(f"training step, of {rate / 1e12:.2f} measured TFLOP/s", "%", [share]))
    if settings.distill.teacher:
        rows += distilled(settings, case, device, repeats)
    return [{**case._asdict(), **part} for part in rows]


def row(part: str, unit: str, values: list[float]) -> dict[str, Any]:
    """Median and tenths of what was measured."""
    median, low, high = spread(values)
    return {"part": part, "unit": unit, "median": median, "low": low, "high": high}


def kind(device: torch.device) -> str:
    """What `memory` measures."""
    return "peak" if device.type == "cuda" else "kept for the backward pass"


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    if report["models"]:
        lines += ["| model | parameters, M | GFLOPs a page |", "|---|---|---|"]
        lines += [f"| {m['model']} | {m['parameters_M']:.1f} | {m['gflops']:.0f} |" for m in report["models"]] + [""]
    for case, rows in groupby(report["parts"], case_of):
        lines += [f"| {case} | median | tenths |", "|---|---|---|"]
        for row in rows:
            digits = ".2f" if row["unit"] == "x" else ".1f"
            tenths = f"{row['low']:{digits}} to {row['high']:{digits}}"
            lines.append(f"| {row['part']} | {row['median']:{digits}} {row['unit']} | {tenths} |")
        lines.append("")
    for case, rows in groupby(report["peer"], case_of):
        lines += [f"| {case} | ours, ms | theirs, ms | ratio | tenths |", "|---|---|---|---|---|"]
        for row in rows:
            times = f"{row['ours']:.0f} | {row['theirs']:.0f} | {row['ratio']:.2f}"
            lines.append(f"| {row['what']} | {times} | {row['low']:.2f} to {row['high']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def accounts(settings: Config, cases: list[Case], device: torch.device, card: Card, repeats: int) -> str:
    """The roofline of each case as Markdown; where there is a GPU, with the share of its rates that is reached."""
    tables = []
    for case in cases:
        times = training(settings, case, device, repeats) if device.type == "cuda" else {}
        medians = {part: spread(spans)[0] for part, spans in times.items()}
        tables.append(f"{case}\n\n{account_of(roofline(settings, case, device, card), medians)}\n")
    return "\n".join(tables)


def case_of(row: dict[str, Any]) -> Case:
    return Case(*(row[field] for field in Case._fields))


def size(text: str) -> tuple[int, int]:
    """`640x480` -> (640, 480)."""
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) and int(side) % 32 == 0 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of 32, such as 640x480")
    return int(sides[0]), int(sides[1])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a YAML file of configs/, whose model is measured")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="configs whose models' sizes are shown")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--peer", action="store_true", help="compare with transformers as well")
    parser.add_argument("--roofline", action="store_true", help="count FLOPs, bytes and launches instead of timing")
    parser.add_argument(
        "--card", type=card, default="h100", help="its roofline; or TFLOP/s,TFLOP/s,GB/s (default: h100)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="pages a batch (default: 2)")
    parser.add_argument("--size", type=size, nargs="+", default=[(640, 480)], metavar="HxW", help="default: 640x480")
    parser.add_argument("--boxes", type=int, nargs="+", default=[40], help="boxes a page (default: 40)")
    parser.add_argument("--queries", type=int, nargs="+", default=[300], help="default: 300")
    parser.add_argument("--repeats", type=int, default=10, help="default: 10")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.threads=1")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parsed()
    settings = configs.load(arguments.config) if arguments.config else Config()
    base = [] if arguments.config else ["model.backbone.name=convnext_tiny"]
    settings = configs.override(settings, [*base, *arguments.overrides])
    teacher = settings.distill.teacher
    if teacher and not Path(teacher).exists():  # the students' configs name one that has to be trained first
        print(f"distill.teacher: no {teacher}, so distillation is not measured", file=sys.stderr)
        settings = configs.override(settings, ["distill.teacher="])
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    if arguments.peer:
        from dfine.tools.peer import against_peer  # only here: it needs the extra
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [
        Case(batch, height, width, boxes, queries)
        for batch, (height, width), boxes, queries in product(
            arguments.batch, arguments.size, arguments.boxes, arguments.queries
        )
    ]
    if arguments.roofline:
        print(accounts(settings, cases, device, arguments.card, arguments.repeats))
        return
    report: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, no GPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        },
        "models": [
            {"model": path.stem, **size_of_model(configs.load(path), *arguments.size[0])} for path in arguments.models
        ],
        "parts": [],
        "peer": [],
    }
    rate = matmul_rate(device, autocast(device, settings.train))
    for case in cases:
        report["parts"] += profile(settings, case, device, arguments.repeats, rate)
        if arguments.peer:
            report["peer"] += against_peer(settings, case, device, arguments.repeats)
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
