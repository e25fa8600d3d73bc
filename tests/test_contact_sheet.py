"""The contact sheet of augmented pages."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from coco_folder import annotation, image, write
from PIL import Image

from dfine import contact_sheet
from dfine.inference.pictures import colour


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["contact_sheet", *map(str, arguments)])
    runpy.run_path(str(contact_sheet.__file__), run_name="__main__")


def test_the_contact_sheet_shows_the_first_training_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = write(tmp_path, [image(i, 60, 80) for i in range(4)], [annotation(1, [5, 5, 40, 30])])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train: {{images: '{images}', annotations: '{file}'}}, "
        "batch_size: 2, workers: 0, short_edges: [64], max_long_edge: 640}"
    )
    sheet = tmp_path / "new" / "sheet.png"
    start(monkeypatch, "--config", config, "--out", sheet, "--pages", 3)
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape[1] > 4 * 64
    assert (drawn == colour(0)).all(-1).any()
    assert f"{sheet}: 4 pages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--config", "none.yaml", "--out", "sheet.png"), "error: none.yaml"),
        (("--config", "none.yaml", "--out", "sheet.txt"), 2),
        (("--config", "none.yaml", "--out", "sheet.png", "--pages", 0), 2),
    ],
)
def test_a_mistake_ends_in_one_line(arguments: tuple[object, ...], code: object, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit) as stopped:
        start(monkeypatch, *arguments)
    found = stopped.value.code
    assert found == code or (isinstance(code, str) and str(found).startswith(code))
