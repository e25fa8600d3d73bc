"""What padding does to a page's answer, in numbers."""

from pathlib import Path

import pytest
import torch
from coco_folder import annotation, image, write
from tiny import shaken, tiny_config, tiny_model

from dfine import checkpoint, padding
from dfine.config import Config, DataConfig, PagesConfig
from dfine.sources import CocoPages
from dfine.structures import Detections


def found(*rows: tuple[float, int, list[float]]) -> Detections:
    scores, labels, boxes = zip(*rows, strict=True)
    return Detections(torch.tensor(scores), torch.tensor(labels), torch.tensor(boxes))


def test_a_box_is_compared_with_the_one_of_its_label_that_it_overlaps_most() -> None:
    alone = found((0.9, 0, [0.0, 0.0, 10.0, 10.0]), (0.5, 1, [0.0, 0.0, 10.0, 10.0]), (0.2, 0, [5.0, 5.0, 9.0, 9.0]))
    beside = found(
        (0.8, 1, [0.0, 0.0, 10.0, 13.0]), (0.7, 0, [0.0, 1.0, 10.0, 10.0]), (0.6, 0, [50.0, 0.0, 60.0, 10.0])
    )
    torch.testing.assert_close(padding.differences(alone, beside, 0.3), torch.tensor([[1.0, 0.2], [3.0, 0.3]]))


def test_the_command_says_how_many_boxes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = write(tmp_path, [image(i, 60, 90) for i in range(3)], [annotation(0, [5, 5, 40, 30], 3)])
    data = DataConfig(
        val=PagesConfig(images=str(images), annotations=str(annotations)),
        short_edges=(64,),
        eval_short_edge=64,
        max_long_edge=96,
    )
    categories = CocoPages(images, annotations).categories
    content = checkpoint.weights(Config(model=tiny_config(), data=data), categories, shaken(tiny_model()))
    checkpoint.save(tmp_path / "best.pt", content)
    arguments = ["--checkpoint", str(tmp_path / "best.pt"), "--pages", "2", "--threshold", "0"]
    monkeypatch.setattr("sys.argv", ["padding", *arguments])
    padding.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "48 detections"  # 8 queries of 3 classes on each of 2 pages
    assert lines[1].startswith("box moves by less than 1 pixel: 100.0%; median ")
    assert lines[2].startswith("score moves by less than 0.01: 100.0%; median ")
