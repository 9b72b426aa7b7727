"""Where memory runs out in spite of the plan, a safer one is named, or used."""

from pathlib import Path
from typing import Any

import pytest

from lamp3d.errors import DeviceMemoryError, WorkerKilledError
from lamp3d.experiment import load_config, train, training
from lamp3d.plan import Plan
from lamp3d.train import read_history


def peak(plan: Plan) -> int:
    return max(device.peak_bytes for device in plan.per_device)


def test_a_safer_plan_is_named_and_used_on_demand(
    config: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_config(config, ["train.curriculum=[{patch: [32, 32, 32], batch: 2, epochs: 2}]"])
    out = tmp_path / "run"
    real, calls = training.launch, []

    def launch(work: Any, devices: int, args: Any) -> Any:
        calls.append(args)
        if len(calls) in (1, 2):
            monkeypatch.setattr(training.Trainer, "_train_stage", run_out)
        else:
            monkeypatch.setattr(training.Trainer, "_train_stage", train_stage)
        return real(work, devices, args)

    train_stage = training.Trainer._train_stage

    def run_out(self: Any) -> None:
        raise MemoryError("of no use")

    monkeypatch.setattr(training, "launch", launch)
    command = f"lamp3d train {dataset} --out {out} --devices=1 --resume --auto-replan"
    with pytest.raises(DeviceMemoryError, match=rf"memory.* next safer plan for stage 1 takes .*: {command}$"):
        train(dataset, settings, 1, out)
    before = Plan.load(out / "plans" / "stage-0.json")
    assert not read_history(out)

    train(dataset, settings, 1, out, resume=True, auto_replan=True)
    after = Plan.load(out / "plans" / "stage-0.json")
    assert peak(after) <= 0.8 * peak(before)
    assert len(calls) == 3
    assert len(read_history(out)) == 2
    assert "it goes on with a safer plan" in " ".join(capsys.readouterr().out.split())


def test_a_worker_that_someone_killed_is_no_reason_to_replan(
    config: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_config(config, ["train.curriculum=[{patch: [16, 16, 32], batch: 2, epochs: 1}]"])
    real = training.launch

    def launch(*args: Any) -> Any:
        real(*args)
        raise WorkerKilledError("worker 1 was killed by SIGKILL")

    monkeypatch.setattr(training, "launch", launch)
    with pytest.raises(WorkerKilledError):
        train(dataset, settings, 1, tmp_path / "run")
