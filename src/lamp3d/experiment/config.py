"""The configuration of an experiment: one YAML file, checked key by key, saved as resolved with every run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, PositiveInt, ValidationError, field_validator, model_validator

from lamp3d.data import AugmentConfig, PreprocessConfig, SplitConfig
from lamp3d.errors import ConfigError
from lamp3d.explain import explained
from lamp3d.files import write_text
from lamp3d.nets import Network, SEUNet, UNet, from_function, from_monai, hollow
from lamp3d.plan import parse_bytes
from lamp3d.plan.links import USUAL_NETWORK, load_link
from lamp3d.predict import PredictConfig
from lamp3d.settings import Settings, parse_yaml, told_with_its_key
from lamp3d.train import LossConfig, TrainConfig


class NetworkConfig(Settings):
    """Which network, and how large: one of lamp3d's, any of MONAI's, or your own.

    Args:
        kind: "unet" or "seunet" (paper §2.2), or "monai" or "own", of which only deep supervision and the last three
            settings say more.
        filters: f, channels of the first block (paper: 32, 64, 128), or those of all five levels, such as
            [16, 32, 64, 128, 192].
        norm: "instance", "batch" or "group".
        stem_stride: 1 works at full resolution; 2 halves it at once, as the paper's released code does.
        max_filters: upper limit of the channels; None: 16 f.
        deep_supervision: how many coarser decoder levels give logits too, for training only.
        se_reduction: of the squeeze-and-excitation, "seunet" only.
        name: of a class in `monai.networks.nets`, such as "DynUNet"; of your own, package.module:function, which is
            called with `in_channels` and `out_channels`.
        arguments: beside dimensions and channels.
        divisor: what the sides of its volumes must be multiples of.
    """

    kind: Literal["unet", "seunet", "monai", "own"] = "unet"
    filters: PositiveInt | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt, PositiveInt] = 32
    norm: Literal["instance", "batch", "group"] = "instance"
    stem_stride: Literal[1, 2] = 1
    max_filters: PositiveInt | None = None
    deep_supervision: Literal[0, 1, 2, 3] = 0
    se_reduction: PositiveInt = 8
    name: str | None = None
    arguments: dict[str, Any] = Field(default={})
    divisor: PositiveInt = 32

    @model_validator(mode="after")
    def _is_whole(self) -> NetworkConfig:
        of_others = {"name", "arguments", "divisor"}  # alone
        is_others = self.kind in ("monai", "own")
        if is_others != (self.name is not None):
            raise ValueError("kind: monai goes with the name of one of its networks, kind: own with your function's")
        of_ours = set(type(self).model_fields) - of_others
        others = self.model_fields_set - {"kind", "deep_supervision"} - (of_others if is_others else of_ours)
        if self.kind != "seunet":
            others |= self.model_fields_set & {"se_reduction"}
        if changed := sorted(key for key in others if getattr(self, key) != type(self).model_fields[key].default):
            raise ValueError(f"kind: {self.kind} has no use for {', '.join(changed)}")
        return self

    def build(self, n_classes: int, in_channels: int = 1) -> Network:
        """The network with as many outputs as classes, with fresh weights from torch's random state."""
        if self.name is not None:
            make_other = from_monai if self.kind == "monai" else from_function
            heads = 1 + self.deep_supervision
            return make_other(self.name, self.arguments, in_channels, n_classes, self.divisor, heads)
        make = UNet if self.kind == "unet" else partial(SEUNet, se_reduction=self.se_reduction)
        return make(
            in_channels,
            n_classes,
            filters=self.filters,
            norm=self.norm,
            stem_stride=self.stem_stride,
            max_filters=self.max_filters,
            deep_supervision=self.deep_supervision,
        )

    def outline(self, n_classes: int, in_channels: int) -> Network:
        """The network without its weights, on the meta device: for its shapes and numbers."""
        return hollow(partial(self.build, n_classes, in_channels))


class ExperimentConfig(Settings):
    """Everything that decides a run, beside the dataset and the devices.

    Args:
        initial_weights: where training begins: a model that comes with lamp3d, by name, or the folder of an exported
            one or of a run, of the same network; its output layers only if its organs are the same. None: fresh ones.
        memory: limit per device, such as "16GB", or "unlimited"; None: what the device has.
        across: what joins machines, where torchrun has started workers on several: "network100", "network400", or what
            it carries in a second for all devices of a machine together, such as "10GB".
        cache: folder of prepared scans; None: ~/.cache/lamp3d (or $LAMP3D_CACHE).
    """

    network: NetworkConfig = NetworkConfig()
    split: SplitConfig = SplitConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig
    predict: PredictConfig = PredictConfig()
    initial_weights: str | None = None
    memory: str | None = None
    across: str = USUAL_NETWORK
    cache: Path | None = None

    @property
    def beside_training(self) -> dict[str, BaseModel]:
        """The parts beside `train` that decide what the weights become or what is made of them."""
        return {"preprocess": self.preprocess, "augment": self.augment, "loss": self.loss, "predict": self.predict}

    @model_validator(mode="after")
    def _mirrors_as_trained(self) -> ExperimentConfig:
        if self.predict.mirror and not self.augment.flip_axes:
            raise ValueError("predict.mirror goes with augment.flip_axes: the network has to have seen such images")
        return self

    @field_validator("memory", mode="before")
    @classmethod
    def _is_an_amount(cls, memory: Any) -> Any:
        if isinstance(memory, int | float):
            raise ValueError("an amount of memory has a unit; write it like 16GB")
        if memory not in (None, "unlimited"):
            with told_with_its_key():
                parse_bytes(memory)
        return memory

    @field_validator("across")
    @classmethod
    def _is_a_link(cls, across: str) -> str:
        with told_with_its_key():
            load_link(across)
        return across

    @field_validator("cache")
    @classmethod
    def _is_found(cls, cache: Path | None) -> Path | None:
        return None if cache is None else Path(os.path.expanduser(cache))

    def save(self, path: Path) -> None:
        """Write the configuration with all defaults filled in."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        write_text(path, text)


def load_config(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a configuration and change single keys.

    Args:
        path: a YAML file.
        overrides: such as ``train.seed=3`` or ``train.curriculum.0.epochs=5``; values are read as YAML.

    Raises:
        ConfigError: the file is absent or not YAML, or a key or a value is not known; the message names it.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no configuration at {path}; see experiments/ for some to start from.") from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str | bytes, where: str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A configuration from YAML, with single keys changed.

    Args:
        text: the YAML.
        where: what messages call it.
        overrides: as of `load_config`.

    Raises:
        ConfigError: as from `load_config`.
    """
    content = parse_yaml(text, where) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds {type(content).__name__}, not a mapping of settings.")
    for override in overrides:
        _override(content, override)
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explained(error, ExperimentConfig, content)}") from error


def _override(content: dict[str, Any], override: str) -> None:
    keys, equals, value = override.partition("=")
    if not (keys and equals):
        raise ConfigError(f"{override!r} is not of the form key=value, e.g. train.seed=3.")
    *outer, last = keys.split(".")
    place: Any = content
    try:
        for key in outer:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except (ValueError, IndexError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{override!r} leads nowhere in the configuration: {error}") from error
