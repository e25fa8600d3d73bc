"""Runs with a teacher: what is saved is a plain detector, and nothing that train.py promises is lost."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import ends, launch
from scripts import TINY, pages, same, state, train
from tiny import shaken
from torch import nn

import distill as distill_script
import evaluate as evaluate_script
from dfine import predict
from dfine.checkpoints import ours
from dfine.config import ConfigError, from_dict
from dfine.model.detector import DFine
from dfine.training.run import Run

CATEGORIES = [{"id": 3, "name": "text"}, {"id": 5, "name": "figure"}]
# Every term; of two epochs, the loss changes on the way.
EVERYTHING = ["distill.denoising=1", "distill.cells.boxes=5", "distill.memory.weight=2"]
EVERYTHING += ["distill.go_lsd.start_epoch=1", "distill.memory.end_epoch=1"]


def write_teacher(path: Path, names: tuple[str, ...] = ("text", "figure"), **decoder: object) -> Path:
    """Wider than the students, with more layers and fewer bins and queries; knows nothing, but has opinions."""
    model = TINY["model"] | {"hidden_dim": 64, "decoder": {"layers": 3, "queries": 15, "bins": 16} | decoder}
    settings = from_dict({"model": model})
    torch.manual_seed(0)
    categories = [{"id": label, "name": name} for label, name in enumerate(names)]
    teacher = shaken(DFine(settings.model, len(names)), 0.02)
    ours.save(path, ours.weights(settings, categories, teacher))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pages, one of them empty, a teacher, and the students' config; `plain.yaml` names no teacher."""
    folder = tmp_path_factory.mktemp("distill")
    own = pages(folder / "pages", empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (folder / "plain.yaml").write_text(yaml.safe_dump(tree))
    tree["distill"] = {"teacher": str(write_teacher(folder / "teacher.pt"))}
    (folder / "student.yaml").write_text(yaml.safe_dump(tree))
    return folder


def distill(folder: Path, run_dir: Path, *arguments: str) -> None:
    train(folder / "student.yaml", run_dir, *arguments, script=distill_script)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    distill(folder, folder / "uninterrupted", *EVERYTHING)
    return folder / "uninterrupted"


def terms(run_dir: Path) -> list[set[str]]:
    """The distilled terms of each epoch."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name for name in line["train"] if name.startswith("distill")} for line in lines]


def test_the_student_is_a_plain_detector(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """It answers where its teacher never was, and nothing in its files tells of one."""
    for name in ("best.pt", "last.pt"):
        content = ours.read(uninterrupted / name)
        settings = from_dict(content["config"])
        assert content["ema"].keys() == DFine(settings.model, 2).state_dict().keys()
        assert ("auxiliary" in content) == (name == "last.pt")  # the projection of the memory
        assert "distill" not in content["config"]
        assert "teacher" not in repr(content["config"])
    (tmp_path / "best.pt").write_bytes((uninterrupted / "best.pt").read_bytes())
    hidden = (folder / "teacher.pt").rename(folder / "hidden.pt")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", str(tmp_path / "best.pt")])
            evaluate_script.main()
            page = str(folder / "pages" / "images" / "0.png")
            patch.setattr(sys, "argv", ["predict", "--checkpoint", str(tmp_path / "best.pt"), page])
            patch.setattr(sys, "argv", [*sys.argv, "--out", str(tmp_path / "found"), "--threshold", "0"])
            assert predict.main() == 0
    finally:
        hidden.rename(folder / "teacher.pt")
    assert "AP" in json.loads((tmp_path / "best.metrics.json").read_text())
    assert json.loads((tmp_path / "found" / "predictions.json").read_text())[0]["detections"]


def test_terms_come_and_go_with_their_epochs_and_every_one_is_logged(uninterrupted: Path) -> None:
    first, second = terms(uninterrupted)
    always = {"distill_class", "distill_box", "distill_cell_class", "distill_cell_box"}
    always |= {"distill_class_denoising", "distill_box_denoising"}
    assert first == always | {"distill_memory"}
    assert second == always | {"distill_go_lsd", "distill_go_lsd_denoising"}


def test_the_projection_of_the_memory_learns_and_is_saved_with_its_optimizer_state(uninterrupted: Path) -> None:
    content = state(uninterrupted)
    assert {name: tuple(x.shape) for name, x in content["auxiliary"].items()} == {"weight": (64, 32), "bias": (64,)}
    shapes = [tuple(moments["exp_avg"].shape) for moments in content["optimizer"]["state"].values()]
    assert (64, 32) in shapes


def test_a_run_stopped_in_mid_epoch_and_resumed_equals_the_uninterrupted_one(
    folder: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    distill(folder, tmp_path / "run", *EVERYTHING, "train.max_steps=3")
    distill(folder, tmp_path / "run", *EVERYTHING, "--resume")
    assert same(state(tmp_path / "run"), state(uninterrupted))


def test_a_run_neither_loses_nor_gains_its_projection(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    content = ours.read(uninterrupted / "last.pt")
    for auxiliary, weight in ((content["auxiliary"], 0), ({}, 2)):
        ours.save(tmp_path / "run" / "last.pt", content | {"auxiliary": auxiliary})
        with pytest.raises(ConfigError, match=r"last\.pt: distill\.memory: .* does not fit at bias, weight"):
            distill(folder, tmp_path / "run", *EVERYTHING, "--resume", f"distill.memory.weight={weight}")


def test_a_run_goes_on_with_fewer_terms_and_the_means_are_over_the_steps_that_had_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Run.step_done

    def step_done(run: Run, values: dict[str, float]) -> None:
        run.stop.told = run.step == 1
        whole(run, values)

    monkeypatch.setattr(Run, "step_done", step_done)
    distill(folder, tmp_path / "run")
    assert state(tmp_path / "run")["step"] == 2
    before = [step["distill_go_lsd"] for step in ours.read(tmp_path / "run" / "last.pt")["since_evaluation"]]
    distill(folder, tmp_path / "run", "--resume", "distill.go_lsd.weight=0", "train.max_steps=4")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {"distill_class", "distill_box", "distill_go_lsd"} < line["train"].keys()
    assert line["train"]["distill_go_lsd"] == pytest.approx(sum(before) / 2)


def test_without_alpha_the_teacher_is_not_asked_and_the_student_learns_as_if_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights to the last bit, and with them the same start, pages and noise: what an ablation compares."""
    train(folder / "plain.yaml", tmp_path / "plain", "train.max_steps=4")
    load_teacher = distill_script.load_teacher
    monkeypatch.setattr(distill_script, "load_teacher", lambda *arguments: silent(load_teacher(*arguments)))
    distill(folder, tmp_path / "alone", "train.max_steps=4", "distill.alpha=0")
    assert same(state(tmp_path / "alone"), state(tmp_path / "plain"))


def silent(teacher: nn.Module) -> nn.Module:
    """A teacher that must not be asked."""

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher was asked")

    teacher.register_forward_pre_hook(refuse)
    return teacher


def test_the_teacher_stays_as_it_is_and_beta_weighs_the_truth(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers, load_teacher = [], distill_script.load_teacher

    def loaded(*arguments: Any) -> nn.Module:
        teachers.append(load_teacher(*arguments))
        teachers.append(copy.deepcopy(teachers[0]))
        return teachers[0]

    monkeypatch.setattr(distill_script, "load_teacher", loaded)
    distill(folder, tmp_path / "run", "train.max_steps=2", "distill.beta=0")
    teacher, before = teachers
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert same(dict(teacher.state_dict()), dict(before.state_dict()))
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["train"]
    assert logged["vfl"] == logged["l1_denoising"] == 0
    assert logged["loss"] == pytest.approx(
        sum(logged[f"distill_{term}"] for term in ("class", "box", "go_lsd", "cell_class", "memory"))
    )


def test_pages_without_boxes_are_taught_by_the_teacher_alone(folder: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=2, empty=(0, 1))
    data = [f"data.train.{key}={value}" for key, value in own.items()]
    distill(folder, tmp_path / "run", "train.max_steps=1", *data)
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["train"]
    assert logged["vfl"] == logged["vfl_encoder"] == logged["ddf"] == 0
    assert logged["distill_class"] > 0
    assert logged["distill_cell_class"] > 0


@pytest.mark.parametrize("shared", [0, 1])
def test_a_run_says_when_distillation_ends_and_pages_without_boxes_teach_nothing_any_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: int
) -> None:
    own = pages(tmp_path / "pages", count=3, empty=(0, 1))
    data = [f"data.train.{key}={value}" for key, value in own.items()]
    data += ["distill.memory.end_epoch=.01", "distill.cells.end_epoch=.02", f"distill.shared={shared}"]
    distill(folder, tmp_path / "run", "train.max_steps=1", *data)
    said = "distillation ends after epoch 0.02: 2 pages without boxes teach nothing from then on\n"
    assert (said in capsys.readouterr().out) == (shared == 0)


def test_a_non_finite_term_stops_with_its_name_and_the_images_and_keeps_the_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    distill(folder, tmp_path / "run", "train.max_steps=1")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(FloatingPointError, match=r"step 1: not finite: .*distill_go_lsd.*image ids \["):
        distill(folder, tmp_path / "run", "--resume", "distill.go_lsd.weight=1e300")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_two_processes_go_on_together_when_the_pages_of_one_are_all_empty(folder: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", count=2, empty=(0,))
    tree = yaml.safe_load((folder / "student.yaml").read_text())
    tree["data"] |= {"train": own, "val": own, "batch_size": 1}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(tree))
    assert ends(launch(distill, tmp_path, tmp_path / "run", *EVERYTHING)) == [0, 0]
    assert state(tmp_path / "run")["step"] == 2


def test_denoising_queries_are_for_teachers_and_students_that_were_trained_with_them(
    folder: Path, tmp_path: Path
) -> None:
    content = ours.read(folder / "teacher.pt")
    content["config"]["model"]["denoising"]["queries"] = 0
    ours.save(tmp_path / "teacher.pt", content)
    own = ["distill.denoising=1", f"distill.teacher={tmp_path / 'teacher.pt'}"]
    with pytest.raises(ConfigError, match=r"distill\.denoising: .*teacher\.pt was trained without denoising queries"):
        distill(folder, tmp_path / "run", *own)
    with pytest.raises(ConfigError, match=r"distill\.denoising: must be 0 where model\.denoising\.queries is 0"):
        distill(folder, tmp_path / "run", "distill.denoising=1", "model.denoising.queries=0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_teachers_that_do_not_fit_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, resume: list[str]
) -> None:
    def refused(teacher: str) -> str:
        with pytest.raises(ConfigError) as error:
            distill(folder, tmp_path / "run", f"distill.teacher={teacher}", *resume)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    student = str(folder / "student.yaml")
    assert refused("") == (f"{student}: distill.teacher: name a checkpoint (to train without a teacher, use train.py)")
    other = str(write_teacher(tmp_path / "other.pt", names=("figure", "table")))
    assert refused(other) == (
        f"distill.teacher: {other} knows the classes figure, table; {folder / 'pages' / 'pages.json'} (data.train of "
        f"{student}) has text, figure: the teacher must know them all"
    )
    content = ours.read(folder / "teacher.pt")
    content["config"]["model"] |= {"strides": [16, 32]}
    content["config"]["model"]["decoder"] |= {"points": [3, 6]}
    model = DFine(from_dict(content["config"]).model, 2)
    ours.save(tmp_path / "coarse.pt", content | {"ema": model.state_dict()})
    message = refused(str(tmp_path / "coarse.pt"))
    assert message.startswith(f"distill.teacher: {tmp_path / 'coarse.pt'} has the strides [16, 32], the student of")
    assert f"{student} has [8, 16, 32]" in message


def test_a_missing_teacher_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ours.CheckpointError, match=r"nowhere\.pt: no such checkpoint"):
        distill(folder, tmp_path / "run", "distill.teacher=nowhere.pt")


@pytest.mark.parametrize("override", ["distill.teacher=teacher.pt", "distill.go_lsd.weight=0"])
def test_training_alone_does_not_overlook_a_distill_section(folder: Path, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"plain\.yaml: distill: train\.py knows no teacher"):
        train(folder / "plain.yaml", tmp_path / "run", override)


def test_the_weights_in_the_package_teach(folder: Path, tmp_path: Path) -> None:
    own = pages(tmp_path / "pages", names=("Text", "Picture"))
    PAGES = [f"data.{part}.{key}={own[key]}" for part in ("train", "val") for key in ("images", "annotations")]
    distill(folder, tmp_path / "run", *PAGES, "distill.teacher=embedded", "train.epochs=1")
    assert "distill_cell_class" in terms(tmp_path / "run")[0]
