"""What is installed, and what pyproject.toml says of it."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

import dfine

ROOT = Path(__file__).parents[1]


def bounds(lines: list[str], operator: str) -> dict[str, Version]:
    """The version of each requirement, which must be its only condition."""
    versions = {}
    for requirement in map(Requirement, lines):
        (condition,) = requirement.specifier
        assert condition.operator == operator, requirement
        versions[requirement.name] = Version(condition.version)
    return versions


def test_the_lower_bounds_are_those_that_the_suite_runs_with() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    tried = [line for line in (ROOT / "tests/lowest.txt").read_text().splitlines() if not line.startswith("#")]
    assert bounds(declared, ">=") == bounds(tried, "==")


def test_the_version_is_said_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dfine.__version__"}
    assert str(Version(dfine.__version__)) == dfine.__version__
