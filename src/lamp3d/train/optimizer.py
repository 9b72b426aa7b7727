"""The optimizer of a rank's own parameters, its state by the parameters' names, and the average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lamp3d.errors import ConfigError
from lamp3d.train.checkpoint import copy_tensors
from lamp3d.train.curriculum import TrainConfig


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rate is set step by step. A rank may have no parameters at all."""
    # Weight decay on kernels only: to pull normalisation's scale and shift to zero serves nothing.
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    adamw = torch.optim.AdamW(groups, fused=True)  # one pass over each parameter, in a quarter of the time
    adamw.register_step_pre_hook(_lay_out_gradients)
    return adamw


def _lay_out_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """As the parameters are: torch's fused kernels read both from end to end, whatever their layouts."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """All state as "NAME/KEY", step counts included; parameters that never had a gradient have none."""
    return {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give each parameter the state that `optimizer_tensors` said, on its own device and in its own memory format.

    Raises:
        ConfigError: the state is that of another kind of optimizer.
    """
    expected = _state_keys(optimizer)
    found = {name.rpartition("/")[2] for name in tensors}
    if found and found != expected:
        raise ConfigError(
            f"The checkpoint's optimizer keeps {', '.join(sorted(found))}, the configured one "
            f"{', '.join(sorted(expected)) or 'nothing'}: within a stage, go on with the optimizer that began it."
        )
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            continue  # another rank's
        parameter = parameters[name]
        if key == "step":  # read by the CPU, except by fused kernels
            restored = tensor.clone().to(parameter.device if optimizer.defaults.get("fused") else "cpu")
        else:
            restored = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        optimizer.state[parameter][key] = restored


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """What the optimizer keeps of every parameter."""
    if isinstance(optimizer, torch.optim.RMSprop):
        return {"square_avg", "step"}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer"} if optimizer.defaults["momentum"] else set()
    return {"exp_avg", "exp_avg_sq", "step"}


class WeightAverage:
    """Exponential moving average of a rank's own parameters.

    Args:
        parameters: to average; their present values are the first average.
        decay: part of the average kept in an update; less in the first ones, so that the beginning is forgotten.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters' present values, after so many updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are their average within this context."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        copy_tensors(self.parameters, self.values)
        try:
            yield
        finally:
            copy_tensors(self.parameters, own)
