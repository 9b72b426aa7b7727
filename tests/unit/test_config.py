"""Configurations: what is read, what is changed by hand, and what a typing error is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lamp3d import SEUNet, UNet
from lamp3d.errors import ConfigError
from lamp3d.experiment import NetworkConfig, Run, load_config

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "experiments" / "openkbp" / "study.yaml"
RECIPES = [
    ROOT / "src" / "lamp3d" / "demo.yaml",
    # A study, and what a study keeps of itself in its folder of results, are no recipes.
    *sorted(path for path in (ROOT / "experiments").glob("**/*.yaml") if path.name != STUDY.name),
]

TEXT = """\
network: {kind: unet, filters: 4}
augment:
  paired_labels: [[A, B]]
train:
  seed: 1
  curriculum:
    - {patch: 32, epochs: 2}
    - {patch: whole, epochs: 1, learning_rate: 1e-4}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "some.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_a_configuration_is_read_and_the_rest_has_defaults(path: Path) -> None:
    config = load_config(path)
    assert config.network == NetworkConfig(kind="unet", filters=4)
    assert [stage.patch_shape for stage in config.train.curriculum] == [(32, 32, 32), None]
    assert config.train.curriculum[1].learning_rate == 1e-4  # which YAML 1.1 takes for a text
    assert config.memory is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_recipes_of_the_repository_are_valid(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert config.train.curriculum
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_what_was_saved_is_loaded_again_with_all_defaults_written_out(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["memory=12GB", f"cache={tmp_path}", "network.kind=seunet", "augment.scale=[0.9, 1.1]"])
    saved = tmp_path / "new" / "config.yaml"
    config.save(saved)
    assert load_config(saved) == config
    text = saved.read_text(encoding="utf-8")
    assert all(key in text for key in ("se_reduction: 8", "max_bad_steps: 10", "window:"))


def test_single_keys_are_changed(path: Path) -> None:
    config = load_config(
        path,
        [
            "train.seed=7",
            "train.curriculum.0.patch=[16, 32, 48]",
            "train.curriculum.1.epochs=5",
            "network.max_filters=null",
            "loss.focal_weight=0.5",  # of a part that the file does not have
            "cache=a=b",
        ],
    )
    assert config.train.seed == 7
    assert config.train.curriculum[0].patch_shape == (16, 32, 48)
    assert config.train.curriculum[1].epochs == 5
    assert config.network.max_filters is None
    assert config.loss.focal_weight == 0.5
    assert config.cache == Path("a=b")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.seed", ["'train.seed' is not of the form key=value"]),
        ("=3", ["'=3' is not of the form key=value"]),
        ("train.curriculum.5.epochs=1", ["leads nowhere", "5"]),
        ("train.curriculum.first.epochs=1", ["leads nowhere", "first"]),
        ("train.seed.more=1", ["leads nowhere"]),
        ("train.seed=[1", ["leads nowhere"]),
        ("train.seed=-1", ["train.seed", "greater than or equal to 0", "-1"]),
        ("train.seed=18446744073709551616", ["train.seed: should be less than 18446744073709551616"]),  # torch's limit
        ("memory=12 parrots", ["memory: ", "12 parrots"]),
        ("across=string", ["across: no link 'string'"]),
        ("train.curriculum.0.schedule=fast", ["some.yaml: train.curriculum.0.schedule: there is no schedule 'fast'"]),
        ("augment.flip_axes=[0, 0]", ["augment.flip_axes: should name each axis once"]),
        ("train.optimizer=lion", ["train.optimizer", "'rmsprop', 'adamw' or 'sgd'", "'lion'"]),
        ("train.curriculum.0.patch=small", ["train.curriculum.0.patch", "'small'"]),
        ("train.curriculum=[]", ["train.curriculum", "at least 1 item"]),
        ("preprocess.window=[5, 5]", ["preprocess", "must rise"]),
        ("predict.mirror=true", ["predict.mirror goes with augment.flip_axes"]),
        ("memory=lots", ["'lots' is not an amount of memory"]),
        ("preprocess.foreground_above=.nan", ["preprocess.foreground_above", "a finite number"]),
        ("preprocess.spacing_mm=[.inf, 1, 1]", ["preprocess.spacing_mm.0", "a finite number"]),
        ("loss.class_weights={A: .inf}", ["loss.class_weights", "a finite number"]),
        ("train.clip_norm=.inf", ["train.clip_norm", "a finite number"]),
        ("train.curriculum.0.learning_rate=.inf", ["train.curriculum.0.learning_rate", "a finite number"]),
        ("train.curriculum.0.epochs=true", ["train.curriculum.0.epochs", "true and false are no values"]),
        ("train.curriculum.0.patch=[32, true, 32]", ["train.curriculum.0.patch", "true and false are no values"]),
        ("network.deep_supervision=true", ["network.deep_supervision", "true and false are no values"]),
        ("memory=16", ["memory: an amount of memory has a unit; write it like 16GB (got 16)"]),
        ("network.filters=few", ["network.filters: should be a valid integer", ", or should be a list (got 'few')"]),
        ("preprocess.spacing_mm=[1, 0, 1]", ["preprocess.spacing_mm.1: should be greater than 0 (got 0)"]),
        ("network.kind=own", ["some.yaml: network: kind: monai goes with the name"]),
        ("train=3", ["some.yaml: train: should be a mapping of settings (got 3)"]),
        # Unknown keys at every depth, with the likely one or the known ones.
        ("netwrok.filters=3", ["unknown key 'netwrok'", "did you mean 'network'?"]),
        ("network.filter=3", ["unknown key 'network.filter'", "did you mean 'filters'?"]),
        ("augment.rotate=3", ["unknown key 'augment.rotate'", "did you mean 'rotate"]),
        ("train.curriculum.1.epoch=3", ["unknown key 'train.curriculum.1.epoch'", "did you mean 'epochs'?"]),
        ("loss.xyz=3", ["unknown key 'loss.xyz'", "known there: ", "focal_weight"]),
    ],
)
def test_what_cannot_be_is_named(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.curriculum=[{patch: 32, epoch: 3}]", "unknown key 'train.curriculum.0.epoch'; did you mean 'epochs'?"),
        ("network.filters=[1, 2, 3, 4]", "network.filters.4 is missing"),
        ("predict.mirror=true", "predict.mirror goes with augment.flip_axes: the network has to have seen such images"),
        ("loss.class_weights={A: -1}", "loss.class_weights.A: should be greater than or equal to 0 (got -1)"),
    ],
)
def test_what_only_follows_from_an_error_is_not_told(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value) == f"{path}: {message}"


def test_the_cache_may_be_in_the_home_folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(path, ["cache=~/scans"]).cache == tmp_path / "scans"


def test_several_errors_are_told_at_once(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some\.yaml: network\.filters.*; unknown key 'train\.sed'"):
        load_config(path, ["train.sed=1", "network.filters=0"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [", "is not valid YAML: line 1, column 9: expected the node content, but found '<stream end>'."),
        (b"train: \xff", "is not valid YAML: unacceptable character #x00ff"),
        (b"- 1\n- 2\n", "holds list, not a mapping"),
        (b"", "train is missing"),
        (b"train:\n", "train: "),
        (b"network: {filters: 4}\n", "train is missing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert words in str(caught.value)


def test_an_absent_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(tmp_path)


@pytest.mark.parametrize(("kind", "network"), [("unet", UNet), ("seunet", SEUNet)])
def test_a_network_is_built_as_configured(kind: str, network: type[UNet]) -> None:
    settings = {"kind": kind, "filters": 2, "stem_stride": 2, "max_filters": 4, "norm": "group"}
    built = NetworkConfig.model_validate(settings).build(n_classes=5)
    assert type(built) is network
    assert built.divisor == 32
    *_, last = built.parameters()
    assert last.shape[0] == 5


def test_filters_of_every_level() -> None:
    config = NetworkConfig.model_validate({"filters": [2, 4, 4, 8, 8]})
    assert config.build(n_classes=2).encoder5.conv2.out_channels == 8
    assert NetworkConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError, match="filters"):
        NetworkConfig.model_validate({"filters": [2, 4]})


def test_a_network_of_monais_is_found_by_name() -> None:
    arguments = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [2, 4, 4]}
    config = NetworkConfig(kind="monai", name="DynUNet", arguments=arguments, divisor=4)
    network = config.build(n_classes=3)
    assert network(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 3, 8, 8, 8)
    assert (network.divisor, network.heads) == (4, 1)
    again = NetworkConfig.model_validate(config.model_dump(mode="json"))  # as it is saved: with all defaults
    assert again == config


def test_an_outline_has_no_weights_whatever_the_constructor_looks_at() -> None:
    swin = NetworkConfig(kind="monai", name="SwinUNETR", arguments={"feature_size": 12})  # looks at numbers in a tensor
    numbers = torch.get_rng_state()
    for config in (swin, NetworkConfig(filters=2)):
        assert all(parameter.is_meta for parameter in config.outline(3, 1).parameters())
    torch.testing.assert_close(torch.get_rng_state(), numbers, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "monai"}, "goes with the name"),
        ({"kind": "unet", "name": "DynUNet"}, "goes with the name"),
        ({"kind": "monai", "name": "DynUNet", "filters": 8}, "has no use for filters"),
        ({"kind": "unet", "divisor": 8}, "has no use for divisor"),
        ({"kind": "own"}, "with your function's"),
        ({"kind": "own", "name": "mine:make", "filters": 8}, "has no use for filters"),
    ],
)
def test_settings_of_another_kind_of_network_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NetworkConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DynUNets", {}, "no network 'DynUNets'; close to it: DynUN"),
        ("DynUNet", {"strides": [1]}, "does not take these arguments"),
        ("UNet", {"channel": 3}, "does not take these arguments"),
    ],
)
def test_what_monai_does_not_have(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkConfig(kind="monai", name=name, arguments=arguments).build(2)


@pytest.mark.parametrize("text", ["", "[]", '{"id": "that of another program"}', '{"dataset": ".", "organs": 3}'])
def test_what_is_no_run_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json is damaged, or is not lamp3d's"):
        Run.open(tmp_path)
