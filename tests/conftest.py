"""Recorded numbers of the original implementation for the tests that compare with them.

A test marked `golden(files, part)` runs once for each file that fits the pattern, from tests/golden/ or from the folder
of `pytest tests --golden DIR`; a file that tests/golden/ has and DIR lacks is a failure, and so is an expected result
that the test leaves uncompared. With `-v` the largest deviation of each part is printed at the end.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from recorded import Golden
from scripts import TINY, pages, train
from torch import Tensor

SHIPPED = Path(__file__).parent / "golden"
HAS_GPU = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, metavar="DIR", help="compare with the recorded numbers of this folder")
    parser.addoption("--sizes", default="n", metavar="nsmlx", help="published sizes to compare with transformers")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny tensors gain nothing from more, and wait long for them on a busy machine
    config.addinivalue_line("markers", "golden(files, part): runs on recorded files; part: its line in the table")
    config.addinivalue_line(
        "markers", "cuda: runs on a GPU, and is skipped where there is none; all others run on the CPU"
    )


@pytest.fixture(autouse=True)
def one_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `cuda` see a GPU: on a CPU the same run gives the same bits."""
    if request.node.get_closest_marker("cuda") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that the test starts
    elif not HAS_GPU:
        pytest.skip("needs a GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is not None:
        folders = {SHIPPED, metafunc.config.getoption("golden") or SHIPPED}
        names = sorted({path.name for folder in folders for path in folder.glob(marker.args[0])})
        assert names, f"no recorded file fits {marker.args[0]}"
        metafunc.parametrize("golden", names, indirect=True, ids=lambda name: Path(name).stem)


@pytest.fixture(scope="session")
def golden_folder(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("golden") or SHIPPED


@pytest.fixture
def golden(request: pytest.FixtureRequest, golden_folder: Path) -> Iterator[Golden]:
    """The recorded file of this run of a marked test."""
    part = request.node.get_closest_marker("golden").args[1]
    file = Golden(golden_folder / request.param, part, request.node.user_properties)
    failed = request.session.testsfailed
    yield file
    if request.session.testsfailed == failed:
        assert not file.uncompared, f"{file.path}: not compared: {', '.join(sorted(file.uncompared))}"


@pytest.fixture(scope="session")
def nano_checkpoint(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original's D-FINE-N as the original saves it, from the recorded weights."""
    state: dict[str, Tensor] = {}
    for name in sorted(path.name for path in SHIPPED.glob("15_n_weights_part*.npz")):
        state |= Golden(golden_folder / name).state("sd.")
    path = tmp_path_factory.mktemp("official") / "dfine_n_coco.pth"
    torch.save({"model": state}, path)
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, in Markdown."""
    worst: dict[str, tuple[float, float, str]] = {}
    for report in terminalreporter.getreports("passed"):
        test = report.location[2].partition("[")[0]
        for part, *deviation in (value for name, value in report.user_properties if name == "deviation"):
            worst[part] = max((*deviation, test), worst.get(part, (0.0, 0.0, "")))
    if worst and config.option.verbose > 0:
        terminalreporter.section("largest deviation from the original")
        terminalreporter.line("| part | largest deviation | among numbers up to | test |\n|---|---|---|---|")
        for part, (largest, magnitude, test) in worst.items():
            terminalreporter.line(f"| {part} | {largest:.2g} | {magnitude:.2g} | `{test}` |")


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    own = pages(folder / "pages", empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder / "tiny.yaml"


@pytest.fixture(scope="session")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(config, folder)
    return folder
