"""Plans of curriculum stages, for networks that are not the same for every volume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

from lamp3d.data import CaseStore, Dataset
from lamp3d.errors import ConfigError, PlanError
from lamp3d.experiment import ExperimentConfig
from lamp3d.experiment.planning import is_another_when_validated, plan_stages, stage_plan
from lamp3d.experiment.run import Run
from lamp3d.nets import SEUNet, UNet
from tests.plans import plan_at


class AsDeepAsTheVolume(nn.Module):
    """Another graph for every depth, with an operation that slabs refuse."""

    heads, divisor, in_channels = 1, 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        image = self.first(image).permute(0, 2, 3, 4, 1).permute(0, 4, 1, 2, 3)
        for _ in range(image.shape[2] // 8):
            image = image + self.layer(image).tanh()
        return self.last(image)


def of_two_channels(in_channels: int, out_channels: int) -> nn.Module:
    """A network that is made for scans of two channels alone."""
    if in_channels != 2:
        raise ValueError(in_channels)
    return nn.Conv3d(in_channels, out_channels, 1)


def test_networks_are_asked_for_what_they_need_with_the_scans_channels(
    tiny: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"kind": "own", "name": f"{__name__}:of_two_channels", "divisor": 8}
    train = {"curriculum": [{"patch": 16, "epochs": 1}]}
    config = ExperimentConfig.model_validate({"network": network, "train": train})
    content = tiny(modality={"0": "T1", "1": "T2"})
    run = Run(tmp_path, config, content.root, content.organs, content.channels)
    store = CaseStore(content, config.preprocess, tmp_path / "cache")
    monkeypatch.setattr(CaseStore, "prepare", lambda *_, **__: None)
    planned = plan_at(nn.Conv3d(2, 4, 1), (1, 2, 16, 16, 16), [0])
    assert plan_stages(run, store, content.cases, content.cases, 1, kept={0: planned}) == {0: planned}


def test_networks_that_are_another_when_larger_are_noticed() -> None:
    shape = (1, 1, 32, 32, 32)
    assert is_another_when_validated(AsDeepAsTheVolume(), shape)  # type: ignore[arg-type]
    assert not is_another_when_validated(UNet(1, 2, filters=2), shape)
    assert not is_another_when_validated(SEUNet(1, 2, filters=2), shape)


def test_such_a_network_is_not_divided(
    tiny: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"patch": 16, "batch": batch, "epochs": 1} for batch in (2, 1)]
    config = ExperimentConfig.model_validate({"train": {"precision": "fp32", "curriculum": stages}})
    content = tiny()
    run = Run(tmp_path, config, content.root, content.organs, content.channels)
    store = CaseStore(content, config.preprocess, tmp_path / "cache")
    monkeypatch.setattr(Run, "network", lambda _: AsDeepAsTheVolume())
    plan = stage_plan(run, 0, store, content.cases, 2, memory=None)
    assert (plan.data, len(plan.stages)) == (2, 1)
    with pytest.raises(
        PlanError,
        match=r"^unet is another network in validation .* --devices 1",
    ):
        stage_plan(run, 1, store, content.cases, 2, memory=None)
    assert len(stage_plan(run, 1, store, content.cases, 1, memory=None).stages) == 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"patch": 16}, r"stage 2: images of size \(16, 16, 16\) leave a single voxel .* make one size 32"),
        ({"patch": 20}, "stage 2: a patch of 20x20x20: "),
        ({"patch": 32, "data": 2}, "stage 2: data × space × pipe must be devices"),
    ],
)
def test_what_is_wrong_with_a_stage_says_which(
    tiny: Callable[..., Dataset], tmp_path: Path, second: dict[str, object], message: str
) -> None:
    stages = [{"patch": [32, 16, 16], "epochs": 1}, {"epochs": 1, **second}]
    settings = {"network": {"filters": 2}, "train": {"precision": "fp32", "curriculum": stages}}
    config, content = ExperimentConfig.model_validate(settings), tiny()
    run = Run(tmp_path, config, content.root, content.organs, content.channels)
    store = CaseStore(content, config.preprocess, tmp_path)
    first = stage_plan(run, 0, store, content.cases, 1, memory=None)
    with pytest.raises((ConfigError, PlanError), match=f"^{message}"):
        plan_stages(run, store, content.cases, content.cases, 1, kept={0: first})
