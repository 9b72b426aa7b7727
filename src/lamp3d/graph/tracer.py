"""Tracing with shapes: ``torch.fx``, with every value's shape known while the network's own code runs.

Plain symbolic tracing hands the network objects that know nothing: code that compares extents, iterates over a split
or asks whether something is a tensor fails, or silently takes another branch. Here every traced value carries a fake
tensor, so that such code sees what it would see: an extent is a number, a tuple has a length, a tensor is a tensor.
What the network reads of the shape becomes part of the graph, which then holds for that shape alone (``reads_shape``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError
from lamp3d.graph.apart import functions_apart
from lamp3d.graph.inputs import arguments
from lamp3d.graph.shapes import quiet

VALUE, VARIES = "lamp3d_value", "lamp3d_varies"
"""Where a node's ``meta`` keeps what it evaluates to (fake tensors, or containers of them), and whether the input has a
part in it."""

CONSTANT = "lamp3d_constant"
"""How the names of tensors begin that the network's code has made."""

_FREE_OF_EXTENTS = {"dim", "ndim", "ndimension", "dtype", "device", "is_cuda", "is_floating_point", "requires_grad",
                    "layout", "is_sparse", "is_quantized", "is_meta", "is_complex"}  # fmt: skip


class ShapedTracer(fx.Tracer):
    """Traces a module that takes tensors.

    Args:
        input_shapes: of each input, by the name of ``forward``'s parameter; the first is passed by its place.
        dtypes: of each input.
        device: on which parameters and inputs lie.

    Attributes:
        reads_shape: whether the network's code has looked at an extent, so that the graph may hold for this shape only.
        constants: tensors that the network's code has made and used, by the names that they have in the graph.
        structure: of the output; the graph gives its leaves.
    """

    def __init__(self, input_shapes: Mapping[str, Sequence[int]], dtypes: Sequence[torch.dtype], device: torch.device):
        super().__init__()
        self.reads_shape = False
        self.constants: dict[str, Tensor] = {}
        self.structure: pytree.TreeSpec | None = None
        self._input_shapes, self._device = dict(input_shapes), device
        self._dtypes = dict(zip(input_shapes, dtypes, strict=True))
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._evaluating = False
        self._modes = _modes()

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of a module; its nodes keep nothing of what they evaluated to.

        Raises:
            ConfigError: the module's code does what a graph of it would not.
        """
        self._modes, numbers, names = _modes(), _random_states(), _names(root)
        with quiet(), torch.set_grad_enabled(torch.is_grad_enabled()), functions_apart(_is_stand_in):
            graph = super().trace(root, concrete_args)
        self._refuse_backward_hooks(root)
        if numbers != _random_states():
            raise ConfigError(
                "its forward draws random numbers that do not depend on a tensor, so that a graph of it would draw "
                "them once for all; use torch.nn.Dropout, or draw with torch.rand_like or x.new_empty(…).bernoulli_()."
            )
        buffers: list[tuple[str, Any]] = list(root.named_buffers())
        if assigned := [name for name, buffer in buffers if _is_stand_in(buffer)]:
            raise ConfigError(
                f"its forward assigns to the buffer {assigned[0]}, which a graph of it would not; change the buffer "
                f"there is, with self.{assigned[0]}.copy_(…)."
            )
        if added := sorted(_names(root) - names):
            raise ConfigError(f"its forward makes {added[0]} at its first call; call it once before you give it away.")
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

        def leaves_of(root: nn.Module) -> list[Any]:
            leaves, self.structure = pytree.tree_flatten(root(*args, **kwargs))  # not `forward`: it may have hooks
            return leaves

        return leaves_of, [self.root]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers within the network, and einops's, which look at the type of what they are given."""
        leaf = m.__module__.startswith("einops.") or super().is_leaf_module(m, module_qualified_name)
        return leaf and m is not self.root

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The stand-in for a node's value."""
        return _ShapedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; a stand-in passes for a tensor everywhere else."""
        if _is_stand_in(a):
            return _node_of(a)
        if isinstance(a, FakeTensor):
            raise ConfigError(
                "its forward uses what a hook of one of its layers has kept, which a graph of it would not; take it "
                "from what the layer returns."
            )
        if type(a) is Tensor and not any(a is buffer for buffer in self.root.buffers()):
            if a.grad_fn is not None:
                raise ConfigError(
                    "its forward computes with parameters that it does not call by name (self.weight), so that a graph "
                    "of it would do so once for all; leave penalties on all parameters() to the loss or the optimizer."
                )
            # fx would make the constant an attribute of the network, which is not ours to change.
            name = next(
                (name for name, known in self.constants.items() if known is a), f"{CONSTANT}{len(self.constants)}"
            )
            self.constants[name] = a
            return self.create_node("get_attr", name, (), {})
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
            raise ConfigError(WRITES_PARTS)
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

    def _refuse_backward_hooks(self, root: nn.Module) -> None:
        """Torch's own layers call theirs when the graph is run; of other modules, it knows the operations only."""
        for name, module in root.named_modules():
            hooked = module._backward_hooks or module._backward_pre_hooks
            if hooked and not self.is_leaf_module(module, name):
                raise ConfigError(
                    f"{name or 'it'} has a backward hook, which a graph of it would not call; hook torch's own layers "
                    "(torch.nn.Conv3d), or parameters."
                )

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(
            lambda leaf: _node_of(leaf).meta[VALUE] if _is_stand_in(leaf) else leaf,
            (args, kwargs),
            is_leaf=_is_stand_in,
        )
        self._evaluating = True
        try:
            with self._fakes, torch.no_grad():
                if kind == "placeholder":
                    return torch.empty(
                        tuple(self._input_shapes[target]), dtype=self._dtypes[target], device=self._device
                    )
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


KEEPS_STATE = (
    "its forward keeps something from one call to the next, which a graph of it would not. Call it once before, if "
    "that is done at the first call alone; else keep it in a buffer, and change that in place (self.count.add_(1))."
)
WRITES_PARTS = (
    "its forward writes into a part of a tensor that it has made, which a graph of it would not; build it with "
    "torch.cat or torch.nn.functional.pad."
)
_OF_GRADIENTS = {"register_hook", "retain_grad", "backward"}


def _is_stand_in(value: Any) -> bool:
    return type(value) is _ShapedProxy


def _node_of(stand_in: _ShapedProxy) -> fx.Node:
    """The node whose value it stands for, in the graph that is being traced."""
    if VALUE not in stand_in.node.meta:
        raise ConfigError(KEEPS_STATE)
    return stand_in.node


def _names(root: nn.Module) -> set[str]:
    """Of all that a network consists of."""
    parts = root.named_modules(), root.named_parameters(), root.named_buffers()
    return {name for named in parts for name, _ in named}


def _random_states() -> tuple[Any, ...]:
    """Of all generators that a forward may draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002


def _modes() -> tuple[bool, ...]:
    """What a forward may switch, and fx does not write down."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _ShapedProxy(fx.Proxy):
    """A stand-in for a tensor (or a container of tensors) whose shape is known."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor if isinstance(self.node.meta.get(VALUE), Tensor) else _ShapedProxy

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):
            raise ConfigError(
                f"its forward assigns to the {name} of a tensor, which a graph of it would not; change a tensor's "
                "content with copy_(…), and whether it is trained outside."
            )
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise ConfigError(WRITES_PARTS)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_GRADIENTS:
            raise ConfigError(
                f"its forward calls {name} on a tensor, and a graph of it knows of no gradients; register hooks on "
                "parameters or torch's own layers, outside."
            )
        value = getattr(_node_of(self).meta[VALUE], name)
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
        value = _node_of(self).meta[VALUE]
        if isinstance(value, Tensor):
            assert isinstance(self.tracer, ShapedTracer)
            self.tracer.reads_shape |= self.node.meta[VARIES]
        return len(value)


def attribute(module: Any, path: str) -> Any:
    """What a dotted path leads to."""
    for name in path.split("."):
        module = getattr(module, name)
    return module
