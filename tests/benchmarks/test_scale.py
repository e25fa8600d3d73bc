"""The table of a large data set, of a small one."""

import sys
from pathlib import Path

import pytest
import scale
from processes import skip_where_groups_hang


def test_the_table_has_reading_copies_and_evaluation_and_the_processes_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    skip_where_groups_hang()
    size = ["--pages", "30", "--boxes", "200", "--evaluated", "20"]
    monkeypatch.setattr(sys, "argv", ["scale", "--out", str(tmp_path / "made"), *size, "--processes", "1", "2"])
    scale.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capfd.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["1"] * 4 + ["2"] * 3
    assert rows[3][0] == rows[6][0]  # the same AP to the last digit
    assert 0.05 < float(rows[3][0].split()[-1]) < 1
    assert all(float(row[4] or 0) < 500 for row in rows)
