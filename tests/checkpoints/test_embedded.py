"""The weights in the package, and the small file that they are."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import shaken, tiny_config, tiny_model

import dfine
from dfine.checkpoints import ours
from dfine.checkpoints.loading import initialise, load_model, locate
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config

CATEGORIES = [{"id": 4 + i, "name": name} for i, name in enumerate(("text", "title", "list"))]


def small(path: Path) -> dict[str, torch.Tensor]:
    """Writes a small file of a model; returns the model's weights."""
    model = shaken(tiny_model())
    ours.save_small(path, ours.weights(Config(model=tiny_config()), CATEGORIES, model))
    return model.state_dict()


def test_a_small_file_holds_matrices_to_bf16_and_all_else_as_it_is(tmp_path: Path):
    expected = small(tmp_path / "small.pt")
    model, config, categories = load_model(tmp_path / "small.pt")
    assert config.model == tiny_config()
    assert categories == CATEGORIES
    for name, tensor in model.state_dict().items():
        rounded = expected[name].bfloat16().float() if tensor.is_floating_point() and tensor.dim() > 1 else None
        assert tensor.equal(expected[name] if rounded is None else rounded), name
        assert tensor.dtype == expected[name].dtype


def test_a_small_file_is_less_than_half_and_the_same_each_time(tmp_path: Path):
    small(tmp_path / "a.pt")
    small(tmp_path / "b.pt")
    ours.save(tmp_path / "whole.pt", ours.weights(Config(model=tiny_config()), CATEGORIES, shaken(tiny_model())))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    assert (tmp_path / "a.pt").stat().st_size < 0.5 * (tmp_path / "whole.pt").stat().st_size


def test_embedded_is_a_file_of_the_package_and_small():
    file = files("dfine") / "weights" / "pages.pt"
    assert Path(str(file)) == locate("embedded")
    assert len(file.read_bytes()) < 8 * 2**20


def test_a_path_that_exists_comes_before_the_embedded_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "embedded")
    assert locate("embedded") == Path("embedded")
    assert load_model("embedded")[2] == CATEGORIES


def test_load_without_a_name_finds_most_of_a_drawn_page():
    from dfine.data.sources import SyntheticPages

    detector = dfine.load(device="cpu")
    assert len(detector.categories) == 11
    found = detector(np.full((500, 400, 3), 255, np.uint8))
    assert found.size == (500, 400)
    page, _, boxes = SyntheticPages(1, 3).read(0)  # with seed 3 it was not trained
    found = detector(page, threshold=0.3)
    assert len(found.labels) >= 0.5 * len(boxes)


def test_a_model_starts_from_the_embedded_weights():
    model, config, categories = load_model("embedded")
    anew = ours.bare_model(config, categories)
    said = initialise(anew, "embedded", categories)
    assert said.startswith("embedded (classes Caption")
    state = model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in anew.state_dict().items())


def test_a_name_that_is_nothing_mentions_the_embedded_weights():
    with pytest.raises(CheckpointError, match="nor 'embedded', the weights in the package"):
        locate("embeded")
