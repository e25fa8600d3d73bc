"""A run as users start it: what it writes, and that nothing is lost or hidden when it is interrupted."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from processes import ends, launch

import evaluate as evaluate_script
import train as train_script
from dfine import checkpoint, distributed, engine, evaluation
from dfine.config import ConfigError, DataConfig, TrainConfig
from dfine.data import TrainBatches
from dfine.run import Run
from dfine.transforms import PageError

ROOT = Path(__file__).parents[1]
TINY = {
    "model": {
        "backbone": {"name": "resnet10t", "pretrained": False},
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
    "train": {"epochs": 2, "warmup": 0.1, "save_every": 1, "eval_every": 0, "threads": 1},
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


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    own = pages(folder / "pages", empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder / "tiny.yaml"


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
    content = checkpoint.read(run_dir / "last.pt")
    del content["config"], content["since_evaluation"]  # the run folder and times
    return content


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config, folder)
    return folder


def test_a_run_leaves_config_metrics_checkpoints_and_a_picture(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert {"AP", "AP50", "AR100", "AP_300", "per_class", "train"} <= lines[0].keys()
    logged = {
        "loss",
        "vfl",
        "gradient_norm",
        "learning_rate",
        "learning_rate_backbone",
        "padded_share",
        "pages_per_second",
    }
    assert logged <= lines[0]["train"].keys()
    assert sum(lines[0]["train"]["gradient_norm_histogram"]["counts"]) == 4
    assert yaml.safe_load((uninterrupted / "config.yaml").read_text())["model"]["hidden_dim"] == 32
    assert {path.name for path in uninterrupted.iterdir()} >= {"last.pt", "previous.pt", "best.pt", "pictures"}
    assert len(list((uninterrupted / "pictures").iterdir())) == 2
    model, _, categories = checkpoint.load_model(uninterrupted / "best.pt")
    assert [category["id"] for category in categories] == [3, 5]
    assert not model.training


def test_the_same_seed_trains_the_same_weights_whatever_the_workers(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "run", "data.workers=2")
    assert same(state(tmp_path / "run"), state(uninterrupted))


def test_another_seed_trains_other_weights(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", "train.seed=1")
    assert not same(state(tmp_path / "run")["model"], state(uninterrupted)["model"])


def test_a_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_one(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run", "train.max_steps=3")
    train(config, tmp_path / "run", "--resume")
    assert "resumed" in capsys.readouterr().out
    assert same(state(tmp_path / "run"), state(uninterrupted))


def test_accumulated_steps_and_muon_resume_exactly_too(config: Path, tmp_path: Path) -> None:
    own = ("train.accumulate=2", "train.muon_factor=10")
    train(config, tmp_path / "whole", *own)
    train(config, tmp_path / "parts", *own, "train.max_steps=3")
    train(config, tmp_path / "parts", *own, "--resume")
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=5")
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    train(config, run, "--resume")
    printed = capsys.readouterr().out
    assert "last.pt: truncated" in printed
    assert "at step 4" in printed
    assert same(state(run), state(uninterrupted))


# Stopped in the middle: what happens to a process is done to it from inside, so that it happens at a known step


def killed_while_saving(step: int) -> None:
    whole = torch.save

    def half(content: dict, file: BinaryIO) -> None:
        if content.get("step") == step:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(content, file)

    torch.save = half


def killed_while_evaluating() -> None:
    evaluation.coco_metrics = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def signalled_in_step(step: int, number: signal.Signals, rank: int) -> None:
    """The process and its loader's workers get the signal, as from a terminal or a job scheduler."""
    whole = engine.optimize

    def optimize(run: Run, *arguments: Any) -> dict[str, float]:
        if run.step == step - 1 and distributed.rank() == rank:
            os.killpg(os.getpgid(0), number)
        return whole(run, *arguments)

    engine.optimize = optimize


def stopped(config: Path, run: Path, own: tuple[str, ...], stop: Callable[..., None], *how: object) -> None:
    """train.py as one process that something happens to."""
    stop(*how)
    train(config, run, *own)


def evaluations(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["train"]["pages_per_second"]
    return lines


def test_wherever_two_processes_with_workers_are_stopped_they_resume_to_the_uninterrupted_run(
    config: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "parts"
    own = ("data.batch_size=1", "data.workers=1", "train.save_every=2")
    assert ends(launch(train, config, whole, *own)) == [0, 0]

    assert ends(launch(stopped, config, run, own, killed_while_saving, 4))[0] == -signal.SIGKILL
    assert state(run)["step"] == 2
    own += ("--resume",)
    assert ends(launch(stopped, config, run, own, killed_while_evaluating))[0] == -signal.SIGKILL
    assert state(run)["step"] == 4
    assert not (run / "metrics.jsonl").exists()
    assert ends(launch(stopped, config, run, own, signalled_in_step, 5, signal.SIGINT, 1)) == [0, 0]
    assert state(run)["step"] == 5
    assert ends(launch(stopped, config, run, own, signalled_in_step, 8, signal.SIGTERM, 0)) == [0, 0]
    assert [line["step"] for line in evaluations(run)] == [4]  # the one at step 8 was given up
    assert ends(launch(train, config, run, *own)) == [0, 0]
    assert same(state(run), state(whole))
    assert evaluations(run) == evaluations(whole)
    assert same(checkpoint.read(run / "best.pt")["ema"], checkpoint.read(whole / "best.pt")["ema"])


def test_a_resumed_run_has_the_weight_decay_of_its_own_config(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=1")
    train(config, run, "train.max_steps=2", "train.weight_decay=0.2", "--resume")
    assert {group["weight_decay"] for group in state(run)["optimizer"]["param_groups"]} == {0.0, 0.2}
    with pytest.raises(ConfigError, match="between AdamW and Muon"):
        train(config, run, "train.muon_factor=10", "--resume")


def test_a_killed_run_goes_on_from_the_last_saved_step(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    (process,) = launch(
        stopped, config, tmp_path, ("train.save_every=3",), signalled_in_step, 8, signal.SIGKILL, 0, count=1
    )
    assert ends([process]) == [-signal.SIGKILL]
    assert state(tmp_path)["step"] == 6
    train(config, tmp_path, "--resume")
    assert same(state(tmp_path), state(uninterrupted))
    assert evaluations(tmp_path) == evaluations(uninterrupted)


def test_a_page_that_cannot_be_read_stops_all_processes_and_loses_nothing(config: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", empty=(1,))
    order = list(TrainBatches([(110, 90)] * 8, DataConfig(batch_size=2), seed=0, accumulate=1))
    page = Path(own["images"]) / f"{order[2][1].page}.png"  # in the third step, of the second process
    page.write_bytes(page.read_bytes()[:100])
    arguments = (f"data.train.images={own['images']}", "data.batch_size=1", "data.workers=1")
    assert ends(launch(failing, tmp_path / "error", config, tmp_path / "run", *arguments)) == [0, 1]
    assert state(tmp_path / "run")["step"] == 2
    assert re.fullmatch(
        rf"{page}: cannot read the image: .*; stopped at step 2, go on with --resume .*",
        (tmp_path / "error").read_text(),
    )


def failing(error_file: Path, *arguments: Any) -> None:
    """train.py, keeping what it stops with."""
    try:
        train(*arguments)
    except PageError as error:
        error_file.write_text(str(error))
        raise


def test_torchrun_trains_and_evaluates_every_page_once_although_pages_do_not_divide(tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=7, empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    assert "AP50" in finish(start("train.py", "--config", str(tmp_path / "tiny.yaml"), f"run_dir={run}", processes=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(run / "last.pt")])
        evaluate_script.main()
    metrics = json.loads((run / "metrics.json").read_text())
    last = evaluations(run)[-1]
    assert {key: last[key] for key in metrics} == metrics  # of one process
    assert len({d["image_id"] for d in json.loads((run / "detections.json").read_text())}) == 7


def test_a_process_whose_pages_are_all_empty_does_not_hang_the_other(config: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=2, empty=(0,))
    data = [f"data.train.{key}={value}" for key, value in own.items()]
    assert ends(launch(train, config, tmp_path / "run", *data, "data.batch_size=1", "train.epochs=3")) == [0, 0]
    assert state(tmp_path / "run")["step"] == 3


def test_a_non_finite_loss_stops_with_term_step_and_images_and_keeps_the_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(config, run, "train.max_steps=2")
    before = (run / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"step 2: not finite: .*fgl.*image ids \["):
        train(config, run, "--resume", "loss.fgl=1e300")
    assert (run / "last.pt").read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    (tmp_path / "last.pt.writing").symlink_to("/dev/full")
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt: cannot save.*intact"):
        checkpoint.save(path, {"weights": torch.zeros(100_000)})
    assert checkpoint.read(path) == {"step": 1}


def test_a_run_is_not_overwritten_without_being_asked_to(config: Path, uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        train(config, uninterrupted)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("model.hiden_dim=3", "did you mean hidden_dim"),
        ("data.train.annotations=nowhere.json", r"nowhere\.json"),
        ("model.backbone.name=convnext_tinny", r"model\.backbone\.name"),
        ("model.init_from=nothing.pt", r"nothing\.pt"),
    ],
)
def test_mistakes_stop_before_anything_is_written(config: Path, tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", argument)
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_in_one_line(config: Path, tmp_path: Path) -> None:
    process = start("train.py", "--config", str(config), f"run_dir={tmp_path / 'run'}", "train.epohs=3")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.strip() == f"error: {config}: unknown key train.epohs, did you mean epochs?"


def test_other_classes_start_anew_and_the_rest_is_loaded(
    config: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = pages(tmp_path / "pages", count=4, names=("Caption", "Table", "Text"))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(tree))
    origin = f"model.init_from={uninterrupted / 'best.pt'}"
    frozen = "train.freeze_backbone_steps=1"
    train(tmp_path / "finetune.yaml", tmp_path / "run", origin, frozen, "train.max_steps=1")
    printed = capsys.readouterr().out
    assert "start anew" in printed
    assert "denoising_labels.weight" in printed
    before, after = checkpoint.read(uninterrupted / "best.pt")["ema"], state(tmp_path / "run")["model"]
    moved = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)  # it was frozen in this step


PUBLAYNET = ("text", "title", "list", "table", "figure")
DOCLAYNET = ("Caption", "Footnote", "Formula", "List-item", "Page-footer", "Page-header")
DOCLAYNET += ("Picture", "Section-header", "Table", "Text", "Title")


def publish(images: Path, annotations: Path, names: tuple[str, ...], suffix: str, size: tuple[int, int]) -> None:
    """Three pages with a box of each class, ids from 1, as PubLayNet and DocLayNet have them."""
    entries, boxes = [], []
    for i in range(1, 4):
        file = images / f"{annotations.stem}_{i}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "white").save(file)
        entries.append({"id": i, "file_name": file.name, "width": size[0], "height": size[1]})
        boxes += [
            {"id": len(boxes) + c, "image_id": i, "category_id": c, "bbox": [5.5, 7.0 * c, 30.0, 6.0], "iscrowd": 0}
            for c in range(1, len(names) + 1)
        ]
    categories = [{"supercategory": "", "id": c, "name": name} for c, name in enumerate(names, start=1)]
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": categories}))


def test_publaynet_then_doclaynet_in_their_published_layouts_by_the_shipped_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val", "test"):
        publaynet, doclaynet = tmp_path / "data/publaynet", tmp_path / "data/doclaynet"
        if split != "test":
            publish(publaynet / split, publaynet / f"{split}.json", PUBLAYNET, "jpg", (61, 79))
        publish(doclaynet / "PNG", doclaynet / "COCO" / f"{split}.json", DOCLAYNET, "png", (102, 102))
    monkeypatch.chdir(tmp_path)
    size = [f"data.{key}={value}" for key, value in TINY["data"].items()]
    size += [
        f"model.{part}.{key}={value}" for part in ("encoder", "decoder") for key, value in TINY["model"][part].items()
    ]
    size += ["model.hidden_dim=32", "model.backbone.name=resnet10t", "train.max_steps=1", "train.threads=1"]
    train(ROOT / "configs/teacher.yaml", Path("runs/teacher"), "model.backbone.pretrained=false", *size)
    assert "labels: 0 text (id 1), 1 title (id 2), 2 list (id 3), 3 table (id 4), 4 figure" in capsys.readouterr().out
    train(ROOT / "configs/teacher_doclaynet.yaml", Path("runs/teacher_doclaynet"), *size)
    printed = capsys.readouterr().out
    assert re.search(r"runs/teacher/best\.pt \(classes text, .*: loaded \d+ of \d+ tensors; start anew: ", printed)
    _, config, categories = checkpoint.load_model("runs/teacher_doclaynet/best.pt")
    assert categories == [{"id": i, "name": name} for i, name in enumerate(DOCLAYNET, start=1)]
    before, after = (checkpoint.read(f"runs/{run}/best.pt")["ema"] for run in ("teacher", "teacher_doclaynet"))
    assert after["selection.class_head.weight"].shape == (11, 32)
    backbone = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], after[name]) for name in backbone)  # frozen for the first 500 steps
    assert config.train.freeze_backbone_steps == 500


def test_the_step_seed_depends_on_seed_and_step() -> None:
    assert engine.step_seed(0, 1) == engine.step_seed(0, 1)
    assert len({engine.step_seed(seed, step) for seed in range(3) for step in range(3)}) == 9


@pytest.mark.parametrize(("instructions", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_a_cpu_trains_in_bf16_if_asked_to_and_if_it_multiplies_bf16(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instructions: True})
    one = torch.ones(1, 1)
    for asked, expected in ((True, dtype), (False, torch.float32)):
        with engine.autocast(torch.device("cpu"), TrainConfig(bf16_cpu=asked)):
            assert (one @ one).dtype == expected
