"""What takes tensors apart from torch's operators, and would not notice that one is a stand-in while it is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch._functorch.vmap
import torch.utils.checkpoint
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError

StandIn = Callable[[Any], bool]


@contextmanager
def functions_apart(is_stand_in: StandIn) -> Iterator[None]:
    """Within it, a stand-in that is given to what takes tensors apart from torch's operators is taken care of.

    Functions with a backward of their own, checkpoints, what is scripted or mapped over cases, and what makes tensors
    of numbers: torch would end the process.

    Args:
        is_stand_in: whether something is one.
    """
    frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.autograd.Function, "apply", partial(_refusing, is_stand_in, OWN_BACKWARD)),
        (torch, "as_tensor", partial(_converting, is_stand_in)),
        (torch, "asarray", partial(_refusing, is_stand_in, NEW_TENSOR)),
        (torch, "tensor", partial(_refusing, is_stand_in, NEW_TENSOR)),
        (torch.jit.ScriptFunction, "__call__", partial(_refusing, is_stand_in, SCRIPTED)),
    ]
    internal = (frame, "save_inputs", OWN_BACKWARD), (torch._functorch.vmap, "_add_batch_dim", MAPPED)
    places += [
        (owner, name, partial(_refusing, is_stand_in, why)) for owner, name, why in internal if hasattr(owner, name)
    ]
    with ExitStack() as stack:
        for owner, name, instead_of in places:
            plain = owner.__dict__[name]
            stack.callback(setattr, owner, name, plain)
            if isinstance(plain, classmethod):  # not bound to its class: subclasses use it
                setattr(owner, name, classmethod(instead_of(plain.__func__)))
            else:
                setattr(owner, name, instead_of(plain))
        yield


OWN_BACKWARD = (
    "its forward calls a function with a backward of its own. If that is activation checkpointing, turn it off "
    "(use_checkpoint=False): lamp3d recomputes by itself where memory is short."
)
NEW_TENSOR = (
    "its forward makes a new tensor of the numbers in one that it has computed, which a graph of it would not; use "
    "x.detach() or x.clone()."
)


SCRIPTED = (
    "its forward calls a function that has been through torch.jit.script, which leaves nothing to be traced; take away "
    "@torch.jit.script."
)
MAPPED = "its forward calls torch.vmap, which leaves nothing to be traced; write it with operations on all cases."


def _refusing(is_stand_in: StandIn, why: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if any(is_stand_in(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
            raise ConfigError(why)
        return function(*args, **kwargs)

    return refusing


def _converting(is_stand_in: StandIn, function: Callable[..., Any]) -> Callable[..., Any]:
    """What leaves a tensor a tensor, perhaps of another type or elsewhere."""

    @wraps(function)
    def converting(data: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_stand_in(data):
            return _refusing(is_stand_in, NEW_TENSOR, function)(data, *args, **kwargs)
        there = {key: value for key, value in kwargs.items() if value is not None}
        return data.to(*args, **there) if args or there else data

    return converting
