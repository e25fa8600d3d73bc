"""python -m dfine.synthetic as users start it."""

import sys

import pytest

from dfine import synthetic


def test_the_command_line_writes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(tmp_path), "--pages", "1", "--seed", "3"])
    synthetic.main()
    assert (tmp_path / "images" / "000000.png").exists()


def test_the_command_line_refuses_to_write_no_pages_and_names_the_value(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["synthetic", "--out", str(tmp_path / "new"), "--pages", "-2"])
    with pytest.raises(SystemExit):
        synthetic.main()
    assert "-2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
