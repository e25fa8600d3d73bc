"""Optimizers, what they train, and the average of the weights."""

import copy
import math

import pytest
import torch
from timm.optim.muon import Muon as TimmMuon
from tiny import tiny_model
from torch import nn

from dfine.config import TrainConfig
from dfine.training.optim import average_decay, learning_rate, optimizer, parameter_groups, set_learning_rate


def test_the_average_forgets_faster_while_it_is_young_and_reaches_its_decay_after_some_warm_ups():
    decays = [average_decay(step, TrainConfig()) for step in (0, 999, 9_999)]
    assert decays == pytest.approx([0.9999 * 0.0009995, 0.9999 * 0.6321206, 0.9999 * 0.9999546], rel=1e-6)
    assert average_decay(9, TrainConfig(ema_decay=0.5, ema_warmup=1)) == pytest.approx(0.5, abs=1e-4)


def with_gradients(model: nn.Module, seed: int, frozen: str = "none of them") -> None:
    """Random gradients for all weights but those whose names start with `frozen`."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.grad = None if name.startswith(frozen) else torch.randn_like(parameter)


def test_norms_and_biases_do_not_decay_and_classes_and_depthwise_convolutions_keep_adamw():
    model = tiny_model()
    groups = {group["name"]: group for group in parameter_groups(model, TrainConfig(muon_factor=10))}
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {
        "backbone, no decay",
        "head, no decay",
    }
    assert {name for name, group in groups.items() if group["muon"]} == {"backbone, Muon", "head, Muon"}
    for name, group in groups.items():
        assert all((parameter.dim() > 1) != name.endswith("no decay") for parameter in group["params"]), name
    of_muon = {id(p) for name in ("backbone, Muon", "head, Muon") for p in groups[name]["params"]}
    depthwise = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert depthwise
    for weight in (model.selection.class_head.weight, model.denoising_labels.weight, *depthwise):
        assert id(weight) not in of_muon
    assert id(model.selection.project.weight) in of_muon
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert not any(group["muon"] for group in parameter_groups(model, TrainConfig()))


def test_a_step_of_muon_is_timms_for_each_matrix_and_torchs_adamw_for_the_rest():
    config = TrainConfig(muon_factor=10, learning_rate=1e-3, weight_decay=0.1)
    torch.manual_seed(0)
    model = tiny_model()
    timms = copy.deepcopy(model)
    ours = optimizer(model, config)
    theirs = []
    for group in parameter_groups(timms, config):
        settings = {"lr": 1e-3 * group["factor"], "weight_decay": group["weight_decay"]}
        if group["muon"]:
            theirs.append(TimmMuon(group["params"], nesterov=True, ns_steps=3, ns_coefficients="original", **settings))
        else:
            theirs.append(torch.optim.AdamW(group["params"], **settings))
    set_learning_rate(ours, 1e-3)
    for seed in range(3):
        with_gradients(model, seed)
        with_gradients(timms, seed)
        for each in (ours, *theirs):
            each.step()
    for (name, one), other in zip(model.named_parameters(), timms.parameters(), strict=True):
        of_muon = "momentum" in ours.state[one]  # in another precision than timm's on some CPUs
        torch.testing.assert_close(
            one, other, rtol=0, atol=1e-4 if of_muon else 1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_muon_moves_matrices_along_orthogonal_directions():
    torch.manual_seed(0)
    model = tiny_model()
    weight = model.selection.project.weight
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    gradient = weight.grad.clone()
    muon = optimizer(model, TrainConfig(muon_factor=10, weight_decay=0))
    set_learning_rate(muon, 1e-3)
    muon.step()
    given, taken = torch.linalg.svdvals(gradient), torch.linalg.svdvals(before - weight.detach())
    assert taken.max() / taken.min() < 0.1 * given.max() / given.min()
    assert taken.max() / taken.median() < 0.7 * given.max() / given.median()
    assert (before - weight).square().mean().sqrt().item() == pytest.approx(0.2 * 10 * 1e-3, rel=0.25)


def test_weights_without_a_gradient_stay_as_they_are():
    model = tiny_model()
    muon = optimizer(model, TrainConfig(muon_factor=10))
    with_gradients(model, seed=0)
    muon.step()  # now all have a momentum
    before = copy.deepcopy(model.state_dict())
    with_gradients(model, seed=1, frozen="backbone.")
    muon.step()
    for name, _ in model.named_parameters():
        assert torch.equal(model.state_dict()[name], before[name]) == name.startswith("backbone."), name


@pytest.mark.parametrize("factor", [0, 10])
def test_an_optimizer_goes_on_from_its_state(factor: float):
    config, whole = TrainConfig(muon_factor=factor), tiny_model()
    first = optimizer(whole, config)
    with_gradients(whole, seed=0)
    first.step()
    resumed = copy.deepcopy(whole)
    second = optimizer(resumed, config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, own in ((whole, first), (resumed, second)):
        with_gradients(model, seed=1)
        own.step()
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_without_a_factor_there_is_no_muon():
    assert isinstance(optimizer(tiny_model(), TrainConfig()), torch.optim.AdamW)


# The schedule


def test_the_rate_rises_in_equal_steps_and_then_follows_a_cosine_down_to_its_minimum():
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0.2, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6)  # half way down, and there it is steepest
    assert rates[32] == pytest.approx(0.6 + 0.4 * math.cos(math.pi * 22 / 90))
    assert rates[100] == pytest.approx(0.2)
    assert learning_rate(200, 100, config) == pytest.approx(0.2)


def test_without_warm_up_the_first_step_has_the_whole_rate_and_a_minimum_above_it_means_nothing():
    assert learning_rate(0, 100, TrainConfig(learning_rate=1.0, warmup=0)) == 1.0
    low = TrainConfig(learning_rate=1e-6, min_learning_rate=1e-5, warmup=0)
    assert learning_rate(50, 100, low) == pytest.approx(1e-6)


@pytest.mark.parametrize(("factor", "muon"), [(1.0, 0), (0.1, 0), (0.1, 10)])
def test_the_backbones_rate_is_its_share_of_the_rest(factor: float, muon: float):
    own = optimizer(tiny_model(), TrainConfig(backbone_factor=factor, muon_factor=muon))
    set_learning_rate(own, 1e-3)
    rates = {group["name"]: group["lr"] for group in own.param_groups}
    for name, rate in rates.items():
        scale = muon if name.endswith("Muon") else 1
        assert rate == pytest.approx(1e-3 * scale * (factor if name.startswith("backbone") else 1)), name
