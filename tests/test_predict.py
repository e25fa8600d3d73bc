"""Pages in, JSON and pictures out."""

import json
import os
import runpy
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pdf import RED, write_pdf
from PIL import Image
from processes import at_most, ends, in_use, launch
from pycocotools.coco import COCO
from tiny import drawn_page, shaken, tiny_config, tiny_model

from dfine import predict
from dfine.checkpoints import ours
from dfine.config import Config, ConfigError, DataConfig
from dfine.data.sources import CocoPages, SyntheticPages
from dfine.data.synthetic.pages import CLASSES
from dfine.data.transforms import TURNS, PageError, read_page, turn_boxes
from dfine.inference import DEDUPE
from dfine.inference.results import JsonList
from dfine.model.detector import DFine

CATEGORIES = [{"id": 1, "name": "text"}, {"id": 3, "name": "table"}, {"id": 7, "name": "figure"}]
needs_pdfium = pytest.mark.skipif(find_spec("pypdfium2") is None, reason="needs the extra `documents`")
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
        line = ["predict", "--checkpoint", best, "--out", tmp_path / "out", "--threshold", "0", "--dedupe", "1"]
        line += ["--workers", "0", *arguments]
        monkeypatch.setattr("sys.argv", list(map(str, line)))
        status = predict.main()
        return status, json.loads((predict.arguments().out / "predictions.json").read_text())

    return run


def test_the_json_says_what_is_where_in_pixels_of_the_image(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    status, pages = script(tmp_path / "page.png")
    assert status == 0
    assert capsys.readouterr().out == f"1 pages in {tmp_path / 'out'}: predictions.json, pictures\n"
    (page,) = pages
    assert (page["file"], page["page"]) == (str(tmp_path / "page.png"), 1)
    assert (page["width"], page["height"]) == (90, 120)
    assert len(page["detections"]) == 24
    for detection in page["detections"]:
        assert detection.keys() == {"label", "category_id", "score", "box"}
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
    assert pictures | {"predictions.json", "lock"} == {path.name for path in (tmp_path / "out").iterdir()}


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


def test_without_any_page_what_was_found_before_stays(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    _, before = script(tmp_path / "page.png")
    assert script(tmp_path / "empty") == (1, before)
    assert f"error: no images or PDFs in {tmp_path / 'empty'}" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1.5", "-0.1", "much"])
@pytest.mark.parametrize("option", ["--threshold", "--dedupe"])
def test_a_share_outside_0_to_1_is_a_mistake(
    script: Any, tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(tmp_path, f"{option}={value}")
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--pages=0", "--pages=a", "--dpi=0", "--dpi=inf", "--pictures=gif"])
def test_an_option_that_means_nothing_is_named(
    script: Any, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(tmp_path, option)
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err


def test_doubled_boxes_are_dropped_unless_told_otherwise(script: Any, tmp_path: Path) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    assert len(script(tmp_path / "page.png", "--dedupe", DEDUPE)[1][0]["detections"]) <= 8 < 24
    assert predict.arguments(["--checkpoint", "a", "--out", "b", "c"]).dedupe == DEDUPE


# Documents


@needs_pdfium
def test_pdfs_give_boxes_in_pixels_and_in_points(script: Any, tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [("/MediaBox [0 0 90 120]", RED)] * 3)
    status, pages = script(tmp_path / "a.pdf", "--pages", "2-", "--dpi", "36")
    assert status == 0
    assert [page["page"] for page in pages] == [2, 3]
    for page in pages:
        assert (page["width"], page["height"]) == (45, 60)
        assert Image.open(tmp_path / "out" / page["picture"]).size == (45, 60)
        for detection in page["detections"]:
            x1, y1, x2, y2 = detection["box"]
            np.testing.assert_allclose(detection["points"], [2 * x1, 120 - 2 * y2, 2 * x2, 120 - 2 * y1], atol=2e-3)


@needs_pdfium
def test_a_broken_page_is_named_and_the_pages_around_it_are_there(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pdf(tmp_path / "a.pdf", [("/MediaBox [0 0 90 120]", RED)] * 3, broken=1)
    status, pages = script(tmp_path / "a.pdf")
    assert status == 1
    assert [page["page"] for page in pages] == [1, 3]
    assert f"error: {tmp_path / 'a.pdf'}, page 2: cannot read" in capsys.readouterr().err


def test_all_pages_of_a_tiff_are_found(script: Any, tmp_path: Path) -> None:
    pages = [Image.fromarray(drawn_page(120 + i, 90)) for i in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    status, found = script(tmp_path / "a.tif", "--workers", "1")
    assert status == 0
    assert [(page["page"], page["height"]) for page in found] == [(1, 120), (2, 121), (3, 122)]
    assert [Image.open(tmp_path / "out" / page["picture"]).height for page in found] == [120, 121, 122]


# Pictures


@pytest.mark.parametrize("kind", ["png", "jpg", "none"])
def test_pictures_are_what_was_asked_for_and_never_pages_of_the_next_run(
    script: Any, tmp_path: Path, kind: str
) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    Image.fromarray(drawn_page()).save(pages / "00000_own.png")
    for folder in (pages / "out", pages):
        for _ in range(2):
            status, found = script(pages, "--out", folder, "--pictures", kind)
            assert status == 0
            assert [page["file"] for page in found] == [str(pages / "00000_own.png")]
            if kind == "none":
                assert found[0]["picture"] is None
            else:
                picture = Image.open(folder / found[0]["picture"])
                assert (picture.format, picture.size) == ({"png": "PNG", "jpg": "JPEG"}[kind], (90, 120))


def test_a_page_with_a_long_name_has_a_picture(script: Any, tmp_path: Path) -> None:
    page = tmp_path / f"{'é' * 125}.png"
    Image.fromarray(drawn_page()).save(page)
    status, (found,) = script(page)
    assert status == 0
    assert (tmp_path / "out" / found["picture"]).is_file()


def test_a_picture_that_cannot_be_written_is_named_and_the_others_go_on(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        Image.fromarray(drawn_page()).save(tmp_path / f"{name}.png")
    (tmp_path / "out" / "00001_b.png").mkdir(parents=True)
    status, pages = script(*(tmp_path / f"{name}.png" for name in "abc"))
    assert status == 1
    assert [page["picture"] for page in pages] == ["00000_a.png", None, "00002_c.png"]
    assert all(len(page["detections"]) == 24 for page in pages)
    assert (
        f"error: {tmp_path / 'b.png'}: its detections are saved, but its picture cannot be: " in capsys.readouterr().err
    )


# Nothing is lost


def predicting(line: list[str], errors: Path) -> None:
    """predict.py as a program."""
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    sys.argv = line
    runpy.run_module("dfine.predict", run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_its_pages_and_goes_on_with_the_others(
    script: Any, best: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pages = [Image.fromarray(drawn_page(120 + i % 5, 90)) for i in range(32)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    _, expected = script(tmp_path / "a.tif", "--pictures", "none")
    predictions = tmp_path / "cut" / "predictions.json"
    options = [tmp_path / "a.tif", "--out", predictions.parent, "--pictures", "none"]
    line = ["predict", "--checkpoint", best, "--threshold", 0, "--dedupe", 1, "--workers", 1, *options]
    (process,) = launch(predicting, list(map(str, line)), tmp_path / "errors", count=1)
    while not predictions.exists() or predictions.stat().st_size < 10:
        assert process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, number)
    assert ends([process]) == [-number if number == signal.SIGKILL else 130]
    # Of the main process; a worker that is cut off while it hands over a page may say so.
    assert "KeyboardInterrupt" not in (tmp_path / "errors").read_text()
    cut = json.loads(predictions.read_text())
    assert 1 <= len(cut) < 32
    assert cut == expected[: len(cut)]
    assert script(*options, "--resume") == (0, expected)


def test_a_folder_that_another_process_writes_is_refused_and_stays_as_it_is(script: Any, tmp_path: Path) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    _, before = script(tmp_path / "page.png")
    with in_use(tmp_path / "out") as process:
        for resume in ([], ["--resume"]):
            with pytest.raises(ConfigError, match=rf"--out: {tmp_path / 'out'} is in use by process {process} on "):
                script(tmp_path / "page.png", *resume)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == before
    assert script(tmp_path / "page.png")[0] == 0


def test_pictures_of_a_run_that_goes_on_take_no_name_twice(script: Any, tmp_path: Path) -> None:
    for name in "acd":
        Image.fromarray(drawn_page()).save(tmp_path / f"{name}.png")
    _, expected = script(tmp_path)
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(expected[:2]))  # as if ended after c.png
    Image.fromarray(drawn_page()).save(tmp_path / "b.png")
    _, pages = script(tmp_path, "--resume")
    assert [page["picture"] for page in pages] == ["00000_a.png", "00001_c.png", "00002_b.png", "00003_d.png"]
    assert all((tmp_path / "out" / page["picture"]).is_file() for page in pages)


def test_a_list_is_whole_after_each_item_and_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    items = JsonList(path, [])
    written: list[dict[str, Any]] = []
    for i in range(3):
        assert json.loads(path.read_text()) == written
        items.append({"i": i})
        written.append({"i": i})
    full = pytest.raises(OSError, match=r"(No space left|File too large).*list.json")
    with at_most(path.stat().st_size + 20), full:
        items.append({"i": "x" * 50})
    assert json.loads(path.read_text()) == written
    items.append({"i": 3})
    assert json.loads(path.read_text()) == [*written, {"i": 3}]
    assert len(path.read_text().splitlines()) == 6  # a line each


@pytest.mark.parametrize("content", ["[", "{}", "[1]", '[{"file": "a"}]'])
def test_only_predictions_can_be_gone_on_with(script: Any, tmp_path: Path, content: str) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.json").write_text(content)
    with pytest.raises(PageError, match=r"predictions.json: cannot go on with it"):
        script(tmp_path / "page.png", "--resume")
    assert (tmp_path / "out" / "predictions.json").read_text() == content


# COCO results


def write_coco(path: Path, images: list[dict[str, Any]], categories: list[dict[str, Any]] = CATEGORIES) -> Path:
    path.write_text(json.dumps({"images": images, "categories": categories}))
    return path


def image(number: int, name: str, width: int = 90, height: int = 120) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": width, "height": height}


def test_coco_results_have_the_ids_of_the_json_and_pycocotools_takes_them(script: Any, tmp_path: Path) -> None:
    for name in ("a/page.png", "b/page.png"):
        (tmp_path / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_page()).save(tmp_path / "pages" / name)
    images = [image(70, "page.png"), image(71, "b/page.png")]
    path = write_coco(tmp_path / "coco.json", images)
    status, pages = script(tmp_path / "pages", "--coco", path)
    assert status == 0
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    truth = COCO()
    truth.dataset = {"images": images, "categories": CATEGORIES, "annotations": []}
    truth.createIndex()
    loaded = truth.loadRes(str(tmp_path / "out" / "detections.json"))
    for image_id, page in zip((70, 71), pages, strict=True):
        own = [result for result in results if result["image_id"] == image_id]
        assert len(loaded.getAnnIds([image_id])) == len(own) == 24
        for result, detection in zip(own, page["detections"], strict=True):
            assert result.keys() == {"image_id", "category_id", "bbox", "score"}
            assert (result["category_id"], result["score"]) == (detection["category_id"], detection["score"])
            x, y, w, h = result["bbox"]
            np.testing.assert_allclose([x, y, x + w, y + h], detection["box"], atol=1e-9)


def test_classes_go_by_name_and_those_that_the_json_lacks_are_left_out(script: Any, tmp_path: Path) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "a.png")
    theirs = [{"id": 5, "name": "Figure"}, {"id": 1, "name": "table"}]
    path = write_coco(tmp_path / "coco.json", [image(1, "a.png")], theirs)
    status, (page,) = script(tmp_path / "a.png", "--coco", path)
    assert status == 0
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    ids = [{"figure": 5, "table": 1, "text": None}[detection["label"]] for detection in page["detections"]]
    assert {5, 1, None} == set(ids)
    assert [result["category_id"] for result in results] == [number for number in ids if number]


def test_pages_that_the_json_does_not_have_are_named(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        Image.fromarray(drawn_page()).save(tmp_path / f"{name}.png")
    path = write_coco(tmp_path / "coco.json", [image(1, "a.png", 120, 90), image(2, "c.png")])
    status, pages = script(*(tmp_path / f"{name}.png" for name in "abc"), "--coco", path)
    assert status == 1
    assert len(pages) == 3
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {result["image_id"] for result in results} == {2}
    errors = capsys.readouterr().err
    assert f"error: {tmp_path / 'a.png'}: has 90x120 pixels, {path} says 120x90" in errors
    assert f"error: {tmp_path / 'b.png'}, page 1: {path} has no such image" in errors


def test_a_page_is_the_image_whatever_form_its_name_has(script: Any, tmp_path: Path) -> None:
    Image.fromarray(drawn_page()).save(tmp_path / "a.png")
    path = write_coco(tmp_path / "coco.json", [image(1, "./a.png")])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert script(tmp_path / "a.png", "--coco", path)[0] == 0
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {result["image_id"] for result in results} == {1}


def test_two_pages_are_never_one_image_nor_one_page_two(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/page.png", "b/page.png", "c.png"):
        (tmp_path / "pages" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_page()).save(tmp_path / "pages" / name)
    path = write_coco(tmp_path / "coco.json", [image(1, "page.png"), image(2, "c.png"), image(3, "c.png")])
    status, pages = script(tmp_path / "pages", "--coco", path)
    assert (status, len(pages)) == (1, 3)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [result["image_id"] for result in results] == [1] * 24
    errors = capsys.readouterr().err
    first, second = (tmp_path / "pages" / name / "page.png" for name in "ab")
    assert f"error: {second}: is page.png of {path}, as {first} is: name the folder of the json's images" in errors
    assert f"c.png: is the file_name of several images of {path}: 2, 3" in errors


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_results_are_in_pixels_of_the_image_as_the_json_has_it(
    script: Any, tmp_path: Path, orientation: int, suffix: str
) -> None:
    """By the size in the json, as in training: of a page that lies on its side both are right."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pages = tmp_path / "pages"
    pages.mkdir()
    Image.fromarray(drawn_page()).save(pages / f"a.{suffix}", exif=exif)
    _, (page,) = script(pages, "--pictures", "none")
    upright, seen = read_page(pages / f"a.{suffix}"), [detection["box"] for detection in page["detections"]]
    for width, height in {(90, 120), (page["width"], page["height"])}:
        path = write_coco(tmp_path / "coco.json", [image(1, f"a.{suffix}", width, height)])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
        try:
            lies = CocoPages(pages, path).read(0)[0]
        except PageError:  # a TIFF is always turned
            assert suffix == "tif"
            assert script(pages, "--pictures", "none", "--coco", path)[0] == 1
            continue
        assert script(pages, "--pictures", "none", "--coco", path)[0] == 0
        results = json.loads((tmp_path / "out" / "detections.json").read_text())
        turn = next(how for how in (None, *TURNS.values()) if np.array_equal(turned(lies, how), upright))
        xyxy = np.array([[x, y, x + w, y + h] for x, y, w, h in (result["bbox"] for result in results)])
        xyxy = xyxy if turn is None else turn_boxes(xyxy, lies.shape[:2], turn)
        np.testing.assert_allclose(xyxy, seen, atol=2e-3)


def turned(page: np.ndarray, how: Image.Transpose | None) -> np.ndarray:
    return page if how is None else np.array(Image.fromarray(page).transpose(how))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"coco.json: not JSON"),
        ('{"images": []}', r"coco.json: not COCO: needs the lists images and categories"),
        ('{"images": [7], "categories": []}', r"coco.json: holds no categories"),
        (
            json.dumps({"images": [image(1, "a.png")], "categories": [{"id": 1, "name": "sidebar"}]}),
            r"coco.json: has sidebar, which .*best.pt does not know: text, table, figure",
        ),
        (
            json.dumps({"images": [image(1, "../a.png")], "categories": CATEGORIES}),
            r"coco.json: images\[0\]: file_name",
        ),
        (None, r"coco.json: cannot read the annotations \(No such file"),
    ],
)
def test_a_json_that_cannot_give_ids_is_named_before_any_page_is_read(
    script: Any, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "coco.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        script(tmp_path / "none.png", "--coco", tmp_path / "coco.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [(), ("--fast",)])
def test_fast_is_passed_on(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any) -> None:
    asked, load = [], predict.load
    monkeypatch.setattr(predict, "load", lambda path, fast: asked.append(fast) or load(path))
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    script(tmp_path / "page.png", *arguments)
    assert asked == [bool(arguments)]


def test_without_a_checkpoint_the_weights_in_the_package_find_the_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, _, boxes = SyntheticPages(1, 3).read(0)  # with this seed it was not trained
    Image.fromarray(page).save(tmp_path / "page.png")
    line = ["predict", str(tmp_path / "page.png"), "--out", str(tmp_path / "out"), "--workers", "0"]
    monkeypatch.setattr("sys.argv", line)
    assert predict.main() == 0
    (found,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found["detections"]) >= 0.5 * len(boxes)
    assert {detection["label"] for detection in found["detections"]} <= set(CLASSES)
