"""What a model says of a page, as numbers and as a reader sees them."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser
from pdf import RED, write_pdf
from PIL import Image
from tiny import drawn_page, freeze_batch_norms, shaken, tiny_config, tiny_model
from torch import Tensor

from dfine import explain
from dfine.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from dfine.checkpoints import ours
from dfine.checkpoints.ours import CheckpointError
from dfine.config import Config, ConfigError, DataConfig, LossConfig, MatcherConfig
from dfine.data.transforms import PageError, pad, sized
from dfine.inference.pages import load
from dfine.losses.criterion import criterion
from dfine.model.detector import DFine
from dfine.model.fdr import decode
from dfine.structures import Target

NAMES = ["text", "table", "</script><b>figure</b> & more"]
CATEGORIES = [{"id": 2 * i + 1, "name": name} for i, name in enumerate(NAMES)]
CONFIG = Config(
    model=tiny_config(),
    data=DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96),
    loss=LossConfig(matcher=MatcherConfig(encoder_queries=2)),  # so that heads disagree about who matches
)
PAGE = torch.tensor([90.0, 120, 90, 120])  # width, height of `drawn_page`
PLAIN = ("encoder", "initial")  # the heads that are no layers, in the order of time
HEADS = ["proposal", "initial box", "layer 1", "layer 2", "layer 3"]
LAYERS = slice(2, None)  # among them


def model() -> DFine:
    return shaken(tiny_model()).eval()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    ours.save(path, ours.weights(CONFIG, CATEGORIES, model()))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "page.png"
    Image.fromarray(drawn_page()).save(path)
    return path


def coco(path: Path, name: str = "page.png", categories: Any = CATEGORIES, width: int = 90) -> Path:
    """A json with three boxes of the page, one of them partly off it, and what does not count: a crowd and a sliver."""
    boxes = [(3, [8, 10, 62, 20], 0), (5, [-5, 60, 50, 70], 0), (1, [20, 5, 30, 40], 0)]
    boxes += [(1, [0, 0, 90, 120], 1), (1, [5, 5, 0.001, 50], 0)]
    annotations = [{"image_id": 7, "category_id": c, "bbox": box, "iscrowd": crowd} for c, box, crowd in boxes]
    images = [{"id": 7, "file_name": name, "width": width, "height": 120}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture
def script(best: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the script on the page; returns the data in the file that it wrote."""

    def run(*more: object, checkpoint: object = best, file: object = page) -> dict[str, Any]:
        out = tmp_path / "new" / "explain.html"
        line = ["explain", "--checkpoint", checkpoint, file, "--out", out, *more]
        monkeypatch.setattr("sys.argv", list(map(str, line)))
        explain.main()
        return data_of(out)

    return run


def data_of(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def every(data: dict[str, Any], key: str) -> Tensor:
    """A number or list of all queries: (Q, ...) float64."""
    return torch.tensor([query[key] for query in data["queries"]], dtype=torch.float64)


def cxcywh(boxes: Tensor) -> Tensor:
    """xyxy pixels of the page as cxcywh fractions."""
    return xyxy_to_cxcywh(boxes / PAGE)


# The numbers


def test_the_last_boxes_are_those_of_predict(script: Any, best: Path, page: Path) -> None:
    data, found = script(), load(best)(page, threshold=0)
    kept = [query for query in data["queries"] if query["kept"]]
    assert 0 < len(kept) == len(found.scores)
    assert [query["labels"][-1] for query in kept] == found.classes.tolist()
    assert [query["scores"][-1] for query in kept] == found.scores.round(6).tolist()
    assert [query["boxes"][-1] for query in kept] == found.boxes.round(3).tolist()
    assert data["steps"] == ["anchor", *HEADS]
    assert (data["width"], data["height"]) == (90, 120)


def test_all_heads_answer_as_in_training(script: Any) -> None:
    data, training = script(), freeze_batch_norms(model().train())
    with torch.no_grad():
        output = training(*pad([sized(drawn_page(), 64, CONFIG.data)], 32))
    heads = [output.encoder, output.initial, *zip(output.refined.logits, output.refined.boxes, strict=True)]
    order = [query["query"] for query in data["queries"]]
    for head, (logits, boxes) in enumerate(heads):
        scores, labels = logits[0, order].double().sigmoid().max(-1)
        torch.testing.assert_close(every(data, "scores")[:, head], scores, atol=1e-5, rtol=0)
        assert every(data, "labels")[:, head].tolist() == labels.tolist()
        pixels = (cxcywh_to_xyxy(boxes[0, order]).clamp(0, 1) * PAGE).double()
        torch.testing.assert_close(every(data, "boxes")[:, 1 + head], pixels, atol=2e-3, rtol=0)


def test_before_training_every_step_is_the_anchor(tmp_path: Path, script: Any) -> None:
    ours.save(tmp_path / "new.pt", ours.weights(CONFIG, CATEGORIES, tiny_model().eval()))
    data = script(checkpoint=tmp_path / "new.pt")
    boxes = every(data, "boxes")
    torch.testing.assert_close(boxes, boxes[:, :1].expand_as(boxes), atol=2e-3, rtol=0)
    inside = (boxes[:, 0] > 0).all(-1) & (boxes[:, 0] < PAGE).all(-1)
    sides = cxcywh(boxes[:, 0])[inside][:, 2:]
    levels = (sides / 0.05).log2()
    assert len(levels) > 0
    torch.testing.assert_close(levels, levels.round(), atol=1e-2, rtol=0)


def test_the_expectations_of_the_distributions_move_the_initial_box_to_that_of_each_layer(script: Any) -> None:
    data = script()
    edges, offsets, boxes = every(data, "edges"), every(data, "offsets"), every(data, "boxes")
    assert edges.shape == (8, 3, 4, 9)
    torch.testing.assert_close(edges.sum(-1), torch.ones(8, 3, 4, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close((edges * torch.tensor(data["w"])).sum(-1), offsets, atol=1e-3, rtol=0)
    initial = cxcywh(boxes[:, 2])[:, None]
    moved = cxcywh_to_xyxy(decode(initial, offsets)) * PAGE
    whole = (boxes[:, 2] > 0).all(-1) & (boxes[:, 2] < PAGE).all(-1)  # what the page cuts off is not in the file
    assert whole.any()
    torch.testing.assert_close(boxes[whole, 3:], moved[whole].clamp(min=0).minimum(PAGE), atol=0.02, rtol=0)


def test_lqe_is_what_stands_between_the_two_class_scores(script: Any) -> None:
    data, lqe = script(), model().decoder.lqe
    raised = every(data, "scores")[..., LAYERS].logit() - every(data, "plain").logit()  # (Q, L)
    edge_logits = every(data, "edges").clamp(min=1e-6).log()
    with torch.no_grad():
        expected = [part(torch.zeros(8, 1), edge_logits[:, i].float())[:, 0].double() for i, part in enumerate(lqe)]
    torch.testing.assert_close(raised, torch.stack(expected, dim=-1), atol=2e-3, rtol=0)
    assert raised.abs().min() > 0.01


def test_attention_reads_around_the_box_of_the_step_before(tmp_path: Path, script: Any) -> None:
    known = model()
    for layer in known.decoder.layers:
        torch.nn.init.zeros_(layer.cross_attention.offsets.weight)  # all queries have the offsets of the bias
    ours.save(tmp_path / "known.pt", ours.weights(CONFIG, CATEGORIES, known))
    data = script(checkpoint=tmp_path / "known.pt")
    points, boxes = every(data, "points"), cxcywh(every(data, "boxes"))
    assert points.shape == (8, 3, 4, 4, 3)
    assert data["strides"] == [8, 16, 16, 32]
    torch.testing.assert_close(points[..., 2].sum(-1), torch.ones(8, 3, 4, dtype=torch.float64), atol=1e-3, rtol=0)
    whole = ((every(data, "boxes") > 0) & (every(data, "boxes") < PAGE)).all(-1)  # (Q, steps)
    for i, layer in enumerate(known.decoder.layers):
        step = 1 if i == 0 else 2 + i  # the proposal, then the layer before
        centre, size = (part[:, None, None] for part in boxes[whole[:, step], step].split(2, dim=-1))
        offsets = layer.cross_attention.offsets.bias.detach().view(4, 4, 2)
        expected = centre + offsets * torch.tensor([0.5, 0.25, 0.25, 0.5])[:, None] * size
        assert len(expected) > 0
        torch.testing.assert_close(points[whole[:, step], i, ..., :2], expected, atol=1e-3, rtol=0)


def test_the_model_is_left_as_it_was() -> None:
    looked, page = model(), drawn_page()
    with torch.inference_mode():
        before = looked(*pad([sized(page, 64, CONFIG.data)], 32))
        explain.look(looked, CONFIG.data, page)
        after = looked(*pad([sized(page, 64, CONFIG.data)], 32))
    assert after.initial is None
    assert torch.equal(before.refined.logits, after.refined.logits)
    assert not any(module._forward_hooks for module in looked.modules())


# The truth


def test_the_truth_is_the_pages_boxes_without_crowds_and_slivers_and_clipped(script: Any, tmp_path: Path) -> None:
    data = script("--annotations", coco(tmp_path / "coco.json"))
    assert [data["classes"][label] for label in data["truth"]["labels"]] == [NAMES[1], NAMES[2], NAMES[0]]
    boxes = torch.tensor(data["truth"]["boxes"])
    torch.testing.assert_close(boxes, torch.tensor([[8.0, 10, 70, 30], [0, 60, 45, 120], [20, 5, 50, 45]]))


def test_the_losses_of_all_queries_are_the_losses_of_the_page(script: Any, tmp_path: Path) -> None:
    data = script("--annotations", coco(tmp_path / "coco.json"))
    training = freeze_batch_norms(model().train())
    labels, boxes = torch.tensor(data["truth"]["labels"]), cxcywh(torch.tensor(data["truth"]["boxes"]))
    with torch.no_grad():
        output = training(*pad([sized(drawn_page(), 64, CONFIG.data)], 32))
        losses = criterion(output, [Target(labels, boxes, 7, (120, 90))], training.decoder.w, CONFIG.loss)
    assert len(data["queries"]) == 8  # all there are
    for name in ("vfl", "l1", "giou", "fgl", "ddf"):
        columns = zip(*(query["losses"][name] for query in data["queries"]), strict=True)
        said = [None if None in column else sum(column) for column in columns]
        plain = [losses[f"{name}_{head}"].item() if name in ("vfl", "l1", "giou") else None for head in PLAIN]
        expected = [*plain, *losses[name].tolist(), *([None] if name == "ddf" else [])]
        assert said == pytest.approx(expected, abs=1e-4), name


def test_every_head_matches_each_box_and_the_union_takes_one_of_a_querys_votes(script: Any, tmp_path: Path) -> None:
    queries = script("--annotations", coco(tmp_path / "coco.json"))["queries"]
    for head in range(len(HEADS)):
        matched = [query["matched"][head] for query in queries if query["matched"][head] is not None]
        assert sorted(matched) == sorted([0, 1, 2] * (2 if head == 0 else 1))
    for query in queries:
        votes = [i for i in query["matched"] if i is not None]
        most = max(map(votes.count, votes), default=0)
        assert (query["truth"] is None) == (not votes)
        assert query["truth"] is None or votes.count(query["truth"]) == most


def test_the_soft_bins_of_the_truth_move_the_initial_box_onto_it(script: Any, tmp_path: Path) -> None:
    boxes = [query["boxes"][2] for query in script()["queries"]]
    x1, y1, x2, y2 = next(box for box in boxes if min(box) > 0 and box[2] < 90 and box[3] < 120)
    path = coco(tmp_path / "coco.json")
    content = json.loads(path.read_text())
    annotation = content["annotations"][0] | {"bbox": [x1 + 1, y1 - 1, x2 - x1, y2 - y1 + 2]}
    path.write_text(json.dumps(content | {"annotations": [annotation]}))
    data = script("--annotations", path)
    pairs = [query for query in data["queries"] if query["truth"] is not None]
    assert pairs
    for query in pairs:
        initial, w = torch.tensor(query["boxes"][2]), data["w"]
        offsets = torch.tensor([w[int(n)] * left + w[int(n) + 1] * right for n, left, right in query["bins"]])
        if initial.min() > 0 and (initial < PAGE).all() and offsets.abs().max() < 0.99:
            moved = cxcywh_to_xyxy(decode(cxcywh(initial), offsets)) * PAGE
            torch.testing.assert_close(moved, torch.tensor(data["truth"]["boxes"][0]), atol=0.05, rtol=0)
            break
    else:
        pytest.fail("no initial box is near the truth")


def test_a_page_without_boxes_has_a_truth(script: Any, tmp_path: Path) -> None:
    path = coco(tmp_path / "coco.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    data = script("--annotations", path)
    assert data["truth"] == {"labels": [], "boxes": []}
    assert all(query["truth"] is None and set(query["matched"]) == {None} for query in data["queries"])
    assert sum(query["losses"]["vfl"][-1] for query in data["queries"]) > 0


# The file and the command


def test_the_file_needs_nothing_else_and_takes_any_name(script: Any, tmp_path: Path) -> None:
    assert script()["classes"] == NAMES
    text = (tmp_path / "new" / "explain.html").read_text()
    assert set(re.findall(r"https?://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(src=|@import|url\(|fetch\(|<link rel=.stylesheet)", text)


@pytest.mark.skipif(find_spec("pypdfium2") is None, reason="needs the extra `documents`")
def test_without_a_checkpoint_the_weights_in_the_package_explain(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["explain", str(page), "--out", str(tmp_path / "explain.html")])
    explain.main()
    data = data_of(tmp_path / "explain.html")
    assert data["checkpoint"] == "embedded"
    assert "Section-header" in data["classes"]


def test_a_page_of_a_pdf_is_named_by_its_number(script: Any, tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", [("/MediaBox [0 0 90 120]", RED)] * 2)
    assert script("--page", "2", file=tmp_path / "a.pdf")["file"] == f"{tmp_path / 'a.pdf'}, page 2"
    with pytest.raises(PageError, match=r"a.pdf: has no page 3"):
        script("--page", "3", file=tmp_path / "a.pdf")


def test_the_truth_of_a_page_that_lies_on_its_side_turns_with_it(script: Any, page: Path, tmp_path: Path) -> None:
    """The json has the size before the EXIF rotation, and names the file in another form."""
    upright, exif = Image.open(page), Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    path = coco(tmp_path / "coco.json", name="./side.png", width=90)
    expected = script("--annotations", coco(tmp_path / "upright.json"))["truth"]
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": 120, "height": 90}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["bbox"] = [y, 90 - x - w, h, w]
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert script("--annotations", path, file=tmp_path / "side.png")["truth"] == expected


def test_what_cannot_be_explained_is_named(script: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.pt: no such checkpoint"):
        script(checkpoint=tmp_path / "none.pt")
    with pytest.raises(ConfigError, match=r"best.onnx: an ONNX file hides its layers: name the checkpoint"):
        script(checkpoint=tmp_path / "best.onnx")
    with pytest.raises(PageError, match=r"none.png: cannot read the image"):
        script(file=tmp_path / "none.png")
    with pytest.raises(PageError, match=r"none.json: cannot read the annotations"):
        script("--annotations", tmp_path / "none.json")
    with pytest.raises(PageError, match=r"page.png, page 1: .*coco.json has no such image"):
        script("--annotations", coco(tmp_path / "coco.json", name="other.png"))
    with pytest.raises(PageError, match=r"page.png: has 90x120 pixels, .*coco.json says 91x120"):
        script("--annotations", coco(tmp_path / "coco.json", width=91))
    with pytest.raises(ConfigError, match=r"coco.json: has .*, which .*best.pt does not know: "):
        script("--annotations", coco(tmp_path / "coco.json", categories=[*CATEGORIES, {"id": 9, "name": "list"}]))
    assert not (tmp_path / "new").exists()


def test_nothing_but_html_is_overwritten(script: Any, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("--out", page)
    assert f"--out must end in .html, found {page}" in capsys.readouterr().err


def test_a_model_that_is_not_finite_is_named_with_the_page(script: Any, tmp_path: Path) -> None:
    broken = model()
    torch.nn.init.constant_(broken.decoder.class_heads[-1].bias, torch.nan)
    ours.save(tmp_path / "broken.pt", ours.weights(CONFIG, CATEGORIES, broken))
    with pytest.raises(FloatingPointError, match=r"page.png: a detection is not finite"):
        script(checkpoint=tmp_path / "broken.pt")


# The page in a browser


@pytest.fixture
def browser(script: Any, tmp_path: Path) -> Iterator[Browser]:
    script("--annotations", coco(tmp_path / "coco.json"))
    opened = Browser(tmp_path / "new" / "explain.html", tmp_path / "profile")
    yield opened
    opened.close()


SETTLED = "Promise.all(document.getAnimations().map(animation => animation.finished)).then(() => {"
BOX = SETTLED + "const r = document.querySelector('rect.chosen').getBoundingClientRect(); return [r.x, r.y, r.right] })"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_reader_moves_through_time_and_chooses_boxes(browser: Browser, tmp_path: Path) -> None:
    data = data_of(tmp_path / "new" / "explain.html")
    first = data["queries"][0]
    assert browser.run("document.querySelector('#title').textContent").startswith(f"Query {first['query']}: ")
    assert browser.run("document.querySelectorAll('#layers svg').length") == 3 * 4
    assert browser.run("document.querySelectorAll('#points circle').length") == 4 * 4  # heads, points
    assert "</script>" in browser.run("document.body.textContent")  # a class has this name
    assert browser.run("document.querySelector('#verdict table').rows.length") >= 4

    # The slider has the focus; the box is where the data has it at every step.
    last = browser.run(BOX)
    scale = browser.run("document.querySelector('#page').getScreenCTM().a")
    for step in range(len(data["steps"]) - 2, -1, -1):
        browser.press("ArrowLeft", 37)
        assert browser.run("document.querySelector('#stepname').value") == data["steps"][step]
        moved = [scale * (a - b) for a, b in zip(first["boxes"][step], first["boxes"][-1], strict=True)][:3]
        now = browser.run(BOX)
        assert [a - b for a, b in zip(now, last, strict=True)] == pytest.approx(moved, abs=0.5)
    assert max(map(abs, moved)) > 3
    assert browser.run("document.querySelectorAll('#points circle').length") == 0  # no layer has read yet

    # A click on another box.
    plots = browser.run("document.querySelector('#layers').innerHTML")
    browser.run("document.querySelector('#least').value = 0, document.querySelector('#least').oninput()")
    x, y, number = browser.run(
        SETTLED + "for (const rect of document.querySelectorAll('#boxes rect:not(.chosen)')) {"
        "const r = rect.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;"
        "if (document.elementFromPoint(x, y) === rect) return [x, y, rect.dataset.query] } })"
    )
    browser.click(x, y)
    assert browser.run("document.querySelector('#title').textContent").startswith(f"Query {number}: ")
    assert browser.run("document.querySelector('#query').value") == number
    assert browser.run("document.querySelector('#layers').innerHTML") != plots

    # The same by keyboard.
    browser.run("[...document.querySelectorAll('#boxes rect:not(.chosen)')].forEach(rect => rect.focus())")
    number = browser.run("document.activeElement.dataset.query")
    browser.press("Enter", 13)
    assert browser.run("document.querySelector('#title').textContent").startswith(f"Query {number}: ")

    said = [event for event in browser.events if event["method"].startswith(("Runtime.console", "Runtime.exc", "Log."))]
    assert said == []
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} == {"file", "data"}


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_edge_is_plotted_over_the_same_bins_in_all_layers_those_that_matter_and_the_truths(
    browser: Browser, tmp_path: Path
) -> None:
    data = data_of(tmp_path / "new" / "explain.html")
    query = next(query for query in data["queries"] if query["bins"])
    browser.run(f"choose(queries.find(q => q.query === {query['query']}))")
    boxes = browser.run("[...document.querySelectorAll('#layers svg')].map(plot => plot.getAttribute('viewBox'))")
    edges = torch.tensor(query["edges"])  # (L, 4, N + 1)
    for edge in range(4):
        (box,) = set(boxes[edge::4])
        first, _, width, _ = map(float, box.split())
        bins = (edges[:, edge] >= 0.01).any(0).nonzero().flatten().tolist()
        bins += [query["bins"][edge][0], query["bins"][edge][0] + 1]
        assert first == max(0, min(bins) - 1)
        assert first + width - 1 == min(len(data["w"]) - 1, max(bins) + 1)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_is_light_or_dark_as_the_reader_has_it_and_fits_a_laptop(browser: Browser) -> None:
    colour = "getComputedStyle(document.documentElement).{}.match(/[0-9]+/g).map(Number).reduce((a, b) => a + b)"
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        paper, ink = browser.run(colour.format("backgroundColor")), browser.run(colour.format("color"))
        assert (paper > ink) == (scheme == "light")
        assert abs(paper - ink) > 3 * 150
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
