"""The backbone: any timm model that has maps at the configured strides; what it lacks it says by name."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from tiny import shaken

from dfine.config import BackboneConfig, ConfigError
from dfine.model.backbone import Backbone
from dfine.model.deploy import merge_backbone


def untrained(name: str, strides: tuple[int, ...] = (8, 16, 32)) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneConfig(name=name, pretrained=False), strides)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("convnext_atto", [80, 160, 320]),
        ("convnextv2_atto", [80, 160, 320]),
        ("resnet18", [128, 256, 512]),
        ("hgnetv2_b0", [256, 512, 1024]),
    ],
)
def test_any_family_gives_maps_at_the_strides_with_the_channels_it_says(name: str, channels: list[int]):
    backbone = untrained(name)
    assert backbone.channels == channels
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    sizes = [(8, 12), (4, 6), (2, 3)]
    assert [tuple(x.shape) for x in maps] == [(1, c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_stages_behind_the_last_stride_are_dropped():
    """They would be parameters without a gradient, which a distributed run waits for in vain."""
    backbone = untrained("test_convnext", strides=(8, 16))
    assert backbone.channels == [32, 48]
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [8, 4]
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_a_stride_may_be_left_out():
    maps = untrained("test_convnext", strides=(4, 32))(torch.rand(1, 3, 64, 64))
    assert [x.shape[-1] for x in maps] == [16, 2]


def test_mean_and_std_are_those_the_weights_were_trained_with():
    assert untrained("convnext_atto").mean == (0.485, 0.456, 0.406)  # ImageNet's
    assert untrained("convnext_atto").std == (0.229, 0.224, 0.225)
    assert untrained("test_convnext").mean == untrained("test_convnext").std == (0.5, 0.5, 0.5)


def test_a_name_with_a_scheme_has_the_mean_and_std_of_its_own_config(tmp_path: Path):
    said = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 96]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_convnext", "pretrained_cfg": said}))
    backbone = untrained(f"local-dir:{tmp_path}")
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert backbone.random_page().shape == (1, 3, 96, 96)
    with pytest.raises(ConfigError, match=r"model.backbone.name: cannot make local-dir:\S+none \("):
        untrained(f"local-dir:{tmp_path / 'none'}")


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet"])
def test_checkpointing_trades_time_for_memory_and_changes_no_gradient(name: str):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = Backbone(BackboneConfig(name=name, pretrained=False, checkpointing=checkpointing), (8, 16, 32))
        sum(x.square().sum() for x in backbone(torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64))).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_weights_can_come_from_a_local_file(tmp_path: Path):
    torch.manual_seed(1)
    model = timm.create_model("test_convnext", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    backbone = Backbone(BackboneConfig(name="test_convnext", weights=str(tmp_path / "weights.pth")), (8, 16, 32))
    assert torch.equal(backbone.body.stem_0.weight, model.stem[0].weight)


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_a_plain_transformer_has_the_map_of_its_last_block_for_pages_of_any_shape(name: str):
    """Of the second timm takes squares of 160 pixels alone, unless it is told otherwise."""
    backbone = untrained(name)
    assert backbone.plain
    (x,) = backbone(torch.rand(1, 3, 64, 96))
    assert x.shape == (1, *backbone.channels, 4, 6)
    x.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_windows_are_laid_on_pages_of_any_shape_where_timm_can():
    """It refuses other pages than the weights', unless it is told otherwise."""
    torch.manual_seed(0)
    backbone = untrained("swin_tiny_patch4_window7_224")
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 96, 160))
    assert [tuple(x.shape[1:]) for x in maps] == [(192, 12, 20), (384, 6, 10), (768, 3, 5)]


# What goes wrong


@pytest.mark.parametrize("name", ["efficientformerv2_s0", "mvitv2_tiny", "volo_d1_224"])
def test_backbones_of_one_size_are_refused_by_name(name: str):
    with pytest.raises(ConfigError, match=rf"model\.backbone\.name: timm's {name} takes pages of one size alone"):
        untrained(name)


@pytest.mark.parametrize(
    ("name", "strides", "message"),
    [
        ("eva02_tiny_patch14_224", (8, 16, 32), r"model\.backbone\.name: eva02_tiny_patch14_224 has stride 14 alone"),
        ("test_vit", (16, 32, 64), r"model\.strides: test_vit has stride 16 alone; a pyramid .* but not \[64\]"),
        (
            "vit_relpos_small_patch16_224",
            (8, 16, 32),
            r"timm's vit_relpos_\S+ takes pages of one size alone",
        ),
    ],
)
def test_plain_transformers_that_cannot_serve_are_refused(name: str, strides: tuple[int, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        untrained(name, strides)


def test_a_missing_stride_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match=r"model.strides: test_convnext has strides \[4, 8, 16, 32\], but not \[64\]"):
        untrained("test_convnext", strides=(16, 32, 64))


@pytest.mark.parametrize(("name", "proposed"), [("convnext_ato", "convnext_atto"), ("dinov3", "vit_base_.*_dinov3")])
def test_an_unknown_name_is_answered_with_similar_ones(name: str, proposed: str):
    with pytest.raises(ConfigError, match=rf"model.backbone.name: .* no model '{name}'; similar: .*{proposed}"):
        untrained(name)


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_tag_is_answered_with_the_known_ones(pretrained: bool):
    with pytest.raises(ConfigError, match=r"no 'convnext_atto\.in99k'; known: convnext_atto\.d2_in1k"):
        Backbone(BackboneConfig(name="convnext_atto.in99k", pretrained=pretrained), (8, 16, 32))


def test_weights_of_another_implementation_are_taken_in_order_and_it_says_so(tmp_path: Path):
    model = shaken(timm.create_model("test_convnext"))
    torch.save(
        {f"_own.{i}.{n.rpartition('.')[2]}": x for i, (n, x) in enumerate(model.state_dict().items())},
        tmp_path / "w.pth",
    )
    config = BackboneConfig(name="test_convnext", weights=str(tmp_path / "w.pth"))
    with pytest.warns(UserWarning, match=r"w.pth: none of its names are timm's; its \d+ tensors fit in order"):
        backbone = Backbone(config, (8, 16, 32))
    assert backbone.body.state_dict()["stem_0.weight"].equal(model.state_dict()["stem.0.weight"])


def test_weights_in_another_order_are_refused(tmp_path: Path):
    state = timm.create_model("test_convnext").state_dict()
    torch.save({f"_own.{name}": x for name, x in reversed(state.items())}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"model.backbone.weights: cannot load .*w.pth"):
        Backbone(BackboneConfig(name="test_convnext", weights=str(tmp_path / "w.pth")), (8, 16, 32))


def test_weights_can_lie_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "made_up_weights" / "files").mkdir(parents=True)
    model = shaken(timm.create_model("test_convnext"))
    torch.save(model.state_dict(), tmp_path / "made_up_weights" / "files" / "w.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    backbone = Backbone(
        BackboneConfig(name="test_convnext", weights="package:made_up_weights/files/w.pth"), (8, 16, 32)
    )
    assert backbone.body.state_dict()["stem_0.weight"].equal(model.state_dict()["stem.0.weight"])


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(
        ConfigError, match=r"the package of package:no_such_weights/w.pth is not installed .*'no_such_weights'"
    ):
        Backbone(BackboneConfig(name="test_convnext", weights="package:no_such_weights/w.pth"), (8, 16, 32))


def test_weights_that_cannot_be_fetched_are_named_with_the_file_to_fetch_and_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        Backbone(BackboneConfig(name="test_convnext.r160_in1k"), (8, 16, 32))
    assert "model.safetensors of timm/test_convnext.r160_in1k" in str(caught.value)
    assert "model.backbone.weights=PATH" in str(caught.value)
    assert "model.backbone.pretrained=false" in str(caught.value)


def test_a_weights_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"model.backbone.weights: cannot load nowhere.safetensors"):
        Backbone(BackboneConfig(name="test_convnext", weights="nowhere.safetensors"), (8, 16, 32))


def test_weights_of_another_model_are_refused(tmp_path: Path):
    other = timm.create_model("test_convnext2", pretrained=False)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"model.backbone.weights: cannot load .*other.pth into test_convnext"):
        Backbone(BackboneConfig(name="test_convnext", weights=str(tmp_path / "other.pth")), (8, 16, 32))


def test_a_model_without_published_weights_says_so():
    with pytest.raises(ConfigError, match=r"model.backbone.pretrained: timm has no weights for resnet50t"):
        Backbone(BackboneConfig(name="resnet50t"), (8, 16, 32))


def test_checkpointing_is_refused_where_timm_has_none():
    with pytest.raises(ConfigError, match=r"model\.backbone\.checkpointing: timm offers none .* test_vit"):
        Backbone(BackboneConfig(name="test_vit", pretrained=False, checkpointing=True), (16,))


def test_maps_with_channels_behind_come_out_with_channels_first():
    backbone = untrained("mambaout_femto")
    shapes = [x.shape for x in backbone(torch.rand(1, 3, 64, 96))]
    assert shapes == [(1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (8, 16, 32), strict=True)]


# Weights


def odd_statistics(backbone: Backbone) -> Backbone:
    """In evaluation mode, with batch norms that change what they get."""
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return backbone.eval()


@pytest.mark.parametrize(("name", "merged"), [("xception41p", False), ("resnet10t", True)])
def test_merging_batch_norms_changes_no_map_also_where_timm_reads_maps_by_hooks(name: str, merged: bool):
    backbone, page = odd_statistics(untrained(name)), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(page)
        merge_backbone(backbone)
        for one, other in zip(before, backbone(page), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules()) != merged


def test_weights_that_no_map_depends_on_are_frozen_and_all_others_have_a_gradient():
    backbone = untrained("hrnet_w18_small")
    statistics = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone.freeze_unused()
    assert backbone.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in backbone.named_buffers())
    sum(x.sum() for x in backbone(torch.rand(2, 3, 64, 64))).backward()
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert "body.stage4.0.fuse_layers.0.1.0.weight" in frozen
    assert frozen == {name for name, parameter in backbone.named_parameters() if parameter.grad is None}


def test_where_all_weights_are_used_none_is_frozen():
    backbone = untrained("test_convnext")
    backbone.freeze_unused()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
