"""A page in, detections out."""

import copy
import pickle
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pdf import RED, write_pdf
from PIL import Image
from tiny import drawn_page, shaken, tiny_config, tiny_model
from torch.utils.data import Dataset
from torchvision.ops import box_iou

import dfine
from dfine.checkpoints import ours
from dfine.config import Config, DataConfig
from dfine.data.sources import SyntheticPages
from dfine.data.transforms import PageError, fit, pad, resize
from dfine.data.workers import PageLoader
from dfine.inference import DEDUPE, pages
from dfine.inference.documents import list_pages
from dfine.inference.pages import Detector, as_it_is, beside_truth
from dfine.inference.pictures import draw
from dfine.model.detector import DFine, detect

CATEGORIES = [{"id": 1, "name": "text"}, {"id": 3, "name": "table"}, {"id": 7, "name": "figure"}]
SMALL = DataConfig(short_edges=(64,), eval_short_edge=64, max_long_edge=96)


def model() -> DFine:
    return shaken(tiny_model()).eval()


def test_a_page_is_prepared_as_in_evaluation() -> None:
    found = Detector(model(), SMALL, CATEGORIES)(drawn_page(), threshold=0.0, dedupe=1.0)
    images, sizes = pad([resize(drawn_page(), fit((120, 90), 64, 96))], 32)
    with torch.no_grad():
        expected = detect(model()(images, sizes), [(120, 90)])[0]
    for own, theirs in zip((found.scores, found.classes, found.boxes), expected, strict=True):
        np.testing.assert_allclose(own, theirs.numpy(), rtol=1e-6)


def test_only_what_reaches_the_threshold_is_given_the_best_first() -> None:
    detector = Detector(model(), SMALL, CATEGORIES)
    everything = detector(drawn_page(), threshold=0.0, dedupe=1.0)
    assert len(everything.scores) == 24  # 8 queries, 3 classes
    assert everything.scores.tolist() == sorted(everything.scores.tolist(), reverse=True)
    some = detector(drawn_page(), float(everything.scores[9]), dedupe=1.0)
    np.testing.assert_array_equal(some.scores, everything.scores[:10])
    np.testing.assert_array_equal(some.boxes, everything.boxes[:10])


def test_deduplication_leaves_no_two_boxes_in_one_place_whatever_their_classes() -> None:
    detector = Detector(model(), SMALL, CATEGORIES)
    everything = detector(drawn_page(), threshold=0.0, dedupe=1.0)
    for found, most in (
        (detector(drawn_page(), threshold=0.0, dedupe=0.5), 0.5),
        (detector(drawn_page(), threshold=0.0), DEDUPE),
    ):
        assert 0 < len(found.boxes) <= 8  # each query says the same box under three names
        np.testing.assert_array_equal(found.boxes[0], everything.boxes[0])
        boxes = torch.from_numpy(found.boxes)
        assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() <= most


def test_a_model_that_says_nan_is_an_error_that_names_the_page(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.mean.fill_(torch.nan)
    Image.fromarray(drawn_page()).save(tmp_path / "page.png")
    with pytest.raises(FloatingPointError, match=r"page.png: a detection is not finite"):
        Detector(broken, SMALL, CATEGORIES)(tmp_path / "page.png")


# The public face


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "best.pt"
    ours.save(path, ours.weights(Config(model=tiny_config(), data=SMALL), CATEGORIES, model()))
    return path


def test_a_detector_finds_the_same_on_files_pil_images_and_arrays(best: Path, tmp_path: Path) -> None:
    page = drawn_page()
    Image.fromarray(page).save(tmp_path / "page.png")
    forms = [tmp_path / "page.png", str(tmp_path / "page.png"), Image.fromarray(page), page]
    expected, *others = dfine.load(best, "cpu")(forms, threshold=0)
    assert {type(label) for label in expected.labels} == {str}
    assert set(expected.labels) <= {"text", "table", "figure"}
    assert expected.boxes.shape == (len(expected.labels), 4)
    assert (expected.boxes >= 0).all()
    assert (expected.boxes <= [90, 120, 90, 120]).all()
    for found in others:
        assert found.labels == expected.labels
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_one_page_gives_one_answer_and_many_a_list(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    page = drawn_page()
    assert isinstance(detector(page), dfine.PageResult)
    assert len(detector([page])) == 1
    assert detector([]) == []
    assert len(detector(page for _ in range(3))) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_pages_of_any_sizes_keep_their_order_and_do_not_depend_on_their_batch(best: Path, batch_size: int) -> None:
    detector = dfine.load(best, "cpu")
    pages = [drawn_page(120, 90), drawn_page(90, 120), drawn_page(300, 60), drawn_page(90, 121), drawn_page(64, 64)]
    for page, found in zip(pages, detector(pages, 0.0, batch_size=batch_size), strict=True):
        alone = detector(page, 0.0)
        assert found.labels == alone.labels
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)


def test_threshold_and_deduplication_are_the_callers(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    everything = detector(drawn_page(), 0.0, 1.0)
    least = float(np.median(everything.scores))
    assert len(detector(drawn_page(), least, 1.0).labels) == (everything.scores >= least).sum()
    assert 0 < len(detector(drawn_page(), 0.0, dedupe=0.3).labels) < len(everything.labels)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (np.zeros((5, 5), np.uint8), r"page 1: expected \(H, W, 3\) uint8 RGB, found \(5, 5\) uint8"),
        (np.zeros((5, 5, 3), np.float32), r"found \(5, 5, 3\) float32"),
        (np.zeros((0, 5, 3), np.uint8), r"found \(0, 5, 3\)"),
        (7, "page 1: expected a path, a PIL image or an array, found int"),
        ("none.png", "none.png: cannot read"),
    ],
    ids=["grey", "floats", "empty", "a number", "no file"],
)
def test_what_is_no_page_is_named(best: Path, page: Any, message: str) -> None:
    with pytest.raises(PageError, match=message):
        dfine.load(best, "cpu")([drawn_page(), page])


def test_a_detector_knows_its_classes_and_is_deployed(best: Path) -> None:
    detector = dfine.load(best, "cpu")
    assert detector.categories == CATEGORIES
    assert isinstance(detector.model, dfine.DFine)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in detector.model.encoder.modules())
    found = detector(drawn_page(), 0.0)
    assert [CATEGORIES[place]["name"] for place in found.classes] == found.labels


# Documents


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """A folder with a PDF of two pages, a TIFF of two, an image, and a PDF whose second page of three is broken."""
    first, second = Image.fromarray(drawn_page()), Image.fromarray(drawn_page(90, 120))
    pytest.importorskip("pypdfium2", reason="needs the extra `documents`")
    write_pdf(tmp_path / "a.pdf", [("/MediaBox [0 0 90 120] /Rotate 90", RED), ("/MediaBox [0 0 120 90]", RED)])
    first.save(tmp_path / "b.tif", save_all=True, append_images=[second])
    first.save(tmp_path / "c.png")
    write_pdf(tmp_path / "d.pdf", [("/MediaBox [0 0 90 120]", RED)] * 3, broken=1)
    return tmp_path


def test_what_a_path_gives(best: Path, documents: Path) -> None:
    detector = dfine.load(best, "cpu")
    assert [found.page for found in detector(documents / "a.pdf")] == [1, 2]
    assert [found.page for found in detector(documents / "b.tif")] == [1, 2]
    assert [found.page for found in detector(str(documents / "a.pdf"), numbers="2")] == [2]
    assert isinstance(detector(documents / "c.png"), dfine.PageResult)
    Image.fromarray(drawn_page()).save(documents / "one.tif")
    assert isinstance(detector(documents / "one.tif"), dfine.PageResult)
    found = detector([documents / "c.png", drawn_page(), documents / "a.pdf"])
    assert [(page.file and page.file.name, page.page) for page in found] == [
        ("c.png", 1),
        (None, 1),
        ("a.pdf", 1),
        ("a.pdf", 2),
    ]


def test_every_page_of_a_folder_is_found_and_what_cannot_be_read_is_told(best: Path, documents: Path) -> None:
    errors: list[PageError] = []
    found = dfine.load(best, "cpu")(documents, on_error=errors.append)
    assert [(page.file and page.file.name, page.page) for page in found] == [
        ("a.pdf", 1),
        ("a.pdf", 2),
        ("b.tif", 1),
        ("b.tif", 2),
        ("c.png", 1),
        ("d.pdf", 1),
        ("d.pdf", 3),
    ]
    (error,) = errors
    assert str(error).startswith(f"{documents / 'd.pdf'}, page 2: cannot read the page")
    with pytest.raises(PageError, match=r"d.pdf, page 2"):
        dfine.load(best, "cpu")(documents)


def test_pages_of_pdfs_have_pixels_and_points(best: Path, documents: Path) -> None:
    rotated, upright = dfine.load(best, "cpu")(documents / "a.pdf", 0.0, dpi=36)
    assert (rotated.size, upright.size) == ((45, 60), (45, 60))
    assert rotated.points is not None
    assert upright.points is not None
    x1, y1, x2, y2 = upright.boxes.T
    np.testing.assert_allclose(upright.points, 2 * np.stack([x1, 45 - y2, x2, 45 - y1], axis=1))
    x1, y1, x2, y2 = rotated.boxes.T  # turned clockwise: what is up on paper is right, what is right is down
    np.testing.assert_allclose(rotated.points, 2 * np.stack([y1, x1, y2, x2], axis=1))
    assert dfine.load(best, "cpu")(documents / "c.png").points is None


def test_worker_processes_change_nothing(best: Path, documents: Path) -> None:
    detector = dfine.load(best, "cpu")
    pages = list(list_pages([documents]))
    alone = list(detector.stream(pages, 0.0, on_error=lambda _: None))
    for own, theirs in zip(detector.stream(pages, 0.0, workers=2, on_error=lambda _: None), alone, strict=True):
        assert (own.file, own.page, own.labels) == (theirs.file, theirs.page, theirs.labels)
        np.testing.assert_array_equal(own.boxes, theirs.boxes)


def test_images_of_16_bits_are_the_same_to_worker_processes(best: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "page.png"), drawn_page().astype(np.uint16) * 4)  # colours of 10 bits
    detector = dfine.load(best, "cpu")
    own, theirs = (detector([Image.open(tmp_path / "page.png")], 0.0, workers=workers)[0] for workers in (0, 1))
    np.testing.assert_array_equal(theirs.boxes, own.boxes)


def test_another_programs_signal_handlers_stay_and_pages_are_read_in_any_thread(best: Path) -> None:
    detector, numbers = dfine.load(best, "cpu"), [signal.SIGCHLD, signal.SIGINT, signal.SIGTERM]
    before = [signal.getsignal(number) for number in numbers]
    mine = [lambda *_: None for _ in numbers]
    for number, handler in zip(numbers, mine, strict=True):
        signal.signal(number, handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            (found,) = pool.submit(detector, [drawn_page()], 0.0, workers=1).result(timeout=100)
        (again,) = detector([drawn_page()], 0.0, workers=1)
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    np.testing.assert_array_equal(found.boxes, again.boxes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_programs_precision_changes_nothing(best: Path, dtype: torch.dtype) -> None:
    detector = dfine.load(best, "cpu")
    expected = detector(drawn_page(), 0.0)
    torch.set_default_dtype(dtype)
    try:
        found = [detector(drawn_page(), 0.0), dfine.load(best, "cpu")(drawn_page(), 0.0)]
    finally:
        torch.set_default_dtype(torch.float32)
    for own in found:
        np.testing.assert_array_equal(own.boxes, expected.boxes)


@pytest.mark.filterwarnings("ignore:page 0")
@pytest.mark.parametrize("tiles", [False, True])
def test_another_programs_device_changes_nothing(best: Path, monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    detector, page = dfine.load(best, "cpu"), drawn_page(300, 60)
    expected = detector(page, 0.0, tiles=tiles)
    # What is made on `meta` by mistake cannot be computed with. torch's own loader and random numbers cannot, either.
    monkeypatch.setattr(pages, "PageLoader", lambda reader, sampler, **_: map(reader.__getitem__, sampler))
    monkeypatch.setattr(torch, "Generator", lambda device: device)
    torch.set_default_device("meta")
    try:
        found = detector(page, 0.0, tiles=tiles)
    finally:
        torch.set_default_device(None)
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_another_programs_random_numbers_stay(best: Path) -> None:
    detector, state = dfine.load(best, "cpu"), torch.get_rng_state()
    detector([drawn_page(), drawn_page()], 0.0)
    assert torch.equal(torch.get_rng_state(), state)


class Threads(Dataset):
    """How many threads OpenCV has where an item is read."""

    def __getitem__(self, _: int) -> int:
        return cv2.getNumThreads()

    def __len__(self) -> int:
        return 1


def test_opencvs_threads_are_another_programs_too_and_only_workers_do_without() -> None:
    line = "import cv2; cv2.setNumThreads(3); from dfine.inference import pages; print(cv2.getNumThreads())"
    said = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True).stdout
    assert said == "3\n"
    cv2.setNumThreads(3)
    loader: Any = PageLoader(Threads(), as_it_is, batch_size=None, num_workers=1)
    assert list(loader) == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
@pytest.mark.parametrize("fast", [True, False])
def test_a_copy_of_a_detector_finds_the_same_with_weights_of_its_own(
    best: Path, fast: bool, copied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    detector = dfine.load(best, "cpu", fast=fast)
    twin = copied(detector)
    expected, found = detector(drawn_page(), 0.0), twin(drawn_page(), 0.0)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    with torch.no_grad():
        for weight in detector.model.parameters():
            weight.zero_()
    np.testing.assert_array_equal(twin(drawn_page(), 0.0).scores, expected.scores)


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 50}, {"threshold": float("nan")}, {"dedupe": -0.1}, {"batch_size": 0}, {"dpi": 0}],
    ids=str,
)
def test_an_argument_that_means_nothing_is_refused(best: Path, wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"{name}.* must be .*, found "):
        dfine.load(best, "cpu").stream([drawn_page()], **wrong)


@pytest.mark.parametrize("size", [(64, 64), (120, 90)], ids=["the model's size", "another"])
@pytest.mark.parametrize("view", [lambda page: page[:, :, ::-1], np.flipud, lambda page: np.rot90(page, 2)])
def test_views_of_arrays_are_pages(best: Path, view: Any, size: tuple[int, int]) -> None:
    detector, page = dfine.load(best, "cpu"), view(drawn_page(*size))
    found = detector(page, 0.0)
    np.testing.assert_array_equal(found.boxes, detector(page.copy(), 0.0).boxes)
    page.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector(page)


def test_an_image_without_pixels_is_told_and_the_others_go_on(best: Path) -> None:
    errors: list[PageError] = []
    found = dfine.load(best, "cpu")([Image.new("RGB", (0, 10)), drawn_page()], on_error=errors.append)
    assert [str(error) for error in errors] == ["page 0: cannot read the image: it has no pixels"]
    assert len(found) == 1


# Long pages


@pytest.mark.parametrize("wide", [False, True])
def test_a_long_page_is_told_once_a_file_and_windows_find_what_is_on_its_parts(
    best: Path, tmp_path: Path, wide: bool
) -> None:
    """Two pages that are one image are seen in windows that show each of them alone."""
    detector, pages = dfine.load(best, "cpu"), [drawn_page(120, 80), 255 - drawn_page(120, 80)]
    if wide:
        pages = [page.transpose(1, 0, 2) for page in pages]
    long = Image.fromarray(np.concatenate(pages, axis=int(wide)))
    long.save(tmp_path / "long.tif", save_all=True, append_images=[long])
    shape = "wider than long" if wide else "longer than wide"
    with pytest.warns(UserWarning, match=rf"long.tif, page 1: .* pixels are much {shape}: the model sees ") as told:
        detector(tmp_path / "long.tif")
    assert len([warning for warning in told if "much" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = detector(tmp_path / "long.tif", 0.0, 1.0, tiles=True, workers=1)
    assert found.size == np.array(long).shape[:2]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    for i, page in enumerate(pages):
        alone, start = detector(page, 0.0, 1.0), 120 * i
        shift = np.array([start, 0, start, 0] if wide else [0, start, 0, start])
        inner = alone.boxes[:, 0 if wide else 1] > 65 if i else alone.boxes[:, 2 if wide else 3] < 55
        for box, label in zip(alone.boxes[inner] + shift, alone.classes[inner], strict=True):
            assert (np.abs(found.boxes[found.classes == label] - box).max(1) < 1e-3).any()
    assert detector(pages[0], 0.0, tiles=True).boxes.tolist() == detector(pages[0], 0.0).boxes.tolist()


def test_pages_are_read_as_they_are_asked_for(best: Path) -> None:
    taken = 0

    def pages() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield drawn_page(64, 64 + 32 * (taken % 2))

    stream = dfine.load(best, "cpu").stream(pages(), batch_size=2)
    for _ in range(20):
        next(stream)
    assert taken < 20 + 3 * 2


def test_fast_means_half_precision_on_a_cpu_that_multiplies_it(best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    kinds = {fast: next(dfine.load(best, "cpu", fast=fast).model.encoder.parameters()).dtype for fast in (False, True)}
    assert kinds == {False: torch.float32, True: torch.bfloat16}


def test_an_evaluations_picture_is_what_a_detector_gives_beside_the_truth(best: Path) -> None:
    detector, pages = dfine.load(best, "cpu"), SyntheticPages(1, seed=0)
    detector.categories = pages.categories
    page, labels, boxes = pages.read(0)
    names = [category["name"] for category in pages.categories]
    result = detector(page)
    halves = draw(page, result.classes, result.boxes, names, result.scores), draw(page, labels, boxes, names)
    drawn = beside_truth(detector.model, pages, 0, detector.data)
    height, width = page.shape[:2]
    for x, half in zip((8, 8 + width + 8), halves, strict=True):
        assert (drawn[-8 - height : -8, x : x + width] == half).all()
        assert (drawn[8 : -8 - height, x : x + width] == 0).any()  # a heading
