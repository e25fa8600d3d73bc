"""Recorded numbers of the original implementation, and what it means to agree with them.

In a file `in.*` are inputs, `cfg.*` settings, `sd.*` the original's weights under its own names; all the rest is
expected results. Files in tests/golden/ are those of the original's recording, some with fewer cases.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfine import official
from dfine.structures import Target


class Deviation(NamedTuple):
    """How far a part is from the original at worst."""

    largest: float  # |got - expected|
    magnitude: float  # of the largest number in that array
    test: str


class Golden:
    """One file of recorded arrays, read as tensors."""

    def __init__(self, path: Path, part: str = "", test: str = "", deviations: dict[str, Deviation] | None = None):
        """`deviations` keeps the largest deviation of each part; `part` and `test` say whose these are."""
        if not path.exists():
            pytest.fail(f"{path} is missing")
        self.arrays = np.load(path, allow_pickle=False)
        self.path, self.part, self.test = path, part, test
        self.deviations = {} if deviations is None else deviations
        self.uncompared = {name for name in self.arrays.files if not name.startswith(("in.", "cfg.", "sd."))}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.arrays:
            pytest.fail(f"{self.path} lacks {name}")
        self.uncompared.discard(name)
        return torch.from_numpy(self.arrays[name])

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def number(self, name: str) -> float:
        return self[name].item()

    def under(self, prefix: str) -> list[str]:
        """What follows the prefix in the names that start with it."""
        return [name.removeprefix(prefix) for name in self.arrays.files if name.startswith(prefix)]

    def cases(self, prefix: str = "in.") -> list[str]:
        """The next word after the prefix, each once."""
        return list(dict.fromkeys(name.split(".")[0] for name in self.under(prefix)))

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {name: self[prefix + name] for name in self.under(prefix)}

    def targets(self, prefix: str) -> list[Target]:
        """The truth of each page; its image id is its number in the batch."""
        pages = [f"{prefix}target.{page}." for page in self.cases(f"{prefix}target.")]
        return [Target(self[f"{p}labels"], self[f"{p}boxes"], i, (480, 640)) for i, p in enumerate(pages)]

    def check(self, got: Tensor, name: str, where: Tensor | None = None, expected: Tensor | None = None) -> None:
        """Asserts that `got` is the array of that name, and keeps the deviation.

        Args:
            where: bool mask of the elements to compare; None: all.
            expected: what to compare with instead of the array as it is recorded.
        """
        expected = self[name] if expected is None else expected
        assert got.shape == expected.shape, f"{name}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
        if where is not None:
            got, expected = got[where], expected[where]
        largest, magnitude = assert_close(got.detach(), expected, name)
        part = f"{self.part}: gradients" if name.startswith("grad.") else self.part
        if part not in self.deviations or largest > self.deviations[part].largest:
            self.deviations[part] = Deviation(largest, magnitude, self.test)


def assert_close(got: Tensor, expected: Tensor, name: str) -> tuple[float, float]:
    """Whole numbers and masks exactly; floats within about ten times the noise of float32, gradients (`grad.*`) wider.

    Returns:
        The largest deviation, and the largest magnitude that was expected.
    """
    if not expected.is_floating_point():
        assert got.equal(expected), name
        return 0.0, 0.0
    if not expected.numel():
        return 0.0, 0.0
    magnitude = expected.double().abs().max().item()
    largest = (got.double() - expected.double()).abs().max().item()
    tolerance = 5e-4 * magnitude + 1e-6 if name.startswith("grad.") else 2e-4 * magnitude + 1e-5
    assert largest <= tolerance, f"{name}: off by {largest:.2e}, allowed {tolerance:.2e}"
    return largest, magnitude


# Weights of parts: official.our_name knows the names of whole models


def renamed(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """The state of a part that stands under `theirs` in the original, by the names of our part under `ours`."""
    full = {theirs + name: tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in full.items() if not official.DERIVED.search(name)}
    return {official.our_name(name).removeprefix(ours): tensor for name, tensor in kept.items()}


def check_gradients(golden: Golden, prefix: str, module: nn.Module, theirs: str, ours: str) -> None:
    """Of every recorded weight of a part; every weight of ours that has a gradient must be among them."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    names = {official.our_name(theirs + name).removeprefix(ours): name for name in golden.under(prefix)}
    assert names.keys() == gradients.keys()
    for our_name, name in names.items():
        golden.check(gradients[our_name], prefix + name)
