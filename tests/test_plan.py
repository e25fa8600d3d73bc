"""The plan of the house: imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each wing may import, beside itself and the ground. Modules at the root are ground or, if named here, doors.
GROUND = {"arguments", "config", "structures", "boxes", "distributed", "files"}
MAY_IMPORT = {
    "model": set(),
    "losses": {"model"},
    "data": set(),
    "checkpoints": {"model", "data"},
    "inference": {"model", "data", "checkpoints"},
    "training": {"model", "losses", "data", "checkpoints", "inference"},
}
DOORS = {"__init__", "contact_sheet", "explain", "export", "predict", "synthetic"}


def place(module: str) -> str:
    """The wing, or the module of the root, that a dotted name of ours lies in."""
    return [*module.split("."), "__init__"][1]


def upward_imports(root: Path) -> list[str]:
    """`file:line: what it imports` for each import in `root`/dfine that does not follow the plan."""
    wrong = []
    for path in sorted((root / "dfine").rglob("*.py")):
        own = place(".".join(path.relative_to(root).with_suffix("").parts))
        allowed = GROUND | {own}
        if own in DOORS:
            allowed |= MAY_IMPORT.keys()
        elif own not in GROUND:
            allowed |= MAY_IMPORT[own]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
                whole = node.module == "dfine"  # `from dfine import config` names modules of the root
                names = [f"dfine.{alias.name}" for alias in node.names] if whole else [str(node.module)]
            ours = [name for name in names if name.split(".")[0] == "dfine"]
            wrong += [f"{path}:{node.lineno}: {name}" for name in ours if place(name) not in allowed]
    return wrong


def test_imports_point_one_way() -> None:
    assert upward_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("boxes.py", "from dfine.model.fdr import decode"),
        ("config.py", "from dfine import model"),
        ("model/fdr.py", "from dfine.losses.golsd import union"),
        ("model/decoder.py", "import dfine.data.sources"),
        ("losses/golsd.py", "from dfine.training import run"),
        ("data/synthetic/ink.py", "from dfine.model.fdr import decode"),
        ("inference/pages.py", "def late():\n    from dfine.training.run import Run"),
        ("model/fdr.py", "from dfine import load"),
    ],
)
def test_an_upward_import_is_named_with_its_file_and_line(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / "dfine" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"import torch\n{line}\n")
    (found,) = upward_imports(tmp_path)
    assert found.startswith(f"{path}:{2 if line.startswith(('from', 'import')) else 3}: dfine")
