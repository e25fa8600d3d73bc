"""Configuration: models hold the defaults, a YAML file what differs, `key=value` the last word; all else stops."""

import pickle
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dfine import config as configs
from dfine.config import Config, ConfigError, from_dict, load, override, to_dict


def written(path: Path, text: str) -> Path:
    (path / "config.yaml").write_text(text, encoding="utf-8")
    return path / "config.yaml"


# Where values come from


def test_an_empty_file_means_the_defaults(tmp_path: Path):
    assert load(written(tmp_path, "")) == Config()


def test_the_defaults_are_the_papers():
    decoder = Config().model.decoder
    assert (decoder.bins, decoder.a, decoder.c, decoder.layers, decoder.queries) == (32, 0.5, 0.25, 6, 300)
    loss = Config().loss
    assert (loss.vfl, loss.l1, loss.giou, loss.fgl, loss.ddf, loss.temperature) == (1, 5, 2, 0.15, 1.5, 5)


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path):
    config = load(written(tmp_path, "model: {decoder: {layers: 4}}\ntrain: {epochs: 3}"))
    assert (config.model.decoder.layers, config.train.epochs) == (4, 3)
    assert config == override(Config(), ["model.decoder.layers=4", "train.epochs=3"])


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path):
    path = written(tmp_path, "train: {epochs: 3, seed: 7}")
    config = load(path, ["train.epochs=4", "train.epochs=5"])
    assert (config.train.epochs, config.train.seed) == (5, 7)


def test_overrides_are_read_as_yaml():
    changes = ["train.bf16=false", "model.strides=[16, 32]", "model.decoder.points=[4, 4]", "loss.fgl=0.3"]
    config = override(Config(), changes)
    assert (config.train.bf16, config.model.strides, config.model.decoder.points) == (False, (16, 32), (4, 4))
    assert config.loss.fgl == 0.3


def test_overrides_of_texts_are_taken_as_they_are():
    assert override(Config(), ["run_dir=2024"]).run_dir == "2024"
    assert override(Config(), ["run_dir=a=b: c"]).run_dir == "a=b: c"
    assert override(Config(), ["model.init_from="]).model.init_from == ""


def test_overrides_that_depend_on_each_other_are_checked_together():
    """Two strides need two numbers of points; neither override would be valid alone."""
    assert override(Config(), ["model.strides=[16,32]", "model.decoder.points=[3,6]"]).model.strides == (16, 32)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001"])
def test_floats_may_be_written_with_an_exponent(tmp_path: Path, text: str):
    """To YAML `1e-4`, without a dot, is a string."""
    assert load(written(tmp_path, f"train: {{learning_rate: {text}}}")).train.learning_rate == 1e-4
    assert override(Config(), [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


def test_whole_numbers_pass_as_floats():
    config = from_dict({"train": {"clip": 1}})
    assert config.train.clip == 1.0
    assert isinstance(config.train.clip, float)


def test_a_config_survives_the_way_into_yaml_and_back():
    config = override(Config(), ["model.decoder.points=[2,2,2]", "train.learning_rate=3e-4", "run_dir=there"])
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config().run_dir = "elsewhere"


def test_a_config_can_be_hashed_and_sent_to_another_process():
    config = override(Config(), ["model.strides=[16, 32]", "model.decoder.points=[4, 4]"])
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(pickle.loads(pickle.dumps(config))) == hash(config)


def test_a_config_is_plain_mappings_lists_and_values_in_a_checkpoint():
    tree = to_dict(Config())
    assert tree["model"]["strides"] == [8, 16, 32]
    assert type(tree["model"]["decoder"]) is dict
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree


def test_a_section_that_is_set_as_a_whole_starts_from_its_defaults():
    config = override(Config(), ["data.augment.noise_p=1", "data.augment={blur_p: 0.5}", "data.augment.elastic_p=0"])
    assert (config.data.augment.blur_p, config.data.augment.elastic_p, config.data.augment.noise_p) == (0.5, 0, 0.1)
    assert override(Config(), ["data.train={}", "data.train.images=2024"]).data.train.images == "2024"


def test_importing_it_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(configs.__file__)


# What cannot be meant


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        override(Config(), overrides)
    return str(caught.value)


def test_an_unknown_key_is_answered_with_its_path_and_the_nearest_name():
    assert refused("model.hiden_dim=256") == "unknown key model.hiden_dim, did you mean hidden_dim?"
    assert refused("modle.hidden_dim=256") == "unknown key modle, did you mean model?"
    assert refused("model.decoder.layer=3") == "unknown key model.decoder.layer, did you mean layers?"


def test_an_unknown_key_without_a_near_one_is_answered_with_all(tmp_path: Path):
    assert refused("data.xyz=1").startswith("unknown key data.xyz, known keys: train, val, batch_size")


def test_errors_of_a_file_name_the_file(tmp_path: Path):
    path = written(tmp_path, "model: {hiden_dim: 256}")
    with pytest.raises(ConfigError, match=r"config.yaml: unknown key model.hiden_dim, did you mean hidden_dim\?"):
        load(path)


def test_keys_that_are_no_text_are_unknown_keys(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown key train.3"):
        load(written(tmp_path, "train: {3: 4}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.epochs=many", "train.epochs: expected int, found 'many'"),
        ("train.epochs=2.5", "train.epochs: expected int, found 2.5"),
        ("train.epochs=true", "train.epochs: expected int, found True"),
        ("train.epochs=", "train.epochs: expected int, found None"),
        ("train.bf16=1", "train.bf16: expected bool, found 1"),
        ("train.clip=fast", "train.clip: expected float, found 'fast'"),
        ("train.clip=true", "train.clip: expected float, found True"),
        ("model.strides=8", "model.strides: expected a list such as [1, 2], found 8"),
        ("model.strides=[8, x, 32]", "model.strides: expected int, found 'x'"),
        ("model.strides=[8, [16], 32]", "model.strides: expected int, found [16]"),
        ("model.mean=[0.5, 1e-x, 0.5]", "model.mean: expected float, found '1e-x'"),
        ("train.epochs='3'", "train.epochs: expected int, found '3'"),
        ("train.clip=1" + 400 * "0", f"train.clip: expected float, found {10**400}"),
        ("model.decoder=6", "model.decoder: expected keys and values, found 6"),
    ],
)
def test_a_wrong_type_is_answered_with_what_was_expected(text: str, message: str):
    assert refused(text) == message


def test_a_number_is_no_text_in_a_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="run_dir: expected str, found 2024"):
        load(written(tmp_path, "run_dir: 2024"))


def test_an_override_without_a_value_says_how_to_write_one():
    assert refused("train.epochs") == "override 'train.epochs': write key=value, such as train.epochs=3"


def test_an_override_below_a_value_is_refused():
    assert refused("train.epochs.first=3") == (
        "override 'train.epochs.first=3': train.epochs is a value and has no keys of its own"
    )


@pytest.mark.parametrize("text", ["model.strides=[8, 16", "train.epochs=2026-13-01"])
def test_an_override_that_is_no_yaml_is_refused_in_one_line(text: str):
    assert refused(text).startswith(f"override {text!r}: the value is not YAML: ")
    assert "\n" not in refused(text)


def test_an_override_below_an_override_that_is_no_section_is_refused():
    assert refused("data=3", "data.train.images=pages") == (
        "override 'data.train.images=pages': data is a value and has no keys of its own"
    )
    assert refused("train.epochs={}", "train.epochs.first=3") == "train.epochs: expected int, found {'first': 3}"


@pytest.mark.parametrize("text", ["- 1\n- 2", "model", "3"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    with pytest.raises(ConfigError, match=r"config.yaml: the config: expected keys and values"):
        load(written(tmp_path, text))


NO_YAML = [b"model: [", b"run_dir: \xff", b"run_dir: 2026-13-01"]
NO_YAML += [b"run_dir: !!int ''", b"run_dir: !!bool x", b"run_dir: !!timestamp x", b"[" * 2000]  # PyYAML stumbles


@pytest.mark.parametrize("content", NO_YAML)
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.yaml: not YAML: [^\n]+$"):
        load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("train: {epochs: 2}\ndata: {workers: 0}\ntrain: {clip: 1}", "train", 3),
        ("data: {workers: 0, workers: 1}", "workers", 1),
    ],
)
def test_a_key_that_is_there_twice_is_refused_for_the_first_would_be_lost(
    tmp_path: Path, text: str, key: str, line: int
):
    with pytest.raises(ConfigError, match=rf"config.yaml: not YAML: {key} is there twice, again in line {line}$"):
        load(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot read the config"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("key", "value", "must_be"),
    [
        ("model.decoder.points", "[3, 6]", "one number a stride"),
        ("model.decoder.points", "[3, 0, 3]", "1 or more on each stride"),
        ("model.strides", "[]", "one or more"),
        ("model.strides", "[8, 16, 64]", "each twice the one before"),
        ("model.decoder.bins", "31", "even, 4 or more"),
        ("model.decoder.bins", "2", "even, 4 or more"),
        ("model.decoder.layers", "0", "1 or more"),
        ("model.decoder.queries", "0", "1 or more"),
        ("model.decoder.a", "0", "positive"),
        ("model.decoder.c", "-1", "positive"),
        ("model.hidden_dim", "250", "a multiple of model.decoder.heads"),
        ("model.decoder.heads", "0", "1 or more"),
        ("model.encoder.heads", "0", "1 or more"),
        ("loss.temperature", "0", "positive"),
        ("distill.alpha", "-1", "0 or more"),
        ("distill.beta", "-1", "0 or more"),
        ("distill.classes.weight", "-1", "0 or more"),
        ("distill.classes.loss", "bce", "kl or mse"),
        ("distill.classes.temperature", "0", "positive"),
        ("distill.boxes.weight", "-1", "0 or more"),
        ("distill.boxes.loss", "giou", "l1 or mse"),
        ("distill.go_lsd.weight", "-1", "0 or more"),
        ("distill.go_lsd.temperature", "0", "positive"),
        ("distill.go_lsd.start_epoch", "-1", "0 or more"),
        ("model.strides", "[0, 0, 0]", "one or more"),
        ("model.encoder.hidden_dim", "-8", "0 or more"),
        ("model.encoder.feedforward_dim", "0", "1 or more"),
        ("model.encoder.depth_mult", "0", "positive"),
        ("model.encoder.expansion", "0.001", "2 / 256 or more"),
        ("model.denoising.queries", "-1", "0 or more"),
        ("model.denoising.label_noise", "3", "from 0 to 1"),
        ("model.denoising.box_noise", "-1", "0 or more"),
        ("model.mean", "[0.5]", "three numbers"),
        ("model.mean", "[123.7, 116.3, 103.5]", "less than or equal to 1"),
        ("model.std", "[0.5, 0.5, 0]", "three positive numbers"),
        ("data.batch_size", "0", "1 or more"),
        ("data.short_edges", "[]", "32 pixels or more"),
        ("data.short_edges", "[480, 16]", "32 pixels or more"),
        ("data.eval_short_edge", "31", "32 pixels or more"),
        ("data.augment.blur_p", "2", "from 0 to 1"),
        ("data.augment.elastic_sigma", "1", "4 or more"),
        ("data.augment.rotation_degrees", "0", "positive (its p turns it off)"),
        ("loss.matcher.encoder_queries", "0", "1 or more"),
        ("loss.matcher.encoder_queries_end_epoch", "-1", "0 or more"),
        ("train.muon_factor", "-1", "0 or more"),
        ("train.epochs", "0", "1 or more"),
        ("train.seed", "-1", "from 0 to below 2**64"),
        ("train.seed", str(2**64), "from 0 to below 2**64"),
        ("train.learning_rate", "0", "positive"),
        ("train.backbone_factor", "-1", "0 or more"),
        ("train.min_learning_rate", "-0.001", "0 or more"),
        ("train.warmup", "1", "from 0 to below 1"),
        ("train.ema_decay", "1", "from 0 to below 1"),
    ],
)
def test_a_value_that_cannot_work_is_refused(key: str, value: str, must_be: str):
    message, found = refused(f"{key}={value}").split(", found ")
    assert message == f"{key}: must be {must_be}"
    assert found.strip("'") in value  # of a list the one number that is wrong, or all


def numbers(tree: dict, path: str = "") -> Iterator[tuple[str, object]]:
    """Every numeric setting: its key, and its default."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{name}.")
        elif not isinstance(value, (str, bool)):
            yield path + name, value


@pytest.mark.parametrize(("key", "default"), list(numbers(to_dict(Config()))))
def test_every_number_has_a_range(key: str, default: object):
    """No number may be negative, and none may be infinite or not a number."""
    for number, found in (("-1", "-1"), (".nan", "nan"), (".inf", "inf"), ("1e999", "")):
        message = refused(f"{key}=[{number}]" if isinstance(default, list) else f"{key}={number}")
        assert message.startswith(f"{key}: ")
        assert found in message
        assert "\n" not in message


def test_infinite_is_not_called_out_of_range():
    assert refused("train.clip=.inf") == "train.clip: must be a finite number, found inf"
    assert refused("model.denoising.label_noise=nan") == (
        "model.denoising.label_noise: must be a finite number, found nan"
    )


def test_the_long_edge_cannot_be_shorter_than_the_short_one():
    assert refused("data.max_long_edge=600").startswith("data.max_long_edge: must be at least the largest short edge")


def test_the_encoders_width_is_a_multiple_of_its_heads():
    assert refused("model.encoder.heads=7") == (
        "model.encoder.heads: must be a divisor of the encoder's width 256, found 7"
    )
    assert refused("model.encoder.hidden_dim=300").endswith("the encoder's width 300, found 8")


def test_the_encoders_width_is_a_multiple_of_four():
    four = "must be a multiple of 4 (positions are two sines and two cosines), found"
    assert refused("model.encoder.hidden_dim=6", "model.encoder.heads=2") == f"model.encoder.hidden_dim: {four} 6"
    assert refused("model.hidden_dim=6", "model.encoder.heads=2", "model.decoder.heads=2") == (
        f"model.hidden_dim: {four} 6"
    )


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_that_come_along_can_be_read(path: Path):
    config = load(path)
    assert config.run_dir == f"runs/{path.stem}"
    assert bool(config.distill.teacher) == path.stem.startswith("student")
