"""python -m dfine.synthetic as users start it."""

import runpy
from pathlib import Path

import pytest
from processes import in_use

from dfine import synthetic


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["synthetic", *map(str, arguments)])
    runpy.run_path(str(synthetic.__file__), run_name="__main__")


def test_the_command_line_writes_a_folder_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, "--out", tmp_path, "--pages", 1, "--seed", 3)
    assert (tmp_path / "images" / "000000.png").exists()
    assert str(tmp_path / "annotations.json") in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [("--pages", -2), ("--pages", 1, "--seed", -5)])
def test_numbers_that_mean_nothing_are_named(
    wrong: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        start(monkeypatch, "--out", tmp_path / "new", *wrong)
    assert stopped.value.code == 2
    assert str(wrong[-1]) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file") as stopped:
        start(monkeypatch, "--out", tmp_path / "file", "--pages", 1)
    assert "\n" not in str(stopped.value.code)


def test_a_folder_that_another_process_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_use(tmp_path / "out") as process, pytest.raises(SystemExit, match=rf"--out: .* by process {process} on "):
        start(monkeypatch, "--out", tmp_path / "out", "--pages", 1)
    assert not (tmp_path / "out" / "images").exists()
