"""Our own checkpoints: what cannot be used is refused with the file's name, whatever is wrong with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

from dfine.checkpoints import ours
from dfine.config import Config


@pytest.fixture
def content() -> dict[str, Any]:
    categories = [{"id": i, "name": name} for i, name in enumerate(("text", "table", "figure"))]
    return ours.weights(Config(model=tiny_config()), categories, tiny_model())


def refused(path: Path, content: dict[str, Any]) -> str:
    torch.save(content, path)
    with pytest.raises(ours.CheckpointError) as caught:
        ours.load_model(path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_config_with_sizes_that_no_tensor_can_have_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    content["config"]["model"]["decoder"]["points"] = [2**63, 1, 1]
    assert refused(tmp_path / "last.pt", content).startswith("no model can be made of its config")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("change", [lambda x: x.to_sparse(), lambda x: x.to("meta")], ids=["sparse", "without content"])
def test_weights_of_the_right_shape_that_cannot_be_copied_are_refused(
    content: dict[str, Any], tmp_path: Path, change: Any
) -> None:
    content["ema"]["selection.project.weight"] = change(content["ema"]["selection.project.weight"])
    assert "selection.project.weight" in refused(tmp_path / "last.pt", content)


def test_weights_of_another_shape_are_named(content: dict[str, Any], tmp_path: Path) -> None:
    content["ema"]["selection.project.weight"] = torch.zeros(3, 3)
    said = "does not fit the model of its own config at selection.project.weight (1 in all)"
    assert refused(tmp_path / "last.pt", content) == said
