"""What only a GPU can tell, in one call of at most ten minutes: `python -m dfine.tools.on_gpu --out report.json`.

Run it in a clone of this repository. Every part has a process and a time of its own, so that a crash or a slow compiler
costs that part alone; what it has measured until then stays. The report is written after each part.
"""

import argparse
import copy
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_iou

from dfine import config as configs
from dfine.checkpoints.ours import load_model
from dfine.data.batches import evaluation_loader
from dfine.data.sources import open_source
from dfine.losses.criterion import criterion
from dfine.model.denoising import freshly_noised
from dfine.model.detector import DFine, detect
from dfine.structures import Batch, Detections
from dfine.tools.benchmark import inference, matmul_rate
from dfine.tools.roofline import CARDS, step_flops
from dfine.tools.stopwatch import Stopwatch, measure
from dfine.tools.workload import Case, built, made_up, step
from dfine.training import engine, optim

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PAGE = (832, 640)  # a letter page in training and evaluation


def tell(**values: Any) -> None:
    """A line of the report."""
    print(json.dumps(values), flush=True)


def run(*arguments: str) -> str:
    """Another of our commands; what it printed. Where it fails, so does the part."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(done.stdout)
    return done.stdout


def tests(_: Path) -> None:
    tell(pytest=run("-m", "pytest", "-q", "-rf", "tests/test_cuda.py").splitlines()[-1])


def quickstart(work: Path) -> None:
    began = time.perf_counter()
    run("train.py", "--config", "configs/quickstart.yaml", f"run_dir={work / 'run'}", "train.max_steps=100")
    seconds = time.perf_counter() - began
    metrics = json.loads((work / "run/metrics.jsonl").read_text())  # a single line: one evaluation, at the end
    tell(seconds=seconds, AP=metrics["AP"], pages_per_second=metrics["train"]["pages_per_second"])


def values(work: Path) -> None:
    """The quickstart's model on eight held-out pages: losses and detections beside those of the CPU in fp32."""
    torch.backends.cudnn.allow_tf32 = False
    model, settings, _ = load_model(work / "run/last.pt")
    settings = configs.override(settings, ["data.batch_size=8", "data.workers=0"])
    batch = next(iter(evaluation_loader(open_source(settings.data.val, "data.val"), settings)))
    expected, pages = answer(model, batch, settings, CPU, half=False)
    for half in (False, True):
        losses, found = answer(model, batch, settings, GPU, half)
        off = {name: abs(losses[name] / value - 1) for name, value in expected.items()}
        worst = max(off, key=lambda name: off[name])
        tell(
            precision="bf16" if half else "fp32",
            loss_off=abs(sum(losses.values()) / sum(expected.values()) - 1),
            worst_term={worst: off[worst]},
            detections=sum(len(page.scores) for page in pages),
            detections_lost=sum(map(lost, pages, found)),
        )


def answer(
    model: DFine, batch: Batch, settings: configs.Config, device: torch.device, half: bool
) -> tuple[dict[str, float], list[Detections]]:
    """Every loss, and the 20 best detections of each page."""
    torch.manual_seed(0)
    noise = freshly_noised(batch.targets, model.classes, settings.model.denoising)  # drawn on the CPU, for both
    assert noise is not None
    noise = noise._replace(labels=noise.labels.to(device), boxes=noise.boxes.to(device))
    model, batch = copy.deepcopy(model).to(device), batch.to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        found = detect(model.eval()(batch.images, batch.sizes), [t.size for t in batch.targets], top=20)
        output = model.train()(batch.images, batch.sizes, noise)
    terms = criterion(output, batch.targets, model.decoder.w, settings.loss)
    return {k: v.sum().item() for k, v in terms.items()}, [Detections(*(x.cpu() for x in page)) for page in found]


def lost(expected: Detections, got: Detections) -> int:
    """How many have no partner of the same class, with an IoU of .9 and a score within .02."""
    same = (expected.labels[:, None] == got.labels) & ((expected.scores[:, None] - got.scores).abs() < 0.02)
    return int((~(same & (box_iou(expected.boxes, got.boxes) > 0.9)).any(1)).sum())


def steps(compiled: bool, _: Path) -> None:
    """A training step on 16 pages; what it reaches of the rate of a large matrix product (MFU)."""
    for name in ("teacher", "student_tiny"):
        settings = configs.load(f"configs/{name}.yaml", [f"train.compile={str(compiled).lower()}"])
        case = Case(16, *PAGE, boxes=40, queries=settings.model.decoder.queries)
        model, batch = built(settings, case.queries, GPU).train(), made_up(case, GPU)
        engine.parallel(model, settings.train, GPU)
        once = partial(step, model, optim.optimizer(model, settings.train), batch, settings)
        began = time.perf_counter()
        torch.cuda.reset_peak_memory_stats()
        once(Stopwatch(GPU))
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        times = {part: statistics.median(spans) for part, spans in measure(once, GPU, 10).items()}
        rate = step_flops(settings, case) / (1e-3 * times["whole"])
        tell(
            model=name,
            first_step_s=first,
            ms=times,
            tflops=rate / 1e12,
            mfu=rate / matmul_rate(GPU, engine.autocast(GPU, settings.train)),
            peak_GiB=torch.cuda.max_memory_allocated() / 2**30,
        )


def latencies(batch: int, _: Path) -> None:
    """From pixels to detections, every student: as trained, deployed, and deployed fast."""
    for path in sorted(Path("configs").glob("student_*.yaml")):
        settings = configs.load(path)
        times = inference(settings, Case(batch, *PAGE, boxes=40, queries=settings.model.decoder.queries), GPU, 20)
        tell(model=path.stem, batch=batch, ms={form: statistics.median(spans) for form, spans in times.items()})


def benchmark(work: Path) -> None:
    peer = ["--peer"] if importlib.util.find_spec("transformers") else []
    if not peer:
        tell(skipped="the comparison with transformers, which is not installed: pip install 'dfine[bench]'")
    arguments = ["--batch", "16", "--size", "832x640", "--repeats", "5", "--json", str(work / "benchmark.json")]
    run("-m", "dfine.tools.benchmark", "--config", "configs/student_tiny.yaml", *peer, *arguments)
    tell(**json.loads((work / "benchmark.json").read_text()))


def roofline(_: Path) -> None:
    """Whether the account of a step holds: its floor, and the share of it that is reached."""
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    card = next((card for card in CARDS if card in name), "h100")
    for config in ("teacher", "student_tiny"):
        arguments = ["--roofline", "--card", card, "--batch", "16", "--size", "832x640", "--repeats", "5"]
        printed = run("-m", "dfine.tools.benchmark", "--config", f"configs/{config}.yaml", *arguments)
        tell(model=config, card=card, account=printed.splitlines())


PARTS: dict[str, tuple[int, Callable[[Path], None]]] = {  # seconds each; what one leaves, the next may use
    "tests": (80, tests),
    "quickstart": (50, quickstart),
    "values": (30, values),
    "step": (50, partial(steps, False)),
    "latencies, 1 page": (110, partial(latencies, 1)),
    "latencies, 32 pages": (90, partial(latencies, 32)),
    "step, compiled": (80, partial(steps, True)),
    "roofline": (40, roofline),
    "benchmark": (50, benchmark),
}


def attempt(part: str, work: Path, seconds: float) -> dict[str, Any]:
    """A part's lines, and how it ended."""
    began = time.monotonic()
    command = [sys.executable, "-m", "dfine.tools.on_gpu", "--part", part, "--work", str(work)]
    with (work / "lines").open("w") as lines, (work / "errors").open("w") as errors:
        process = subprocess.Popen(command, stdout=lines, stderr=errors, start_new_session=True)
        try:
            status = "failed" if process.wait(seconds) else "done"
        except subprocess.TimeoutExpired:
            status = "out of time"
            os.killpg(process.pid, signal.SIGKILL)  # its own children too
            process.wait()
    told = [json.loads(line) for line in (work / "lines").read_text().splitlines() if line.startswith("{")]
    ended = {"status": status, "seconds": round(time.monotonic() - began, 1), "told": told}
    return ended if status == "done" else ended | {"errors": (work / "errors").read_text()[-4000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report.json"), help="file to write (default: report.json)")
    parser.add_argument("--minutes", type=float, default=9.8, help="in all (default: 9.8)")
    parser.add_argument("--part", choices=PARTS, help="only this part, its lines on the screen")
    parser.add_argument("--work", type=Path, default=Path("runs/on_gpu"), help="where a part finds and leaves files")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU here")
    if arguments.part:
        PARTS[arguments.part][1](arguments.work)
        return
    end = time.monotonic() + 60 * arguments.minutes
    parts: dict[str, Any] = {}
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version, "parts": parts}
    with tempfile.TemporaryDirectory() as work:
        for number, part in enumerate(PARTS):
            later = sum(seconds for seconds, _ in list(PARTS.values())[number + 1 :])
            parts[part] = attempt(part, Path(work), end - time.monotonic() - later)
            print(part, json.dumps(parts[part], indent=1), flush=True)
            arguments.out.write_text(json.dumps(report, indent=1))
    if any(part["status"] != "done" for part in parts.values()):
        sys.exit("error: not every part was done")


if __name__ == "__main__":
    main()
