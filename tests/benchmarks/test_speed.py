"""The table of speeds has a line for each way of running a model."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra `bench`")
pytest.importorskip("openvino", reason="needs the extra `bench`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")

import speed

TINY = (
    "model.backbone={name: test_convnext, pretrained: false}",
    "model.hidden_dim=32",
    "model.encoder={heads: 4, feedforward_dim: 32, depth_mult: 0.34, expansion: 0.5}",
    "model.decoder={heads: 4, feedforward_dim: 32, layers: 2, queries: 20}",
)


def test_every_way_is_timed_on_one_page_and_on_eight_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.MODELS, "tiny", speed.Entry(overrides=TINY, size=(64, 96)))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in speed.rows("tiny", [1], repeats=1)]
    torchs, others = ["eager", "deploy()", "deploy(fast=True)"], ["onnxruntime", "OpenVINO", speed.PEER]
    assert [line[3] for line in lines] == torchs + others
    assert all(line[:3] == ["tiny, 64x96", lines[0][1], "1"] and len(line) == 8 for line in lines)
    assert all(float(number) > 0 for line in lines for number in line[4:])
    assert lines[-1][5] == lines[-1][7] == "1.00"
