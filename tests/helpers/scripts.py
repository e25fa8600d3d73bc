"""The scripts as users start them, on a tiny model and a few pages of rectangles."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from processes import skip_where_groups_hang

import train as train_script
from dfine.checkpoints import ours

ROOT = Path(__file__).parents[2]
TINY = {
    "model": {
        "backbone": {"name": "test_resnet", "pretrained": False},
        "hidden_dim": 32,
        "encoder": {"feedforward_dim": 32, "depth_mult": 0.34, "expansion": 0.5},
        "decoder": {"layers": 2, "feedforward_dim": 32, "queries": 20},
        "denoising": {"queries": 10},
    },
    "data": {
        "batch_size": 2,
        "workers": 0,
        "short_edges": [64, 96],
        "eval_short_edge": 64,
        "max_long_edge": 128,
    },
    "train": {"epochs": 2, "warmup": 0.1, "save_every": 0, "eval_every": 0, "threads": 1},
}


def pages(
    folder: Path, count: int = 8, names: tuple[str, ...] = ("text", "figure"), empty: tuple[int, ...] = ()
) -> dict:
    """Writes grey rectangles on white as a COCO folder; returns the config's `data.train` for it."""
    random = np.random.default_rng(count)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        page = np.full((110, 90, 3), 255, np.uint8)
        for label in () if i in empty else range(len(names)):
            x, y = int(random.integers(2, 40)), 5 + 50 * label % 100
            page[y : y + 30, x : x + 40] = 60 * label
            box = {"id": len(annotations), "image_id": i, "category_id": 3 + 2 * label, "bbox": [x, y, 40, 30]}
            annotations.append(box)
        Image.fromarray(page).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 90, "height": 110})
    categories = [{"id": 3 + 2 * label, "name": name} for label, name in enumerate(names)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "pages.json").write_text(json.dumps(coco))
    return {"images": str(folder / "images"), "annotations": str(folder / "pages.json")}


def train(config: Path, run_dir: Path, *arguments: str, script: ModuleType = train_script) -> None:
    """train.py, or a script like it, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, "--config", str(config), f"run_dir={run_dir}", *arguments])
        try:
            script.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def start(script: str, *arguments: str, processes: int = 1) -> subprocess.Popen[str]:
    """A script in processes of its own."""
    line = [sys.executable]
    if processes > 1:
        skip_where_groups_hang()
        line += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    line += [str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    """Waits for a process that must succeed; what it printed."""
    printed, _ = process.communicate(timeout=150)
    assert process.returncode == 0, printed
    return printed


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested containers of tensors and values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(run_dir: Path) -> dict:
    content = ours.read(run_dir / "last.pt")
    del content["config"], content["since_evaluation"]  # the run folder and times
    return content


def evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["train"]["pages_per_second"]
    return lines
