"""python -m dfine.export as users start it."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from published import noise, publish_recorded
from tiny import tiny_config, tiny_model

from dfine import export
from dfine.checkpoints import ours
from dfine.checkpoints.loading import load_model
from dfine.config import Config, ConfigError
from dfine.model.detector import DFine


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DFine]:
    """best.pt of a run that started from published weights, and its model."""
    folder = tmp_path_factory.mktemp("run")
    model, config, _ = load_model(publish_recorded(folder / "published"))
    categories = [{"id": 4 + i, "name": name} for i, name in enumerate(("text", "title", "list"))]
    ours.save(folder / "best.pt", ours.weights(config, categories, model))
    return folder / "best.pt", model


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["export", *map(str, arguments)])
    export.main()


def test_a_run_becomes_a_folder_that_answers_the_same(
    run: tuple[Path, DFine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, "--checkpoint", run[0], "--format", "transformers", "--out", tmp_path / "out")
    model, _, categories = load_model(tmp_path / "out")
    assert [category["name"] for category in categories] == ["text", "title", "list"]
    pages = noise(96, 160).float()
    with torch.inference_mode():
        assert model(pages).refined.logits.equal(run[1](pages).refined.logits)


def test_pages_can_be_sized_in_another_way_than_in_the_run(
    run: tuple[Path, DFine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--checkpoint", run[0], "--format", "transformers", "--out", tmp_path / "out"]
    start(monkeypatch, *line, "data.eval_short_edge=320", "data.squash_aspect=1.5")
    assert "3 classes and pages of 480x320" in capsys.readouterr().out
    assert load_model(tmp_path / "out")[1].data.squash_aspect == 1.5
    with pytest.raises(ConfigError, match="the model is the checkpoint's; set data only"):
        start(monkeypatch, *line, "model.decoder.a=1")


def test_a_run_becomes_a_file_of_the_original(
    run: tuple[Path, DFine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, "--checkpoint", run[0], "--format", "original", "--out", tmp_path / "out")
    assert "classes text, title, list, in this order" in capsys.readouterr().out
    again, _, _ = load_model(tmp_path / "out" / "model.pth")
    assert all(tensor.equal(again.state_dict()[name]) for name, tensor in run[1].state_dict().items())


@pytest.mark.parametrize(
    ("layout", "reason"),
    [("transformers", "its pages keep their aspect"), ("original", "its backbone is test_convnext")],
)
def test_a_model_that_the_layout_cannot_express_ends_in_one_line(
    layout: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    categories: list[dict[str, Any]] = [{"id": i, "name": str(i)} for i in range(3)]
    ours.save(tmp_path / "best.pt", ours.weights(Config(model=tiny_config()), categories, tiny_model()))
    line = ["export", "--checkpoint", str(tmp_path / "best.pt"), "--format", layout, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(export.__file__), run_name="__main__")
    assert str(stopped.value.code).startswith("error: the layout of ")
    assert reason in str(stopped.value.code)
    assert not (tmp_path / "out").exists()


def test_a_run_becomes_a_small_file_of_ours(
    run: tuple[Path, DFine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, "--checkpoint", run[0], "--format", "ours", "--out", tmp_path / "small.pt")
    model, _, categories = load_model(tmp_path / "small.pt")
    assert [category["name"] for category in categories] == ["text", "title", "list"]
    expected = run[1].state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-8, atol=0)  # bf16's


def test_a_small_file_of_ours_is_named_as_one(run: tuple[Path, DFine], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ours.CheckpointError, match=r"model.bin: name a file that ends in .pt"):
        start(monkeypatch, "--checkpoint", run[0], "--format", "ours", "--out", "model.bin")
