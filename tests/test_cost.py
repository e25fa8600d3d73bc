"""The cost of distillation: what is measured adds up. How long anything takes is not tested."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from test_train import TINY, pages
from tiny import shaken

from dfine import checkpoint, cost
from dfine.config import from_dict
from dfine.model import DFine

NUMBER = r" ([\d.-]+) "


def test_a_table_of_all_parts_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    own = pages(tmp_path / "pages", count=4, empty=(1,))
    tree = TINY | {"data": TINY["data"] | {"train": own, "val": own}, "distill": {"teacher": str(tmp_path / "t.pt")}}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(tree))
    settings = from_dict(tree)
    categories = [{"id": 3, "name": "text"}, {"id": 5, "name": "figure"}]
    checkpoint.save(tmp_path / "t.pt", checkpoint.weights(settings, categories, shaken(DFine(settings.model, 2), 0.02)))
    monkeypatch.setattr(sys, "argv", ["cost", "--config", str(tmp_path / "student.yaml"), "--steps", "2"])
    cost.main()
    printed = capsys.readouterr().out
    plain, distilled, ratio = map(float, re.search(rf"step, ms \|{NUMBER}\|{NUMBER}\|{NUMBER}\|", printed).groups())
    parts = [
        float(re.search(rf"{part}, ms \| \|{NUMBER}\|", printed)[1])
        for part in ("teacher forward", "shared pass", "losses")
    ]
    assert plain + sum(parts) == pytest.approx(distilled, abs=3)  # each is rounded to a millisecond
    assert ratio == pytest.approx(distilled / plain, rel=0.05)
    assert "The teacher's forward pass takes" in printed
    assert not (tmp_path / "runs").exists()


def test_memory_is_compared_without_what_the_program_needs_anyway():
    spent = {"plain": 100.0, "distilled": 180.0, "teacher": 50.0, "losses": 10.0, "student": 25.0}
    table = cost.table(spent, program=1.0, plain=3.0, distilled=4.0)
    assert "| memory beside the program's 1.00 GiB, GiB | 2.00 | 3.00 | 1.50 |" in table
    assert "| shared pass, ms | | 20 | 0.20 |" in table
    assert "2.00 times the student's" in table
