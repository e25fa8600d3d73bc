"""The contact sheet of augmented pages."""

from pathlib import Path

import numpy as np
import pytest
from coco_folder import annotation, image, write
from PIL import Image

from dfine import contact_sheet
from dfine.inference.pictures import colour


def test_the_contact_sheet_shows_the_first_training_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, file = write(tmp_path, [image(i, 60, 80) for i in range(4)], [annotation(1, [5, 5, 40, 30])])
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train: {{images: '{images}', annotations: '{file}'}}, "
        "batch_size: 2, workers: 0, short_edges: [64], max_long_edge: 640}"
    )
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["contact_sheet", "--config", str(config), "--out", str(sheet), "--pages", "3"])
    contact_sheet.main()
    drawn = np.asarray(Image.open(sheet))
    assert drawn.shape[1] > 4 * 64
    assert (drawn == colour(0)).all(-1).any()
