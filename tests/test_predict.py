"""Pages in, JSON and pictures out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import drawn_page, shaken, tiny_config, tiny_model

from dfine import predict
from dfine.checkpoints import ours
from dfine.config import Config, DataConfig
from dfine.data.transforms import PageError
from dfine.model.detector import DFine

CATEGORIES = [{"id": 1, "name": "text"}, {"id": 3, "name": "table"}, {"id": 7, "name": "figure"}]
SMALL = DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96)


def model() -> DFine:
    return shaken(tiny_model()).eval()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    ours.save(path, ours.weights(Config(model=tiny_config(), data=SMALL), CATEGORIES, model()))
    return path


@pytest.fixture
def script(best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script; returns what main returned and predictions.json."""

    def run(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
        line = ["predict", "--checkpoint", best, "--out", tmp_path / "out", "--threshold", "0", *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, line)))
        status = predict.main()
        return status, json.loads((tmp_path / "out" / "predictions.json").read_text())

    return run


def test_the_json_says_what_is_where_in_pixels_of_the_image(script: Any, tmp_path: Path) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    status, pages = script(tmp_path / "page.png")
    assert status == 0
    (page,) = pages
    assert (page["file"], page["width"], page["height"]) == (str(tmp_path / "page.png"), 90, 120)
    assert len(page["detections"]) == 24
    for detection in page["detections"]:
        assert {"id": detection["category_id"], "name": detection["label"]} in CATEGORIES
        assert 0 <= detection["score"] <= 1
        x1, y1, x2, y2 = detection["box"]
        assert 0 <= x1 <= x2 <= 90
        assert 0 <= y1 <= y2 <= 120
    assert Image.open(tmp_path / "out" / page["picture"]).size == (90, 120)


def transparent(page: Image.Image) -> Image.Image:
    """The same page on paper that is transparent instead of white."""
    pixels = np.array(page.convert("RGBA"))
    pixels[(pixels[..., :3] == 255).all(-1)] = (0, 0, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("change", "suffix"),
    [
        (transparent, "png"),
        (transparent, "tif"),
        (lambda page: page.convert("P", palette=Image.Palette.ADAPTIVE), "png"),
        (lambda page: page, "bmp"),
        (lambda page: page, "webp"),
    ],
)
def test_how_a_page_is_stored_makes_no_difference(script: Any, tmp_path: Path, change: Any, suffix: str) -> None:
    page = Image.fromarray(drawn_page())
    (tmp_path / "pages").mkdir()
    page.save(tmp_path / "pages" / "a.png")
    change(page).save(tmp_path / "pages" / f"b.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    first, second = script(tmp_path / "pages")[1]
    assert first["detections"] == second["detections"]


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "CMYK"])
def test_pages_of_every_mode_are_read(script: Any, tmp_path: Path, mode: str) -> None:
    grey = drawn_page()[..., 0]
    page = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    page.save(tmp_path / "page.tif")
    status, pages = script(tmp_path / "page.tif")
    assert status == 0
    picture = np.asarray(Image.open(tmp_path / "out" / pages[0]["picture"]))
    assert (picture == 255).all(-1).any()  # paper is white


def test_a_page_that_lies_on_its_side_is_seen_upright(script: Any, tmp_path: Path) -> None:
    page = Image.fromarray(drawn_page())
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pages").mkdir()
    page.save(tmp_path / "pages" / "a.png")
    page.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "pages" / "b.png", exif=exif)
    first, second = script(tmp_path / "pages")[1]
    assert (second["width"], second["height"]) == (90, 120)
    assert first["detections"] == second["detections"]


def test_folders_are_searched_in_order_and_pages_of_one_name_get_a_picture_each(script: Any, tmp_path: Path) -> None:
    for name in ("b/page.png", "a/ñ/page.JPG", "a/page.png", "a/page.tiff"):
        (tmp_path / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_page()).save(tmp_path / "pages" / name)
    (tmp_path / "pages" / "notes.txt").write_text("no page")
    status, pages = script(tmp_path / "pages")
    assert status == 0
    names = [str(Path(page["file"]).relative_to(tmp_path / "pages")) for page in pages]
    assert names == ["a/page.png", "a/page.tiff", "a/ñ/page.JPG", "b/page.png"]
    pictures = {page["picture"] for page in pages}
    assert len(pictures) == 4
    assert pictures | {"predictions.json"} == {path.name for path in (tmp_path / "out").iterdir()}


def test_an_unreadable_page_is_named_and_the_others_go_on(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("no image")
    Image.fromarray(drawn_page()).save(tmp_path / "good.png")
    status, pages = script(tmp_path / "broken.png", tmp_path / "missing.png", tmp_path / "good.png")
    assert status == 1
    assert [page["file"] for page in pages] == [str(tmp_path / "good.png")]
    errors = capsys.readouterr().err
    assert f"error: {tmp_path / 'broken.png'}: cannot read" in errors
    assert f"error: {tmp_path / 'missing.png'}: cannot read" in errors


def test_a_folder_without_images_is_a_mistake(script: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PageError, match=r"no images in .*empty"):
        script(tmp_path / "empty")


@pytest.mark.parametrize("value", ["1.5", "-0.1", "much"])
@pytest.mark.parametrize("option", ["--threshold", "--dedupe"])
def test_a_share_outside_0_to_1_is_a_mistake(
    script: Any, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(tmp_path, f"{option}={value}")
    assert f"argument {option}" in capsys.readouterr().err
