"""Checkpoint files: what goes in comes out, in one piece or not at all, and only into the right network."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lamp3d.errors import ConfigError, DiskFullError, TrainingError
from lamp3d.plan import make_plan
from lamp3d.train import checkpoint as checkpoint_module
from lamp3d.train.checkpoint import Checkpoint, load_weights, network_tensors, save_checkpoint
from lamp3d.train.curriculum import CurriculumStage, TrainConfig
from lamp3d.train.optimizer import WeightAverage, make_optimizer, optimizer_tensors, restore_optimizer


def network(filters: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(1, filters, 3), nn.BatchNorm3d(filters), nn.Conv3d(filters, 2, 1, bias=False))


def layout(tensor: torch.Tensor) -> list[int]:
    """How it lies in memory; the stride of an axis of length one says nothing."""
    return [stride for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def save(path: Path, net: nn.Module, **progress: object) -> None:
    save_checkpoint(path, {f"model/{name}": tensor for name, tensor in network_tensors(net).items()}, progress)


def test_weights_and_progress_come_back_bit_for_bit(tmp_path: Path) -> None:
    written, read = network(seed=1), network(seed=2)
    written[1].running_mean += 0.25
    save(tmp_path / "a.safetensors", written, epoch=3, best=0.1 + 0.2)
    load_weights(read, tmp_path / "a.safetensors")
    assert Checkpoint(tmp_path / "a.safetensors").progress == {"epoch": 3, "best": 0.1 + 0.2}
    for name, tensor in network_tensors(written).items():
        assert torch.equal(tensor, network_tensors(read)[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_layout_and_precision_do_not_matter(tmp_path: Path) -> None:
    written = network(seed=1).to(torch.bfloat16).to(memory_format=torch.channels_last_3d)
    read = network(seed=2)
    save(tmp_path / "a.safetensors", written)
    load_weights(read, tmp_path / "a.safetensors")
    assert torch.equal(read[0].weight, written[0].weight.float())


def test_another_network_is_refused_by_its_first_differences(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", network(filters=2))
    with pytest.raises(ConfigError, match=r"0\.weight: 2x1x3x3x3 in the file, 3x1x3x3x3 in the network; 0\.bias"):
        load_weights(network(filters=3), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"6 of 8 .*1\.bias: 2 in the file, absent in the network"):
        load_weights(nn.Sequential(network()[0]), tmp_path / "a.safetensors")
    longer = nn.Sequential(*network(), nn.Conv3d(2, 2, 1))
    with pytest.raises(ConfigError, match=r"2 of 10 .*3\.weight: absent in the file, 2x2x1x1x1 in the network"):
        load_weights(longer, tmp_path / "a.safetensors")


def test_tied_weights_are_kept_once(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Sequential:
        net = network(seed=seed)
        return nn.Sequential(net[0], net[2], net[2])

    save(tmp_path / "a.safetensors", tied(1))
    read = tied(2)
    load_weights(read, tmp_path / "a.safetensors")
    assert torch.equal(read[2].weight, tied(1)[2].weight)


@pytest.mark.parametrize("damage", ["absent", "cut short", "not safetensors", "foreign"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    if damage == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    elif damage == "not safetensors":
        path.write_bytes(b"\x80\x04\x95 a pickle, which nobody loads")
    elif damage == "cut short":
        save(path, network())
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"a\.safetensors"):
        load_weights(network(), path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), DiskFullError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(5, "Input/output error"), TrainingError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    path = tmp_path / "a.safetensors"
    save(path, network(seed=1), epoch=1)

    def fail(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(expected, match="could not be written" if expected is not KeyboardInterrupt else None):
        save(path, network(seed=2), epoch=2)
    assert Checkpoint(path).progress == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".a.safetensors.x7f").write_bytes(b"half")
    save(tmp_path / "a.safetensors", network())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["rmsprop", "adamw", "sgd"])
def test_optimizer_state_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    """Three steps, or two and a third after a save and a load: the same weights, step counts included."""
    config = TrainConfig(curriculum=(CurriculumStage(patch=8, epochs=1),), optimizer=kind, weight_decay=0.1)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        net(torch.randn(2, 1, 4, 4, 4)).square().mean().backward()
        optimizer.step()

    def parameters(net: nn.Module) -> dict[str, nn.Parameter]:
        return dict(net.named_parameters())

    straight = network().to(memory_format=torch.channels_last_3d)
    optimizer = make_optimizer(parameters(straight), config)
    for seed in range(2):
        step(straight, optimizer, seed)
    state = optimizer_tensors(optimizer, parameters(straight))
    path = tmp_path / "a.safetensors"
    tensors = {f"model/{name}": tensor for name, tensor in network_tensors(straight).items()}
    save_checkpoint(path, tensors | {f"optimizer/{name}": tensor for name, tensor in state.items()}, {})
    step(straight, optimizer, 2)

    resumed = network(seed=9).to(memory_format=torch.channels_last_3d)
    load_weights(resumed, path)
    restored = make_optimizer(parameters(resumed), config)
    restore_optimizer(restored, parameters(resumed), Checkpoint(path).read("optimizer"))
    step(resumed, restored, 2)
    for name, tensor in network_tensors(straight).items():
        assert torch.equal(tensor, network_tensors(resumed)[name]), name
    after = optimizer_tensors(restored, parameters(resumed))
    for name, tensor in optimizer_tensors(optimizer, parameters(straight)).items():
        assert torch.equal(tensor, after[name]), name
        assert layout(tensor) == layout(after[name]), name

    other = TrainConfig(curriculum=config.curriculum, optimizer="adamw" if kind == "rmsprop" else "rmsprop")
    with pytest.raises(ConfigError, match="optimizer that began it"):
        restore_optimizer(make_optimizer(parameters(resumed), other), parameters(resumed), state)


def test_adamw_is_torchs_whatever_the_layout_of_gradients() -> None:
    config = TrainConfig(curriculum=(CurriculumStage(patch=8, epochs=1),), optimizer="adamw")
    ours = nn.Conv3d(4, 8, 3).to(memory_format=torch.channels_last_3d)
    theirs = copy.deepcopy(ours)
    fused = make_optimizer(dict(ours.named_parameters()), config)
    plain = torch.optim.AdamW(theirs.parameters(), weight_decay=0.0, fused=False, foreach=False)
    for _ in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape)  # contiguous
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_weight_decay_spares_norms_and_biases() -> None:
    net = network()
    config = TrainConfig(curriculum=(CurriculumStage(patch=8, epochs=1),), weight_decay=0.1)
    groups = make_optimizer(dict(net.named_parameters()), config).param_groups
    assert {p.ndim for p in groups[0]["params"]} == {5}
    assert [groups[0]["weight_decay"], groups[1]["weight_decay"]] == [0.1, 0.0]
    make_optimizer({}, config)  # a rank whose cells have no parameters


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "rmsprop"},
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "ema_decay": 0.9},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "sgd", "ema_decay": 0.9},
    ],
)
def test_plans_know_what_is_kept_of_every_weight(settings: dict[str, Any]) -> None:
    config = TrainConfig(curriculum=(CurriculumStage(patch=8, epochs=1),), **settings)
    parameters = dict(nn.Conv3d(2, 3, 3).named_parameters())
    optimizer = make_optimizer(parameters, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [t for name, t in optimizer_tensors(optimizer, parameters).items() if not name.endswith("/step")]
    if config.ema_decay is not None:
        kept += WeightAverage(parameters, config.ema_decay).values.values()
    count = sum(parameter.numel() for parameter in parameters.values())
    assert sum(tensor.numel() for tensor in kept) == config.optimizer_copies * count
    shape = (1, 2, 32, 32, 32)
    few, more = (make_plan(nn.Conv3d(2, 3, 3), shape, hardware="h100-80g", optimizer_copies=n) for n in (0, 3))
    assert more.peak_bytes - few.peak_bytes == 3 * 4 * count


def test_weight_average_follows_and_steps_aside() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    average = WeightAverage(dict(net.named_parameters()), decay=0.5)
    nn.init.constant_(net.weight, 1.0)
    average.update(0)  # early: a tenth of the average is kept
    assert average.values["weight"].item() == pytest.approx(0.9)
    nn.init.constant_(net.weight, 2.0)
    average.update(1000)
    with average.applied():
        assert net.weight.item() == pytest.approx(1.45)
    assert net.weight.item() == 2.0
