"""A network that a user's own function makes: trained on two devices, predicted with, and not handed on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lamp3d.errors import ConfigError
from lamp3d.experiment import NetworkConfig
from lamp3d.train import Checkpoint
from tests.integration.conftest import CommandLine

CODE = """
import torch
from torch import nn
from torch.nn import functional as F


class Plain(nn.Module):
    def __init__(self, inner, in_channels, out_channels, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(in_channels, inner, 3, padding=1), nn.InstanceNorm3d(inner), nn.ReLU())
        self.heads = nn.ModuleList(nn.Conv3d(inner, out_channels, 1) for _ in range(outputs))

    def forward(self, x):
        x = self.body(x)
        return [head(x) for head in self.heads]


def make(in_channels, out_channels, inner=4, outputs=1):
    return Plain(inner, in_channels, out_channels, outputs)


class Fixed(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.where = nn.Parameter(torch.zeros(1, 1, 16, 16, 32))

    def forward(self, x):
        return self.conv(x) + self.where


class Levels(nn.Module):
    # Another graph in evaluation: dropout as a function, and, stacked, the finer level alone.
    def __init__(self, in_channels, out_channels, stacked=False):
        super().__init__()
        self.body = nn.Conv3d(in_channels, 4, 3, padding=1)
        self.fine, self.coarse = nn.Conv3d(4, out_channels, 1), nn.Conv3d(4, out_channels, 1)
        self.stacked = stacked

    def forward(self, x):
        x = F.dropout3d(torch.relu(self.body(x)), 0.1, training=self.training)
        fine, coarse = self.fine(x), self.coarse(F.avg_pool3d(x, 2))
        if not self.stacked:
            return [fine, coarse]
        if not self.training:
            return fine
        return torch.stack([fine, F.interpolate(coarse, scale_factor=2)], 1)


def no_network(in_channels, out_channels):
    return "a network"


def broken(in_channels, out_channels):
    return {}["width"]
"""


def test_an_own_network_from_training_to_prediction(
    lamp3d: CommandLine, dataset: Path, config: Path, tmp_path: Path
) -> None:
    (lamp3d.folder / "own_nets.py").write_text(CODE, "utf-8")  # where the commands run
    settings, run = tmp_path / "own.yaml", tmp_path / "run"
    own = 'network: {kind: own, name: "own_nets:make", arguments: {inner: 3}, divisor: 2}'
    settings.write_text(config.read_text("utf-8").replace("network: {kind: unet, filters: 2}", own), "utf-8")
    done = lamp3d("train", dataset, "--config", settings, "--out", run, "--devices", 2)
    assert done.code == 0, done.err
    assert "Plain, mini-batch" in done.out
    assert Checkpoint(run / "best.safetensors").read("model")["network.heads.0.weight"].shape == (10, 3, 1, 1, 1)
    scan = next((dataset / "images").iterdir())
    done = lamp3d("predict", run, scan, "--out", tmp_path / "labels", "--devices", 2)
    assert done.code == 0, done.err
    assert len(list((tmp_path / "labels").iterdir())) == 1

    refused = lamp3d("predict", "--model", run, scan, "--out", tmp_path / "others")
    assert refused.code != 0
    assert "names code to make its network, own_nets:make" in refused.err
    refused = lamp3d("export", run, tmp_path / "model", "--name", "a", "--data", "b", "--licence", "c")
    assert refused.code != 0
    assert "a network of your own (own_nets:make)" in refused.err
    assert not (tmp_path / "model").exists()


def test_a_network_of_one_size_needs_windows_and_is_trained_with_them(
    lamp3d: CommandLine, dataset: Path, config: Path, tmp_path: Path
) -> None:
    (lamp3d.folder / "own_fixed.py").write_text(CODE, "utf-8")
    settings, run = tmp_path / "fixed.yaml", tmp_path / "run"
    own = 'network: {kind: own, name: "own_fixed:Fixed", divisor: 16}'
    settings.write_text(config.read_text("utf-8").replace("network: {kind: unet, filters: 2}", own), "utf-8")
    stages = "train.curriculum=[{patch: [16, 16, 32], epochs: 1}]"
    done = lamp3d("train", dataset, stages, "--config", settings, "--out", run)
    assert done.code != 0
    assert "validation predicts whole volumes, and Fixed does not take the largest" in done.err
    assert not run.exists()
    done = lamp3d("train", dataset, stages, "predict.window=[16, 16, 16]", "--config", settings, "--out", run)
    assert done.code != 0
    assert "Fixed does not accept an input of 1×1×16×16×16" in done.err
    assert not run.exists()

    done = lamp3d("train", dataset, stages, "predict.window=[16, 16, 32]", "--config", settings, "--out", run)
    assert done.code == 0, done.err
    assert "Dice" in done.out
    scan = next((dataset / "images").iterdir())
    done = lamp3d("predict", run, scan, "--out", tmp_path / "labels", "--devices", 2)
    assert done.code == 0, done.err
    done = lamp3d("evaluate", run, dataset)
    assert done.code == 0, done.err
    assert json.loads((run / "results.json").read_text("utf-8"))["settings"]["window"] == [16, 16, 32]
    done = lamp3d("predict", run, scan, "--out", tmp_path / "others", "--window", "whole")
    assert done.code != 0
    assert "Fixed does not accept an input of" in done.err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("own_nets_here:make", {"iner": 3}, "called with in_channels, out_channels, iner"),
        ("own_nets_here:mak", {}, "no network 'own_nets_here:mak'"),
        ("no_such_module:make", {}, "no network 'no_such_module:make'"),
        ("own_nets_here", {}, "write it as package.module:function"),
        ("own_nets_here:no_network", {}, r"gives str, not a torch\.nn\.Module"),
        ("own_nets_here:__name__", {}, "is no function that makes a network, but str"),
        ("own_nets_here:broken", {}, r"fails with KeyError: 'width' \(.*own_nets_here\.py, line \d+\)"),
        ("own_nets_wrong:make", {}, r"fails with SyntaxError: invalid syntax \(.*own_nets_wrong\.py, line 1\)"),
    ],
)
def test_what_makes_no_network_is_said(
    name: str, arguments: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets_here.py").write_text(CODE, "utf-8")
    (tmp_path / "own_nets_wrong.py").write_text("def make(:", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        NetworkConfig(kind="own", name=name, arguments=arguments).build(2)


def test_one_output_is_taken_out_of_its_list_and_several_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets_too.py").write_text(CODE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    image = torch.zeros(1, 1, 4, 4, 4)
    build = NetworkConfig(kind="own", name="own_nets_too:make").build
    assert build(3)(image).shape == (1, 3, 4, 4, 4)
    several = NetworkConfig(kind="own", name="own_nets_too:make", arguments={"outputs": 2}).build(3)
    with pytest.raises(ConfigError, match=r"Plain gives 2 level\(s\) of logits, .*deep_supervision: 0 wants 1"):
        several(image)


def test_coarser_levels_follow_the_finest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_levels.py").write_text(CODE, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    image = torch.randn(1, 1, 4, 4, 4)
    for stacked in (False, True):
        settings = {"kind": "own", "name": "own_levels:Levels", "arguments": {"stacked": stacked}}
        settings["deep_supervision"] = 1
        network = NetworkConfig.model_validate(settings).build(3)
        assert network.heads == 2
        torch.manual_seed(0)
        logits = network(image)
        torch.manual_seed(0)
        levels = network.network(image)
        fine, coarse = levels[0].unbind(0) if stacked else (levels[0][0], levels[1][0])
        if not stacked:
            coarse = torch.nn.functional.interpolate(coarse[None], size=(4, 4, 4), mode="trilinear")[0]
        torch.testing.assert_close(logits, torch.cat([fine, coarse])[None])
        assert network.eval()(image).shape[1] == (3 if stacked else 6)
        more = NetworkConfig.model_validate(settings | {"deep_supervision": 2}).build(3)
        with pytest.raises(ConfigError, match=r"gives 2 level\(s\) of logits, .*deep_supervision: 2 wants 3"):
            more(image)


@pytest.mark.parametrize("stacked", [False, True])
def test_another_graph_in_evaluation_from_training_to_prediction(
    stacked: bool, lamp3d: CommandLine, dataset: Path, config: Path, tmp_path: Path
) -> None:
    (lamp3d.folder / "own_two.py").write_text(CODE, "utf-8")
    settings, run = tmp_path / "own.yaml", tmp_path / "run"
    arguments = f"arguments: {{stacked: {str(stacked).lower()}}}"
    own = f'{{kind: own, name: "own_two:Levels", {arguments}, divisor: 2, deep_supervision: 1}}'
    settings.write_text(config.read_text("utf-8").replace("{kind: unet, filters: 2}", own), "utf-8")
    stages = "train.curriculum=[{patch: [16, 16, 32], batch: 2, epochs: 1, data: 1, space: 1}]"
    devices = 1 if stacked else 2  # a pipeline cannot be one for both graphs
    done = lamp3d("train", dataset, stages, "--config", settings, "--out", run, "--devices", devices)
    assert done.code == 0, done.err
    assert "Dice" in done.out
    if stacked:
        refused = lamp3d("train", dataset, stages, "--config", settings, "--out", tmp_path / "other", "--devices", 2)
        assert refused.code != 0
        assert "is another network in validation" in refused.err
    scan = next((dataset / "images").iterdir())
    done = lamp3d("predict", run, scan, "--out", tmp_path / "labels", "--devices", devices)
    assert done.code == 0, done.err
