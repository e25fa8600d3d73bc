"""evaluate.py as users start it."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coco_folder import CATEGORIES, annotation, evaluated, five_pages, image, write
from processes import at_most
from published import publish_recorded
from pycocotools.coco import COCO
from scripts import TINY, evaluations, same
from scripts import pages as coloured
from scripts import train as run_train
from tiny import shaken, tiny_model
from torchvision.ops import box_convert, box_iou

from dfine.checkpoints import ours
from dfine.config import AugmentConfig, ConfigError, PagesConfig
from dfine.data.sources import CocoPages
from dfine.inference import evaluation
from dfine.inference.evaluation import OFFICIAL, category_ids, ids_by_name, table
from dfine.model import detector
from dfine.model.detector import DFine
from dfine.structures import Detections

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(tmp_path: Path) -> PagesConfig:
    return five_pages(tmp_path / "pages")


def model() -> DFine:
    return shaken(tiny_model()).eval()


@pytest.fixture
def best(pages: PagesConfig, tmp_path: Path) -> Path:
    source = CocoPages(pages.images, pages.annotations)
    (tmp_path / "run").mkdir()
    content = ours.weights(evaluated(pages), source.categories, model())
    ours.save(tmp_path / "run" / "best.pt", content)
    return tmp_path / "run" / "best.pt"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    import evaluate as script

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        script.main()

    return run


def test_the_script_writes_metrics_and_detections_beside_the_checkpoint(
    best: Path, pages: PagesConfig, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script("--checkpoint", best)
    metrics = json.loads((best.parent / "best.metrics.json").read_text())
    assert set(metrics) == {*OFFICIAL, "AP_300", "per_class", "shown"}
    said = capsys.readouterr().out
    assert table(metrics) in said
    assert str(best.parent / "best.metrics.json") in said
    results = COCO(pages.annotations).loadRes(str(best.parent / "best.detections.json"))
    assert len(results.getAnnIds()) == 5 * 24


def test_the_script_finds_and_measures_what_the_run_did_to_the_last_digit(
    tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 steps on two pages, of which the model then knows something."""
    own = coloured(tmp_path / "pages", count=2)
    still = {name: 0.0 for name in AugmentConfig.model_fields if name.endswith("_p")}
    train = {"epochs": 20, "learning_rate": 0.01, "ema_decay": 0.5, "save_every": 1000, "eval_every": 1000}
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own, "augment": still}, "train": TINY["train"] | train}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    answers: list[Detections] = []

    def detect(*arguments: Any) -> list[Detections]:
        found = detector.detect(*arguments)
        answers.extend(found)
        return found

    monkeypatch.setattr(evaluation, "detect", detect)
    run_train(tmp_path / "tiny.yaml", tmp_path / "run", "data.short_edges=[64]", "model.decoder.layers=1")
    theirs = answers[:2]  # those behind them are for the picture
    answers.clear()
    script("--checkpoint", tmp_path / "run" / "last.pt")
    assert same(answers, theirs)
    line = evaluations(tmp_path / "run")[-1]
    metrics = json.loads((tmp_path / "run" / "last.metrics.json").read_text())
    assert metrics == {name: line[name] for name in metrics}
    assert metrics["AP50"] > 0.1


def test_what_best_and_last_measure_stand_side_by_side(best: Path, script: Any) -> None:
    (best.parent / "last.pt").write_bytes(best.read_bytes())
    script("--checkpoint", best)
    script("--checkpoint", best.parent / "last.pt")
    names = {f"{which}.{what}.json" for which in ("best", "last") for what in ("metrics", "detections")}
    assert {path.name for path in best.parent.glob("*.json")} == names


def test_overrides_of_the_script_win_over_the_checkpoint(best: Path, tmp_path: Path, script: Any) -> None:
    images, annotations = write(tmp_path / "other", [image(1)], [])
    others = [f"data.val.images={images}", f"data.val.annotations={annotations}"]
    script("--checkpoint", best, f"run_dir={tmp_path / 'elsewhere'}", *others)
    results = json.loads((tmp_path / "elsewhere" / "best.detections.json").read_text())
    assert {result["image_id"] for result in results} == {1}
    assert not (best.parent / "best.metrics.json").exists()


@pytest.mark.parametrize("override", ["model.decoder.queries=3", "loss.vfl=2", "distill.teacher=best.pt"])
def test_overrides_that_an_evaluation_would_not_heed_are_refused(best: Path, script: Any, override: str) -> None:
    with pytest.raises(ConfigError, match=f"override '{override}': the model is the checkpoint's"):
        script("--checkpoint", best, override)


def test_classes_go_by_name_whatever_their_ids_and_those_that_a_json_lacks_are_left_out(
    best: Path, tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    categories = [{"id": 40, "name": "Table"}, {"id": 3, "name": "text"}]
    images, annotations = write(tmp_path / "other", [image(1)], [], categories)
    script("--checkpoint", best, f"data.val.images={images}", f"data.val.annotations={annotations}")
    assert "left out, since data.val does not have them: figure" in capsys.readouterr().out
    results = json.loads((best.parent / "best.detections.json").read_text())
    assert {result["category_id"] for result in results} == {3, 40}


def test_a_json_with_a_class_that_the_checkpoint_lacks_is_refused_and_both_are_named(
    best: Path, tmp_path: Path, script: Any
) -> None:
    categories = [category for category in CATEGORIES if category["name"] != "table"] + [{"id": 3, "name": "list"}]
    images, annotations = write(tmp_path / "other", [image(1)], [], categories)
    with pytest.raises(ConfigError, match=r"has list, which .*best.pt does not know: text, table, figure"):
        script("--checkpoint", best, f"data.val.images={images}", f"data.val.annotations={annotations}")


def test_the_files_are_written_even_if_nobody_reads_what_is_printed(best: Path) -> None:
    """As with `| head`."""
    line = [sys.executable, "evaluate.py", "--checkpoint", str(best)]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said
    assert "Broken" not in said
    assert (best.parent / "best.metrics.json").exists()
    assert (best.parent / "best.detections.json").exists()


def test_a_folder_that_cannot_be_written_to_is_named_before_any_page_is_read(
    best: Path, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.find", lambda *_, **__: pytest.fail("it evaluated"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=rf"run_dir: cannot write to {tmp_path / 'file'} "):
        script("--checkpoint", best, f"run_dir={tmp_path / 'file'}")


def test_what_was_measured_is_said_even_if_it_cannot_be_written_and_no_part_of_it_is_left(
    best: Path, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("evaluate.try_writing", lambda *_: None)  # the disk becomes full later
    with at_most(3000), pytest.raises(ConfigError, match=r"cannot write .*best.detections.json \(File too large\)"):
        script("--checkpoint", best)
    assert "AP50" in capsys.readouterr().out
    assert [path.name for path in best.parent.iterdir()] == ["best.pt"]


def test_a_mistake_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert stopped.value.code == f"error: {tmp_path / 'none.pt'}: no such checkpoint"


def test_settings_that_would_be_taken_for_classes_are_a_mistake(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("--checkpoint", "best.pt", "--classes", "Title=title", "data.val.images=pages")
    assert "--classes takes all that follows it: move data.val.images=pages before it" in capsys.readouterr().err


# Published weights, whose classes have numbers from 0


@pytest.mark.parametrize("names", [("Table", "TEXT", "figure"), ("list", "text", "page number", "fig ure", "table")])
def test_published_classes_are_those_of_the_same_name_and_others_are_left_out(names: tuple[str, ...]) -> None:
    own = [{"id": i, "name": name} for i, name in enumerate(names)]
    pages = sorted(CATEGORIES, key=lambda category: category["id"])
    by_name = {"text": 1, "table": 3, "figure": 7, "fig ure": 7}
    assert category_ids(own, pages, "DIR") == [by_name.get(name.lower()) for name in names]


def test_published_classes_without_names_are_the_jsons_in_order_if_there_are_as_many() -> None:
    pages = sorted(CATEGORIES, key=lambda category: category["id"])
    assert category_ids([{"id": i, "name": str(i)} for i in range(3)], pages, "DIR") == [1, 3, 7]
    with pytest.raises(ConfigError, match=r"data\.val: has text, table, figure, which DIR does not know: 0, 1$"):
        category_ids([{"id": i, "name": str(i)} for i in range(2)], pages, "DIR")


def test_a_published_folder_is_evaluated_on_a_json_with_other_ids(
    tmp_path: Path, pages: PagesConfig, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = publish_recorded(tmp_path / "published")
    for name, content in (
        ("config.json", {"0": "List", "1": "Text", "2": "Table"}),
        ("preprocessor_config.json", None),
    ):
        settings = json.loads((folder / name).read_text())
        settings |= {"id2label": content} if content else {"size": {"height": 64, "width": 96}}
        (folder / name).write_text(json.dumps(settings))
    categories = [category for category in CATEGORIES if category["name"] != "figure"]
    images, annotations = write(tmp_path / "two", [image(1, 90, 120)], [annotation(1, [5, 5, 40, 30], 3)], categories)
    paths = [f"data.val.images={images}", f"data.val.annotations={annotations}", "data.workers=0"]
    script("--checkpoint", folder, *paths)
    assert "left out, since data.val does not have them: List" in capsys.readouterr().out
    results = json.loads((folder / f"{folder.name}.detections.json").read_text())
    assert {result["category_id"] for result in results} == {1, 3}
    with pytest.raises(ConfigError, match=r"data\.val: has figure, which .* does not know: List, Text, Table"):
        script("--checkpoint", folder, f"data.val.images={pages.images}", f"data.val.annotations={pages.annotations}")


OWN = [{"id": 1, "name": "Text"}, {"id": 2, "name": "Title"}, {"id": 3, "name": "Page-footer"}]
THEIRS = [{"id": 7, "name": "text"}, {"id": 9, "name": "figure"}]


def test_classes_are_named_and_several_may_be_one() -> None:
    assert ids_by_name(["Title=text", "Text=text"], OWN, THEIRS, "best.pt") == [7, 7, None]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["Titel=text"], "--classes Titel=text: best.pt has no class 'Titel', but Text, Title, Page-footer"),
        (["Title=words"], "--classes Title=words: data.val has no class 'words', but text, figure"),
        (["Title"], "--classes Title: data.val has no class '', but text, figure"),
        (["Text=text", "Text=figure"], "--classes Text=figure: Text is there twice"),
    ],
)
def test_pairs_that_cannot_be_meant_are_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ids_by_name(pairs, OWN, THEIRS, "best.pt")


def test_a_model_is_measured_on_pages_of_other_classes(
    best: Path, pages: PagesConfig, tmp_path: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    name = CATEGORIES[0]["name"]
    content = json.loads(Path(pages.annotations).read_text())
    content["categories"] = [{"id": 50, "name": "words"}]
    content["annotations"] = [a | {"category_id": 50} for a in content["annotations"]]
    (tmp_path / "other.json").write_text(json.dumps(content))
    script("--checkpoint", best, f"data.val.annotations={tmp_path / 'other.json'}", "--classes", f"{name}=words")
    assert "left out, since --classes does not have them:" in capsys.readouterr().out
    results = json.loads((best.parent / "best.detections.json").read_text())
    assert {result["category_id"] for result in results} == {50}


def test_boxes_over_better_ones_are_dropped_where_one_asks(best: Path, pages: PagesConfig, script: Any) -> None:
    script("--checkpoint", best, "--dedupe", "0.3")
    results = json.loads((best.parent / "best.detections.json").read_text())
    assert 5 <= len(results) < 5 * 24
    for image_id in {result["image_id"] for result in results}:
        xywh = torch.tensor([result["bbox"] for result in results if result["image_id"] == image_id])
        assert box_iou(*[box_convert(xywh, "xywh", "xyxy")] * 2).fill_diagonal_(0).max() <= 0.301  # written in pixels
