"""A run as users start it: what it writes, and that nothing is lost or hidden when it is interrupted."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from processes import ends, launch
from scripts import ROOT, TINY, evaluations, finish, pages, same, start, state, train
from timm.utils import ModelEmaV3
from torch import nn

import evaluate as evaluate_script
import train as train_script
from dfine.checkpoints import ours
from dfine.config import TrainConfig
from dfine.training import engine, optim
from dfine.training.run import Run


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
    model, _, categories = ours.load_model(uninterrupted / "best.pt")
    assert [category["id"] for category in categories] == [3, 5]
    assert not model.training


def test_the_bar_shows_ap_once_it_is_known_and_the_end_of_a_run_says_what_to_do_next(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my run"
    train(config, run, "train.max_steps=4")
    printed = capsys.readouterr()
    assert "AP=" not in printed.err
    train(config, run, "--resume")
    assert "AP=0." in capsys.readouterr().err
    last = printed.out[printed.out.index("what next") :]
    assert f"evaluate.py --checkpoint '{run / 'best.pt'}'\n" in last
    assert f"dfine.predict --checkpoint '{run / 'best.pt'}'" in last
    assert f"tensorboard --logdir '{run}'\n" in last


def test_the_same_seed_trains_the_same_weights_whatever_the_workers(
    config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "run", "data.workers=2")
    assert same(state(tmp_path / "run"), state(uninterrupted))


def test_another_seed_trains_other_weights(config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "run", "train.seed=1")
    assert not same(state(tmp_path / "run")["model"], state(uninterrupted)["model"])


def test_torchrun_trains_and_evaluates_every_page_once_although_pages_do_not_divide(tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=7, empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "run"
    assert "AP50" in finish(start("train.py", "--config", str(tmp_path / "tiny.yaml"), f"run_dir={run}", processes=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(run / "last.pt")])
        evaluate_script.main()
    metrics = json.loads((run / "last.metrics.json").read_text())
    last = evaluations(run)[-1]
    assert {key: last[key] for key in metrics} == metrics  # of one process
    assert len({d["image_id"] for d in json.loads((run / "last.detections.json").read_text())}) == 7


def test_a_process_whose_pages_are_all_empty_does_not_hang_the_other(config: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=2, empty=(0,))
    data = [f"data.train.{key}={value}" for key, value in own.items()]
    assert ends(launch(train, config, tmp_path / "run", *data, "data.batch_size=1", "train.epochs=3")) == [0, 0]
    assert state(tmp_path / "run")["step"] == 3


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


def test_a_mistake_ends_in_one_line(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), f"run_dir={tmp_path}", "train.epohs=3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert stopped.value.code == f"error: {config}: unknown key train.epohs, did you mean epochs?"


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
    before, after = ours.read(uninterrupted / "best.pt")["ema"], state(tmp_path / "run")["model"]
    moved = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)  # it was frozen in this step


# A step on a model of three weights, whose gradients can be told in advance


class Three(nn.Module):
    """Its output is the sum of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1, bias=False)
        self.decoder, self.classes = SimpleNamespace(w=None), 2

    def forward(self, *_: object) -> torch.Tensor:
        return torch.stack([weight.sum() for weight in self.parameters()]).sum()


class Steps(NamedTuple):
    """What was seen before each optimizer step, and what was logged of it."""

    gradients: list[list[float | None]]
    rates: list[list[float]]
    training: list[tuple[bool, bool]]  # the model, its backbone
    averaged: list[float]  # with which decay
    values: list[dict[str, float]]


@pytest.fixture
def steps(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    def take(losses: list[float], *arguments: str) -> Steps:
        """Trains on batches with these losses, a step for each unless they are accumulated."""
        model, seen, left = Three(), Steps([], [], [], [], []), iter(losses)

        def see(self: torch.optim.Optimizer) -> None:
            seen.gradients.append([None if p.grad is None else p.grad.item() for p in model.parameters()])
            seen.rates.append(sorted(group["lr"] for group in self.param_groups))
            seen.training.append((model.training, model.backbone.training))

        def losses_of(output: torch.Tensor, *_: object) -> dict[str, torch.Tensor]:
            x = next(left)
            fixed = {name: torch.zeros(()) for name in ("vfl", "l1", "giou", "fgl")}
            return {"a": x * output, "b": 2 * x * torch.ones(2), **fixed}  # b: of two layers

        whole = Run.step_done
        monkeypatch.setattr(engine, "build", lambda *_: model)
        monkeypatch.setattr(torch.optim.AdamW, "step", see)
        monkeypatch.setattr(train_script, "criterion", losses_of)
        monkeypatch.setattr(optim, "class_dependent", lambda _: [])
        monkeypatch.setattr(Run, "evaluate", lambda self: setattr(self, "evaluated", self.step))
        monkeypatch.setattr(Run, "step_done", lambda run, values: (seen.values.append(values), whole(run, values)))
        monkeypatch.setattr(ModelEmaV3, "update", lambda self, model: seen.averaged.append(self.decay))
        count = len(losses)
        train(config, tmp_path / "run", "data.batch_size=1", "train.clip=1e9", f"train.max_steps={count}", *arguments)
        return seen

    return take


def test_accumulated_batches_are_averaged(steps: Callable[..., Steps]) -> None:
    seen = steps([3.0, 5.0, 10.0], "train.accumulate=3", "train.max_steps=1")
    assert seen.gradients == [pytest.approx([6.0] * 3)]
    (values,) = seen.values
    assert values["b"] == pytest.approx(24)
    assert values["loss"] == pytest.approx(values["a"] + values["b"])


def test_gradients_are_clipped_and_what_is_logged_is_their_norm_before(steps: Callable[..., Steps]) -> None:
    seen = steps([4.0, 0.1], "train.clip=0.5")
    assert seen.values[0]["gradient_norm"] == pytest.approx(4 * 3**0.5)
    assert seen.gradients[0] == pytest.approx([0.5 / 3**0.5] * 3)
    assert seen.gradients[1] == pytest.approx([0.1] * 3)  # shorter ones are not


def test_every_step_starts_from_no_gradient_and_is_averaged(steps: Callable[..., Steps]) -> None:
    seen = steps([1.0, 1.0])
    assert seen.gradients == [pytest.approx([1.0] * 3)] * 2
    assert seen.averaged == [optim.average_decay(step, TrainConfig()) for step in range(2)]


def test_a_frozen_backbone_gets_no_gradient_and_keeps_its_statistics(steps: Callable[..., Steps]) -> None:
    seen = steps([1.0, 1.0, 1.0], "train.freeze_backbone_steps=2")
    assert seen.gradients == [[None, None, 1.0], [None, None, 1.0], [1.0] * 3]
    assert seen.training == [(True, False), (True, False), (True, True)]


def test_every_step_has_the_learning_rate_of_the_schedule(steps: Callable[..., Steps]) -> None:
    seen = steps([1.0] * 16, "train.backbone_factor=0.1", "train.warmup=0.25")
    for at in (0, 3, 7, 15):
        rate = optim.learning_rate(at, 16, TrainConfig(warmup=0.25))
        assert seen.rates[at] == pytest.approx([0.1 * rate] * 2 + [rate])  # with and without decay
        assert seen.values[at]["learning_rate"] == rate
        assert seen.values[at]["learning_rate_backbone"] == pytest.approx(0.1 * rate)


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
    size += ["model.hidden_dim=32", "model.backbone.name=test_resnet", "train.max_steps=1", "train.threads=1"]
    train(ROOT / "configs/teacher.yaml", Path("runs/teacher"), "model.backbone.pretrained=false", *size)
    assert "labels: 0 text (id 1), 1 title (id 2), 2 list (id 3), 3 table (id 4), 4 figure" in capsys.readouterr().out
    train(ROOT / "configs/teacher_doclaynet.yaml", Path("runs/teacher_doclaynet"), *size)
    printed = capsys.readouterr().out
    assert re.search(r"runs/teacher/best\.pt \(classes text, .*: loaded \d+ of \d+ tensors; start anew: ", printed)
    _, config, categories = ours.load_model("runs/teacher_doclaynet/best.pt")
    assert categories == [{"id": i, "name": name} for i, name in enumerate(DOCLAYNET, start=1)]
    before, after = (ours.read(f"runs/{run}/best.pt")["ema"] for run in ("teacher", "teacher_doclaynet"))
    assert after["selection.class_head.weight"].shape == (11, 32)
    backbone = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], after[name]) for name in backbone)  # frozen for the first 500 steps
    assert config.train.freeze_backbone_steps == 500
