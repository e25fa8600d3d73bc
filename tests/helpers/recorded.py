"""Recorded numbers of the original implementation, and what it means to agree with them.

In a file `in.*` are inputs, `cfg.*` settings, `sd.*` the original's weights under its own names; all the rest is
expected results. Files in tests/golden/ are those of the original's recording, some with fewer cases.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfine.checkpoints import original
from dfine.config import BackboneConfig, ModelConfig
from dfine.model.detector import DFine
from dfine.model.hybrid_encoder import ConvNorm, sincos_positions
from dfine.structures import DFineOutput, NoisedTruth, Prediction, Refinement, Target


class Golden:
    """One file of recorded arrays, read as tensors."""

    def __init__(self, path: Path, part: str = "", properties: list[tuple[str, object]] | None = None):
        """`properties`, such as a test's `user_properties`, keeps each `deviation` and says of which part it is."""
        if not path.exists():
            pytest.fail(f"{path} is missing")
        self.arrays = np.load(path, allow_pickle=False)
        self.path, self.part = path, part
        self.properties = [] if properties is None else properties
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
        part = f"{self.part}: gradients" if name.startswith("grad.") else self.part
        self.properties.append(("deviation", (part, *assert_close(got.detach(), expected, name))))


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


def check_bins(golden: Golden, prefix: str, left: Tensor, left_weight: Tensor, right_weight: Tensor) -> None:
    """Left bins and the weights of both, but not where a rounding error chooses between two that mean the same."""
    bins = golden[f"{prefix}index"].floor()  # from W(N) on, the original says N - 0.1
    place = bins + golden[f"{prefix}weight_right"]
    between = (place - place.round()).abs() > 1e-4
    golden.check(left.to(bins.dtype), f"{prefix}index", between, expected=bins)
    golden.check(left_weight, f"{prefix}weight_left", between)
    golden.check(right_weight, f"{prefix}weight_right", between)


def column_major_positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """The original's: the k-th token of a row-major map gets the place of the k-th cell counted down the columns."""
    return sincos_positions(width, height, dim, device)


# Weights of parts: original.our_name knows the names of whole models


def renamed(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """The state of a part that stands under `theirs` in the original, by the names of our part under `ours`."""
    full = {theirs + name: tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in full.items() if not original.DERIVED.search(name)}
    return {original.our_name(name).removeprefix(ours): tensor for name, tensor in kept.items()}


def check_gradients(golden: Golden, prefix: str, module: nn.Module, theirs: str, ours: str) -> None:
    """Of every recorded weight of a part; every weight of ours that has a gradient must be among them."""
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    names = {original.our_name(theirs + name).removeprefix(ours): name for name in golden.under(prefix)}
    assert names.keys() == gradients.keys()
    for our_name, name in names.items():
        golden.check(gradients[our_name], prefix + name)


# The model behind the encoder ("transformer" in the original)


class Given(nn.Module):
    """Stands for backbone and encoder: these maps, whatever the images."""

    def __init__(self, maps: list[Tensor]):
        super().__init__()
        self.maps = maps

    def forward(self, *_: object) -> list[Tensor]:
        return self.maps


def transformer(state: dict[str, Tensor], queries: int, maps: list[Tensor]) -> DFine:
    """A model with the original's weights behind the encoder, and the encoder's maps given."""
    whole = {f"decoder.{name}": tensor for name, tensor in state.items()}
    decoder = original.decoder_config(whole).model_copy(update={"queries": queries})
    classes, dim = state["enc_score_head.weight"].shape
    backbone = BackboneConfig(name="test_convnext", pretrained=False)
    strides = (8, 16, 32)[-len(maps) :]
    model = DFine(ModelConfig(backbone=backbone, strides=strides, hidden_dim=dim, decoder=decoder), classes)
    model.backbone = model.encoder = Given(maps)
    widths = [x.shape[1] for x in maps]  # the original projects only those maps that need it
    model.projections = nn.ModuleList(ConvNorm(w, dim, 1) if w != dim else nn.Identity() for w in widths)
    model.load_state_dict({"mean": model.mean, "std": model.std, **renamed(state, "decoder.", "")})
    return model


def answer(model: DFine, noised: NoisedTruth | None = None) -> DFineOutput:
    """What a `transformer` makes of its maps; the images only have to be as many."""
    return model(torch.zeros(len(model.backbone.maps[0]), 3, 1, 1), noised=noised)


def named(output: DFineOutput) -> dict[str, Tensor]:
    """A training output under the original's names."""
    layers = len(output.refined.logits)
    arrays = layer_arrays(output.refined, layer_names(layers))
    arrays |= head_arrays(output.initial, "pre_outputs.") | head_arrays(output.encoder, "enc_aux_outputs.0.")
    if output.denoising is not None:
        arrays |= layer_arrays(output.denoising.refined, [f"dn_outputs.{i}." for i in range(layers)])
        arrays |= head_arrays(output.denoising.initial, "dn_pre_outputs.")
    return arrays


def layer_names(layers: int) -> list[str]:
    """What the original puts before the names of each decoder layer's arrays."""
    return [*(f"aux_outputs.{i}." for i in range(layers - 1)), ""]


def layer_arrays(refined: Refinement, names: list[str]) -> dict[str, Tensor]:
    arrays: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        arrays |= head_arrays(Prediction(refined.logits[i], refined.boxes[i]), name)
        arrays[f"{name}pred_corners"] = refined.edge_logits[i].flatten(-2)
        arrays[f"{name}ref_points"] = refined.initial_boxes
        arrays[f"{name}teacher_corners"] = refined.edge_logits[-1].flatten(-2)
        arrays[f"{name}teacher_logits"] = refined.logits[-1]
    return arrays


def head_arrays(head: Prediction, name: str) -> dict[str, Tensor]:
    return {f"{name}pred_logits": head.logits, f"{name}pred_boxes": head.boxes}
