"""pytest's option `--golden DIR`: compare with recorded numbers of the original in another folder (tests/conftest.py).

A plugin (pyproject.toml names it), since pytest reads its command line before it looks for tests/conftest.py, and takes
the DIR behind an option that it does not know yet for the folder of the tests.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "recorded numbers of the original to compare with, in files named as in tests/golden"
    parser.addoption("--golden", type=Path, metavar="DIR", help=help)
