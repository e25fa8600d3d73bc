"""How long a step takes, part by part: `python tests/benchmarks/benchmark.py [--peer] [--config FILE] [key=value ...]`.

Times are medians over repeats after a warm-up, with the lowest and the highest tenth. Training runs as in train.py: in
bf16 on a GPU, and with `train.bf16_cpu=true` on a CPU. Pages are noise with random boxes of random classes: only
matching asks what is on them. Without `--config` the model is the default one around a ConvNeXt-T; weights are always
random. `--peer` compares with the D-FINE of `transformers` (the extra `bench`). With `distill.teacher=PATH` a step of
distill.py is compared with one of train.py. What is compared runs in turns.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stopwatch import Stopwatch, in_turns, measure, spread
from workload import Case, built, distilled_step, made_up, size, step

from dfine import config as configs
from dfine.checkpoints.loading import load_model, load_teacher
from dfine.config import Config, ConfigError
from dfine.losses.distillation import active, memory_projection
from dfine.model.deploy import compile_parts, deploy
from dfine.model.detector import DFine, detect
from dfine.training import optim


def training(settings: Config, case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """A training step and its parts."""
    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    if settings.train.compile:
        compile_parts(model)
    optimizer = optim.optimizer(model, settings.train)
    times = measure(lambda watch: step(model, optimizer, batch, settings, watch), device, repeats)
    times["training step"] = times.pop("whole")
    return times


def inference(settings: Config, case: Case, device: torch.device, repeats: int) -> dict[str, list[float]]:
    """From pixels to detections: the model as trained, deployed, and deployed as recommended on a GPU."""
    forms = forms_of(settings, case, device)
    batch = made_up(case, device)
    sizes = [target.size for target in batch.targets]

    @torch.inference_mode()
    def run(model: DFine) -> None:
        detect(model(batch.images, batch.sizes), sizes)

    return in_turns({name: partial(run, model) for name, model in forms.items()}, device, repeats)


def forms_of(settings: Config, case: Case, device: torch.device) -> dict[str, DFine]:
    plain, deployed, fast = (built(settings, case.queries, device).eval() for _ in range(3))
    forms = {"inference": plain, "inference, deploy()": deploy(deployed)}
    return forms | {"inference, deploy(fast=True)": deploy(fast, fast=True)}


def with_teacher(settings: Config, case: Case, device: torch.device, repeats: int) -> list[str]:
    """A step of distill.py beside one of train.py."""
    if not active(settings.distill, settings.distill.go_lsd.start_epoch):
        raise ConfigError("distill: no term has a weight, so there is nothing to measure")
    categories = load_model(settings.distill.teacher)[2]
    teacher = load_teacher(settings, "the student", categories).to(device).to(memory_format=torch.channels_last)
    model = built(settings, case.queries, device, len(categories)).train()
    batch = made_up(case, device, len(categories))
    projection = memory_projection(model, teacher).to(device)
    optimizer = optim.optimizer(model, settings.train, projection)
    distilled = partial(distilled_step, model, teacher, projection, optimizer, batch, settings)
    plain = partial(step, model, optimizer, batch, settings)
    return [compared("distillation step / training step", distilled, lambda: plain(Stopwatch(device)), device, repeats)]


def with_peer(settings: Config, case: Case, device: torch.device, repeats: int) -> list[str]:
    """Ours beside transformers': a training step, and inference up to logits and boxes."""
    from peer import peer_of, step_of  # only here: it needs the extra

    model, batch = built(settings, case.queries, device).train(), made_up(case, device)
    other = peer_of(model, settings).train()
    our_step = partial(step, model, optim.optimizer(model, settings.train), batch, settings)
    their_step = step_of(other, model, batch, settings)
    lines = [
        compared("training step / transformers'", lambda: our_step(Stopwatch(device)), their_step, device, repeats)
    ]
    other.eval()
    theirs = partial(other, pixel_values=model.normalise(batch.images, None))
    with torch.inference_mode():
        for what, form in list(forms_of(settings, case, device).items())[1:]:
            lines.append(
                compared(f"{what} / transformers'", partial(form, batch.images, batch.sizes), theirs, device, repeats)
            )
    return lines


def compared(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: torch.device, repeats: int) -> str:
    """A line of the table: two in turns, the ratio of the medians, and the tenths of the turns' ratios."""
    times = in_turns({"ours": ours, "theirs": theirs}, device, repeats)
    (a, *_), (b, *_) = spread(times["ours"]), spread(times["theirs"])
    _, low, high = spread([x / y for x, y in zip(times["ours"], times["theirs"], strict=True)])
    return f"| {what} | {a:.0f} | {b:.0f} | {a / b:.2f} | {low:.2f} to {high:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a YAML file of configs/, whose model is measured")
    parser.add_argument("--peer", action="store_true", help="compare with transformers as well")
    parser.add_argument("--batch", type=int, default=2, help="pages a batch (default: 2)")
    parser.add_argument("--size", type=size, default=(640, 480), metavar="HxW", help="default: 640x480")
    parser.add_argument("--boxes", type=int, default=40, help="boxes a page (default: 40)")
    parser.add_argument("--queries", type=int, default=300, help="default: 300")
    parser.add_argument("--repeats", type=int, default=10, help="default: 10")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.threads=1")
    arguments = parser.parse_intermixed_args()
    base = [] if arguments.config else ["model.backbone.name=convnext_tiny"]
    settings = configs.load(arguments.config) if arguments.config else Config()
    settings = configs.override(settings, [*base, *arguments.overrides])
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = arguments.size
    case = Case(arguments.batch, height, width, arguments.boxes, arguments.queries)
    common = (settings, case, device, arguments.repeats)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, no GPU"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| {case} | ms | tenths |\n|---|---|---|")
    for part, spans in (training(*common) | inference(*common)).items():
        print("| {} | {:.1f} | {:.1f} to {:.1f} |".format(part, *spread(spans)), flush=True)
    if device.type == "cuda":
        print(f"\npeak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    lines = []
    teacher = settings.distill.teacher
    if teacher and not Path(teacher).exists():  # the students' configs name one that has to be trained first
        print(f"distill.teacher: no {teacher}, so distillation is not measured", file=sys.stderr)
    elif teacher:
        lines += with_teacher(*common)
    if arguments.peer:
        lines += with_peer(*common)
    if lines:
        print(
            "\n".join(
                ["", "| first / second | first, ms | second, ms | ratio | tenths |", "|---|---|---|---|---|", *lines]
            )
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
