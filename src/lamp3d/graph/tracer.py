"""Tracing with shapes: ``torch.fx``, with every value's shape known while the network's own code runs.

Plain symbolic tracing hands the network objects that know nothing: code that compares extents, iterates over a split
or asks whether something is a tensor fails, or silently takes another branch. Here every traced value carries a fake
tensor, so that such code sees what it would see: an extent is a number, a tuple has a length, a tensor is a tensor.
What the network reads of the shape becomes part of the graph, which then holds for that shape alone (``reads_shape``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import is_dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError
from lamp3d.graph.inputs import arguments
from lamp3d.graph.shapes import quiet

VALUE, VARIES = "lamp3d_value", "lamp3d_varies"
"""Where a node's ``meta`` keeps what it evaluates to (fake tensors, or containers of them), and whether the input has a
part in it."""

_FREE_OF_EXTENTS = {"dim", "ndim", "ndimension", "dtype", "device", "is_cuda", "is_floating_point", "requires_grad",
                    "layout", "is_sparse", "is_quantized", "is_meta", "is_complex"}  # fmt: skip


class ShapedTracer(fx.Tracer):
    """Traces a module that takes tensors.

    Args:
        input_shapes: of each input, by the name of ``forward``'s parameter; the first is passed by its place.
        dtype: of the inputs.
        device: on which parameters and inputs lie.

    Attributes:
        reads_shape: whether the network's code has looked at an extent, so that the graph may hold for this shape only.
        constants: tensors that the network's code has made and used, by the names that they have in the graph.
    """

    def __init__(self, input_shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.reads_shape = False
        self.constants: dict[str, Tensor] = {}
        self._input_shapes, self._dtype, self._device = dict(input_shapes), dtype, device
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._evaluating = False
        self._modes = _modes()

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of a module; its nodes keep nothing of what they evaluated to.

        Raises:
            ConfigError: the module's code does what a graph of it would not.
        """
        self._modes, numbers = _modes(), _random_states()
        with quiet(), torch.set_grad_enabled(torch.is_grad_enabled()), _functions_apart():
            graph = super().trace(root, concrete_args)
        if numbers != _random_states():
            raise ConfigError(
                "its forward draws random numbers that do not depend on a tensor, so that a graph of it would draw "
                "them once for all; use torch.nn.Dropout, or draw with torch.rand_like or x.new_empty(…).bernoulli_()."
            )
        buffers: list[tuple[str, Any]] = list(root.named_buffers())
        if assigned := [name for name, buffer in buffers if type(buffer) is _ShapedProxy]:
            raise ConfigError(
                f"its forward assigns to the buffer {assigned[0]}, which a graph of it would not; change the buffer "
                f"there is, with self.{assigned[0]}.copy_(…)."
            )
        for node in graph.nodes:
            node.meta.pop(VALUE, None)
            node.meta.pop(VARIES, None)
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """What to call to trace: the network with the inputs, the other parameters of its forward at their defaults."""
        inputs = {name: self.create_proxy("placeholder", name, (), {}) for name in self._input_shapes}
        args, kwargs = arguments(self.root, inputs)
        return lambda root: root(*args, **kwargs), [self.root]  # not `forward`: it may have hooks

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers within the network, and einops's, which look at the type of what they are given."""
        leaf = m.__module__.startswith("einops.") or super().is_leaf_module(m, module_qualified_name)
        return leaf and m is not self.root

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The stand-in for a node's value."""
        return _ShapedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; a stand-in passes for a tensor everywhere else."""
        if type(a) is _ShapedProxy:
            return a.node
        if type(a) is Tensor and not any(a is buffer for buffer in self.root.buffers()):
            if a.grad_fn is not None:
                raise ConfigError(
                    "its forward computes with parameters that it does not call by name (self.weight), so that a graph "
                    "of it would do so once for all; leave penalties on all parameters() to the loss or the optimizer."
                )
            # fx would make the constant an attribute of the network, which is not ours to change.
            name = next(
                (name for name, known in self.constants.items() if known is a), f"constant{len(self.constants)}"
            )
            self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
        if isinstance(a, tuple) and hasattr(a, "_fields"):  # fx would make its making a node, whose value is no tensor
            return type(a)(*(self.create_arg(item) for item in a))
        if is_dataclass(a) and not isinstance(a, type):
            raise ConfigError(
                f"its forward puts tensors into a {type(a).__name__}, which a graph of it does not know; return a "
                "tuple (a named one will do), a list or a dict."
            )
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """A new node, evaluated; what is no tensor is no node but the value itself."""
        if self._modes != _modes():
            raise ConfigError(
                "its forward switches gradients or autocast off or on, which a graph of it would not; freeze "
                "parameters with requires_grad_(False), and cut gradients with detach()."
            )
        if target == "__setitem__" or getattr(target, "__name__", None) == "setitem":
            raise ConfigError(
                "its forward writes into a part of a tensor that it has made, which a graph of it would not; build it "
                "with torch.cat or torch.nn.functional.pad."
            )
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind == "output":
            return proxy
        value = self._evaluate(kind, target, args, kwargs)
        varies = kind == "placeholder" or any(node.meta.get(VARIES) for node in proxy.node.all_input_nodes)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            self.graph.erase_node(proxy.node)
            self.reads_shape |= varies and target not in _FREE_OF_EXTENTS
            return value
        proxy.node.meta |= {VALUE: value, VARIES: varies}
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module's call: as it is while a node is evaluated."""
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute: as it is while a node is evaluated. Buffers are read each time, for they may change."""
        if self._evaluating:
            return attr_val
        if type(attr_val) is Tensor:
            name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
            return attr_val if name is None else self.create_proxy("get_attr", name, (), {})
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.node.meta[VALUE] if type(leaf) is _ShapedProxy else leaf,
            (args, kwargs),
            is_leaf=lambda leaf: type(leaf) is _ShapedProxy,
        )
        self._evaluating = True
        try:
            with self._fakes, torch.no_grad():
                if kind == "placeholder":
                    return torch.empty(tuple(self._input_shapes[target]), dtype=self._dtype, device=self._device)
                if kind == "get_attr":
                    return self._stand_in(attribute(self.root, target))
                if kind == "call_module":
                    module = self.root.get_submodule(target)
                    state = (*module.named_parameters(), *module.named_buffers())  # BatchNorm counts in a buffer
                    fakes: dict[str, Tensor] = {name: self._stand_in(tensor) for name, tensor in state}
                    return functional_call(module, fakes, args, kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        finally:
            self._evaluating = False

    def _stand_in(self, tensor: Any) -> Any:
        """A fake tensor for one of the network's; what has no content is supposed to be where the inputs are."""
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.device.type != "meta":
            return self._fakes.from_tensor(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)


def _random_states() -> tuple[Any, ...]:
    """Of all generators that a forward may draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002


def _modes() -> tuple[bool, ...]:
    """What a forward may switch, and fx does not write down."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


@contextmanager
def _functions_apart() -> Iterator[None]:
    """Within it, a stand-in that is given to what takes tensors apart from torch's operators is taken care of.

    Functions with a backward of their own, checkpoints, and what makes tensors of numbers: torch would end the process.
    """
    frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", None)
    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (torch.autograd.Function, "apply", partial(_refusing, OWN_BACKWARD)),
        (torch, "as_tensor", _converting),
        (torch, "asarray", partial(_refusing, NEW_TENSOR)),
        (torch, "tensor", partial(_refusing, NEW_TENSOR)),
    ]
    if hasattr(frame, "save_inputs"):
        places.append((frame, "save_inputs", partial(_refusing, OWN_BACKWARD)))
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


def _refusing(why: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if any(type(leaf) is _ShapedProxy for leaf in pytree.tree_leaves((args, kwargs))):
            raise ConfigError(why)
        return function(*args, **kwargs)

    return refusing


def _converting(function: Callable[..., Any]) -> Callable[..., Any]:
    """What leaves a tensor a tensor, perhaps of another type or elsewhere."""

    @wraps(function)
    def converting(data: Any, *args: Any, **kwargs: Any) -> Any:
        if type(data) is not _ShapedProxy:
            return _refusing(NEW_TENSOR, function)(data, *args, **kwargs)
        there = {key: value for key, value in kwargs.items() if value is not None}
        return data.to(*args, **there) if args or there else data

    return converting


class _ShapedProxy(fx.Proxy):
    """A stand-in for a tensor (or a container of tensors) whose shape is known."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor if isinstance(self.node.meta.get(VALUE), Tensor) else _ShapedProxy

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.node.meta[VALUE], name)
        assert isinstance(self.tracer, ShapedTracer)
        if isinstance(value, Tensor):  # such as x.T; fx would make a node of it at its use only
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if callable(value):
            return super().__getattr__(name)
        self.tracer.reads_shape |= self.node.meta[VARIES] and name not in _FREE_OF_EXTENTS
        return value

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # type: ignore[index]

    def __len__(self) -> int:
        value = self.node.meta[VALUE]
        if isinstance(value, Tensor):
            assert isinstance(self.tracer, ShapedTracer)
            self.tracer.reads_shape |= self.node.meta[VARIES]
        return len(value)


def attribute(module: Any, path: str) -> Any:
    """What a dotted path leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module
