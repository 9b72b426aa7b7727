"""Training on one device: exact resume, the guard against bad steps, stages, best checkpoint, and what is recorded."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamp3d.data import Batch
from lamp3d.errors import ConfigError, DiskFullError, TrainingError
from lamp3d.parallel import Engine
from lamp3d.plan import Plan, make_plan
from lamp3d.train import (
    Checkpoint,
    HybridLoss,
    LossConfig,
    TrainConfig,
    Trainer,
    load_weights,
    network_tensors,
    read_history,
)
from lamp3d.train.history import EpochRecord, RunRecorder

ORGANS = ("Left", "Right")
STEPS = 3  # an epoch


def network(seed: int = 0, filters: int = 3) -> nn.Module:
    """Small, with all that has state or chance in it: running statistics and dropout."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, filters, 3, padding=1),
        nn.BatchNorm3d(filters),
        nn.LeakyReLU(),
        nn.Dropout3d(0.3),
        nn.Conv3d(filters, 3, 1),
    )


class FakeBatches:
    """Random volumes whose labels are their own sign: a pure function of (stage, epoch, i), as real ones are."""

    def __init__(self, stage: int, epoch: int, whole: bool, bad: Callable[[int, int, int], bool]) -> None:
        self.place = (stage, epoch)
        self.whole = whole
        self.bad = bad

    def __len__(self) -> int:
        return STEPS

    def share_of(self, planned: Sequence[int]) -> float:
        return (4 * 6 * 4 + 4 * 4 * 8 if self.whole else 2 * 4**3) / math.prod(planned)

    def read(self, i: int, *, images: bool = True, labels: bool = True, part: Any = None) -> Batch:
        stage, epoch = self.place
        generator = torch.Generator().manual_seed(100 * stage + 10 * epoch + i)
        shapes = [(4, 6, 4), (4, 4, 8)] if self.whole else [(4, 4, 4)] * 2
        volumes = [torch.randn(1, 1, *shape, generator=generator) for shape in shapes]
        truth = [(volume > 0.5).long() + (volume > 1).long() for volume in volumes]
        if self.bad(stage, epoch, i):
            volumes[1][..., 0] = math.nan
        if part is not None:
            volumes, truth = ([v[(..., *part(v.shape[2:]))] for v in of] for of in (volumes, truth))
        pictures, maps = (volumes, truth) if self.whole else (torch.cat(volumes), torch.cat(truth))
        annotated = torch.tensor([[True, True, True], [False, True, False]])
        names = (f"case{i}a", f"case{i}b")
        return Batch(pictures if images else None, maps if labels else None, annotated, names, tuple(shapes))


def never(stage: int, epoch: int, i: int) -> bool:
    return False


def settings(**changes: Any) -> TrainConfig:
    curriculum = [
        {"patch": 4, "batch": 2, "epochs": 3, "learning_rate": 0.01},
        {"patch": "whole", "batch": 2, "epochs": 2, "learning_rate": 0.005},
    ]
    return TrainConfig.model_validate({"curriculum": curriculum, "precision": "fp32", "seed": 7} | changes)


def plans(net: nn.Module, config: TrainConfig) -> list[Plan]:
    shapes = [(2, 1, 4, 4, 4) if stage.patch_shape else (1, 1, 4, 6, 4) for stage in config.curriculum]
    # In a fixed layout: which one is faster is a matter of chance here, and they differ in their roundings.
    return [
        make_plan(net, shape, devices=1, micro_batches=1, precision="fp32", channels_last=False) for shape in shapes
    ]


def trainer(
    run: Path,
    config: TrainConfig,
    *,
    net: nn.Module | None = None,
    bad: Callable[[int, int, int], bool] = never,
    validate: Callable[[Engine], dict[str, float]] | None = None,
) -> Trainer:
    net = net or network()
    return Trainer(
        net,
        plans(net, config),
        config,
        HybridLoss(LossConfig(), ORGANS),
        lambda stage, epoch: FakeBatches(stage, epoch, config.curriculum[stage].patch == "whole", bad),  # type: ignore
        validate,
        run,
    )


def probe(engine: Engine) -> dict[str, float]:
    """A "Dice" that depends on the weights, as the real one does."""
    logits = engine.forward(torch.linspace(-1, 1, 64).reshape(1, 1, 4, 4, 4))
    assert logits is not None
    return {"Left": float(logits[:, 1].sigmoid().mean()), "Right": math.nan}


def tensors(path: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(path)
    return {f"{part}/{k}": v for part in ("model", "optimizer", "ema") for k, v in checkpoint.read(part).items()}


def assert_same(ours: Path, theirs: Path) -> None:
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert Checkpoint(ours).progress == Checkpoint(theirs).progress


def history(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock and the machine."""
    return [record.model_dump(exclude={"seconds_per_step", "peak_bytes"}) for record in read_history(run)]


def interrupt_at(step: int) -> Callable[[int, int, int], bool]:
    """Ctrl-C when so many mini-batches have been asked for."""
    count = itertools.count()

    def bad(stage: int, epoch: int, i: int) -> bool:
        if next(count) == step:
            raise KeyboardInterrupt
        return bad_sometimes(stage, epoch, i)

    return bad


def bad_sometimes(stage: int, epoch: int, i: int) -> bool:
    return (stage, epoch, i) in {(0, 0, 1), (0, 1, 2), (0, 2, 0), (1, 0, 2)}


VARIANTS = [
    {"optimizer": "rmsprop"},
    {"optimizer": "sgd", "lr_schedule": "poly", "weight_decay": 3e-5},
    {"optimizer": "adamw", "weight_decay": 0.1, "lr_schedule": "cosine", "clip_norm": 0.5, "ema_decay": 0.9},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant["optimizer"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, variant: dict[str, Any]) -> None:
    config = settings(**variant)
    trainer(tmp_path / "straight", config, bad=bad_sometimes, validate=probe).fit()
    assert len(history(tmp_path / "straight")) == 5
    # In the first epoch, just after one, within a later one, at the change of stages, and in the last stage.
    for step in (1, 3, 7, 9, 13):
        run = tmp_path / f"interrupted{step}"
        with pytest.raises(KeyboardInterrupt):
            trainer(run, config, bad=interrupt_at(step), validate=probe).fit()
        # The initial weights of the second process do not matter: those of the checkpoint do.
        trainer(run, config, net=network(seed=99), bad=bad_sometimes, validate=probe).fit(resume=True)
        for name in ("last.safetensors", "best.safetensors"):
            assert_same(run / name, tmp_path / "straight" / name)
        assert history(run) == history(tmp_path / "straight")


def test_it_learns_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curriculum = [{"patch": 4, "batch": 2, "epochs": 20, "learning_rate": 0.01}]
    trainer(tmp_path, settings(curriculum=curriculum)).fit()
    records = read_history(tmp_path)
    assert [(record.stage, record.epoch, record.step) for record in records] == [(1, e, 3 * e) for e in range(1, 21)]
    losses = [record.loss for record in records]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert all(record.peak_bytes[0] > 0 and record.seconds_per_step > 0 for record in records)
    assert {record.volume_share for record in records} == {1.0}  # of patches, which are all alike
    assert not (tmp_path / "best.safetensors").exists()
    assert list((tmp_path / "tensorboard").glob("events*"))
    output = capsys.readouterr().out
    assert output.count("\n") == 20
    assert "stage 1/1 epoch 20/20  loss " in output
    for part in ("s/step", "lr 0.01", "peak", "GB"):
        assert part in output


def test_a_bad_step_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the weights, nor the running statistics, nor the optimizer; it is counted and names its cases."""
    net = network()
    before = {name: tensor.clone() for name, tensor in network_tensors(net).items()}
    curriculum = [{"patch": 4, "batch": 2, "epochs": 2, "learning_rate": 0.01}]
    made = trainer(tmp_path, settings(curriculum=curriculum), net=net, bad=lambda stage, epoch, i: epoch == 0)
    made.fit()
    first = Checkpoint(tmp_path / "last.safetensors")
    assert first.progress["bad_steps"] == STEPS
    record = read_history(tmp_path)[0]
    assert (record.loss, record.bad_steps) == (None, STEPS)
    assert record.bad_cases == {f"case{i}{letter}": 1 for i in range(STEPS) for letter in "ab"}
    assert json.loads((tmp_path / "history.jsonl").read_text().splitlines()[0])["loss"] is None
    assert "Step 2 changed nothing (loss nan, first non-finite gradient: 0.weight; cases case1a, case1b)" in (
        capsys.readouterr().out
    )
    # The second epoch's end is that of a run without the first: nothing of it is left.
    other = trainer(tmp_path / "other", settings(curriculum=curriculum), net=network())
    other.state.epoch = 1
    other.fit()
    for name, tensor in network_tensors(net).items():
        assert torch.equal(tensor, network_tensors(other.network)[name]), name
        assert not torch.equal(tensor, before[name]), name


def test_an_infinite_gradient_under_a_finite_loss_is_seen(tmp_path: Path) -> None:
    net = network()
    before = net[0].weight.detach().clone()
    net[4].weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(TrainingError, match=r"first non-finite gradient: 4\.weight"):
        trainer(tmp_path, settings(max_bad_steps=2), net=net).fit()
    assert torch.equal(net[0].weight, before)


def test_a_run_of_bad_steps_stops_with_a_diagnosis_and_can_be_resumed(tmp_path: Path) -> None:
    def bad(stage: int, epoch: int, i: int) -> bool:
        return (stage, epoch) >= (0, 1)

    with pytest.raises(TrainingError) as caught:
        trainer(tmp_path, settings(max_bad_steps=5), bad=bad).fit()
    message = str(caught.value)
    for part in (
        "5 steps in a row",
        "Stage 1 of 2 (patches of 4x4x4, batch 2, learning rate 0.01)",
        "precision fp32",
        "epoch 3, step 8",
        "loss nan",
        "case0a (2x)",
        "learning_rate",
        "0.003",
        "clip_norm",
        "--resume",
    ):
        assert part in message, part
    # Across the epochs' boundary: two epochs are safe, three of the bad steps among them.
    assert Checkpoint(tmp_path / "last.safetensors").progress["bad_in_a_row"] == [
        [f"case{i}a", f"case{i}b"] for i in range(STEPS)
    ]
    trainer(tmp_path, settings(max_bad_steps=5, clip_norm=1.0)).fit(resume=True)
    assert len(read_history(tmp_path)) == 5


def test_changed_settings_are_told_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, settings()).fit()
    trainer(tmp_path, settings(clip_norm=1.0)).fit(resume=True)
    output = capsys.readouterr().out
    assert "the finished run (5 epochs, 15 steps)" in output
    assert "Settings changed since the checkpoint: clip_norm" in output


def test_a_stage_that_is_done_is_not_lengthened_and_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, settings(), bad=interrupt_at(4 * STEPS)).fit()
    told = "Stages that are done stay as they are; to train longer, add another one."
    first, second = ({**stage.model_dump(), "epochs": stage.epochs + 1} for stage in settings().curriculum)
    for changed, is_told in (([settings().curriculum[0], second], False), ([first, second], True)):
        longer = trainer(tmp_path, settings(curriculum=changed))
        longer._open_run(resume=True)
        assert (told in capsys.readouterr().out) == is_told
    longer.fit(resume=True)
    assert [record.stage for record in read_history(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_a_full_disk_ends_a_run_that_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: RunRecorder, record: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunRecorder, "end_epoch", full)
        with pytest.raises(DiskFullError, match=f"{tmp_path} could not be written: No space left .*a study: by"):
            trainer(tmp_path, settings()).fit()
    trainer(tmp_path, settings()).fit(resume=True)
    assert len(read_history(tmp_path)) == 5


def test_a_shorter_curriculum_cannot_go_on(tmp_path: Path) -> None:
    trainer(tmp_path, settings()).fit()
    shorter = settings(curriculum=[{"patch": 4, "batch": 2, "epochs": 3, "learning_rate": 0.01}])
    with pytest.raises(ConfigError, match="past the end"):
        trainer(tmp_path, shorter).fit(resume=True)


def test_a_run_is_not_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    trainer(tmp_path, settings()).fit()
    with pytest.raises(ConfigError, match="already holds a training run"):
        trainer(tmp_path, settings()).fit()
    with pytest.raises(ConfigError, match=r"0\.weight: 3x1x3x3x3 in the file, 4x1x3x3x3 in the network"):
        trainer(tmp_path, settings(), net=network(filters=4)).fit(resume=True)
    (tmp_path / "history.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"history\.jsonl holds 0 epochs"):
        trainer(tmp_path, settings()).fit(resume=True)


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"of": "a run that died before its first checkpoint"}\n{"cut o')
    trainer(tmp_path, settings()).fit(resume=True)
    assert len(read_history(tmp_path)) == 5


class WithSpares(nn.Module):
    """Parts that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = network(), nn.Conv3d(3, 3, 1)
        self.register_buffer("order", torch.arange(3))

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


def test_what_a_network_does_not_use_is_kept_all_the_same(tmp_path: Path) -> None:
    net, config = WithSpares(), settings()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    trainer(tmp_path / "run", config, net=net, validate=probe).fit()
    for name in ("last", "best"):
        kept = Checkpoint(tmp_path / "run" / f"{name}.safetensors")
        kept.check_network(net)
        weights = kept.read("model")
        assert all(torch.equal(weights[key], before[key]) for key in ("spare.weight", "spare.bias", "order"))
        assert not torch.equal(weights["body.0.weight"], before["body.0.weight"])
    more = settings(curriculum=[*config.model_dump()["curriculum"], {"patch": 4, "batch": 2, "epochs": 1}])
    trainer(tmp_path / "run", more, net=WithSpares()).fit(resume=True)


def test_the_best_checkpoint_is_that_of_the_best_mean(tmp_path: Path) -> None:
    scores: Iterator[tuple[float, float]] = iter([(0.2, 0.4), (0.9, math.nan), (0.6, 0.6), (math.nan, math.nan)])
    seen: list[Tensor] = []
    net = network()

    def validate(engine: Engine) -> dict[str, float]:
        assert not net.training
        seen.append(engine.parameters["0.weight"].detach().clone())
        return dict(zip(ORGANS, next(scores), strict=True))

    curriculum = [{"patch": 4, "batch": 2, "epochs": 7, "learning_rate": 0.01}]
    trainer(tmp_path, settings(curriculum=curriculum, validate_every=2), net=net, validate=validate).fit()
    records = read_history(tmp_path)
    assert [record.mean_dice for record in records if record.dice is not None] == [pytest.approx(0.3), 0.9, 0.6, None]
    assert [record.epoch for record in records if record.dice is not None] == [2, 4, 6, 7]
    assert records[3].dice == {"Left": 0.9, "Right": None}
    assert records[-1].best_dice == 0.9
    best = Checkpoint(tmp_path / "best.safetensors")
    assert best.progress["best_epochs"] == 4
    loaded = network(seed=5)
    load_weights(loaded, tmp_path / "best.safetensors")
    assert torch.equal(loaded[0].weight, seen[1])


def test_averaged_weights_are_validated_and_kept_as_the_best(tmp_path: Path) -> None:
    net = network()
    validated: list[Tensor] = []

    def validate(engine: Engine) -> dict[str, float]:
        validated.append(engine.parameters["0.weight"].detach().clone())
        return {"Left": len(validated) / 10}

    trainer(tmp_path, settings(ema_decay=0.9), net=net, validate=validate).fit()
    last = tensors(tmp_path / "last.safetensors")
    assert torch.equal(last["model/0.weight"], net[0].weight)
    assert torch.equal(last["ema/0.weight"], validated[-1])
    assert not torch.equal(last["ema/0.weight"], net[0].weight)
    assert torch.equal(tensors(tmp_path / "best.safetensors")["model/0.weight"], validated[-1])


def test_interruption_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, settings(), bad=interrupt_at(4)).fit()
    output = capsys.readouterr().out
    assert "last.safetensors holds 1 epochs (1 of stage 1), 3 steps" in output
    assert "--resume" in output


def test_a_line_of_the_history_is_an_epoch_whatever_cases_are_called(tmp_path: Path) -> None:
    name = "Müller\u2028Bärbel"  # some take U+2028 for the end of a line
    record = EpochRecord(
        stage=1, epoch=1, step=3, loss=0.5, lr=0.01, seconds_per_step=1.0, peak_bytes=[1], bad_steps=1,
        bad_cases={name: 1}, best_dice=None,
    )  # fmt: skip
    recorder = RunRecorder(tmp_path, settings(), epochs=0, step=0)
    recorder.end_epoch(record)
    recorder.close()
    assert name.encode() in (tmp_path / "history.jsonl").read_bytes()
    assert read_history(tmp_path) == [record]


def test_time_lines_are_of_each_stages_first_epoch(tmp_path: Path) -> None:
    first = tmp_path / "timelines" / "stage-0.json"
    first.parent.mkdir()
    first.write_text("what somebody left")
    trainer(tmp_path, settings()).fit()
    for file in (first, first.with_name("stage-1.json")):
        assert json.loads(file.read_text())["traceEvents"]


def test_one_plan_for_each_stage() -> None:
    config = settings()
    net = network()
    with pytest.raises(ConfigError, match="1 plans for a curriculum of 2 stages"):
        Trainer(net, plans(net, config)[:1], config, HybridLoss(LossConfig(), ORGANS), None, None, Path())  # type: ignore


def test_averaged_weights_are_kept_where_nothing_is_validated(tmp_path: Path) -> None:
    trainer(tmp_path, settings(ema_decay=0.9), validate=None).fit()
    last, best = tensors(tmp_path / "last.safetensors"), tensors(tmp_path / "best.safetensors")
    for name in ("0.weight", "4.weight"):
        assert torch.equal(best[f"model/{name}"], last[f"ema/{name}"])
        assert not torch.equal(best[f"model/{name}"], last[f"model/{name}"])
