"""What is installed, and what pyproject.toml says of it."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

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
