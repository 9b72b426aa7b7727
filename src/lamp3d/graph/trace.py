"""From an ordinary module to a :class:`CellGraph`: the tracer gives the nodes, a dry run says where cutting is safe.

The dry run uses fake tensors (shapes and strides, no data), so it costs milliseconds and no memory. Two consecutive
nodes stay in one cell when cutting between them would

* make something cross that is not a tensor (a size, a number), or
* part a value from an in-place operation on it: the maker would send one content and keep another, and the user would
  overwrite a leaf of its own autograd graph.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError
from lamp3d.graph.cases import OverCases
from lamp3d.graph.cells import Cell, CellGraph
from lamp3d.graph.inputs import InputShape, Shape, input_text, shapes_by_name, title_of
from lamp3d.graph.shapes import dry_run, module_device, module_dtype
from lamp3d.graph.tracer import CONSTANT, KEEPS_STATE, ShapedTracer, attribute


def trace(network: nn.Module, input_shape: InputShape, dtypes: Sequence[torch.dtype] = ()) -> CellGraph:
    """Trace ``network`` into cells, in the mode (training or evaluation) that it is in.

    Args:
        network: any module that takes tensors and does not branch on values; it is not changed.
        input_shape: (B, C, D, H, W) of an input that the network accepts; or of several, by name.
        dtypes: of each input, which the network's code may look at; by default that of the parameters.

    Raises:
        ConfigError: the network cannot be traced, does not accept such an input, or changes it in place.
    """
    input_shapes = shapes_by_name(input_shape, network)
    dtypes = dtypes or [module_dtype(network)] * len(input_shapes)
    for module in network.modules():
        if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            way = "torch.compile" if hasattr(module, "_orig_mod") else "torch.jit"
            raise ConfigError(
                f"{title_of(network)} has been through {way}, which leaves nothing to be traced; give the network as "
                "it was before."
            )
    if any(map(is_lazy, (*network.parameters(), *network.buffers()))):
        raise ConfigError(
            f"{title_of(network)} has lazy layers, whose weights have no shape yet: call it once on a small input "
            "where it is made."
        )
    root, structure, reads_shape, changes_with_mode = _traced(network, input_shapes, dtypes)
    nodes = _sink_attributes(root)
    recorder = _Recorder(root)
    recorder.dry_run(network, input_shapes, dtypes)
    cells: list[Cell] = []
    named: Counter[str] = Counter()
    begin = 0
    may_cut = recorder.cuts(nodes)
    for end in range(1, len(nodes) + 1):
        if end == len(nodes) or may_cut[end]:
            name = _cell_name(nodes[begin:end])
            named[name] += 1  # memory and recomputation go by names, and a layer may be used at several levels
            name = name if named[name] == 1 else f"{name} ({named[name]})"
            cells.append(Cell(len(cells), name, tuple(node.name for node in nodes[begin:end])))
            begin = end
    return CellGraph(
        root,
        cells,
        structure,
        reads_shape=reads_shape,
        changes_with_mode=changes_with_mode,
        whole_batch=recorder.whole_batch,
    )


@dataclass(frozen=True)
class _Traced:
    """What a call of the network's code has left.

    Attributes:
        graph: its operations; the output holds the leaves of what the network gives.
        structure: of these.
        constants: tensors that its code has made, by name, as they were at its end.
        reads_shape: whether it has looked at the input's shape.
    """

    graph: fx.Graph
    structure: pytree.TreeSpec
    constants: dict[str, Tensor]
    reads_shape: bool

    def is_like(self, other: _Traced) -> bool:
        """Whether both compute the same."""
        return (str(self.graph), self.structure) == (str(other.graph), other.structure) and _same(
            self.constants, other.constants
        )


def _traced(
    network: nn.Module, input_shapes: dict[str, Shape], dtypes: Sequence[torch.dtype]
) -> tuple[fx.GraphModule, pytree.TreeSpec, bool, bool]:
    """The traced network, the structure of its output, whether it has looked at the input's shape, and whether the
    other mode is another graph."""
    twin = _twin(network)

    def traced() -> _Traced:
        tracer = ShapedTracer(input_shapes, dtypes, module_device(network))
        graph = tracer.trace(twin)
        assert tracer.structure is not None
        constants = {name: constant.clone() for name, constant in tracer.constants.items()}
        return _Traced(graph, tracer.structure, constants, tracer.reads_shape)

    def switch_mode() -> None:
        for module in twin.modules():
            module.training = not module.training

    try:
        found = traced()
        switch_mode()
        try:
            other = traced()
        except Exception:  # in the mode that it is in, it may do: a network that is trained on larger volumes
            other = None
        changes_with_mode = other is None or not other.is_like(found)
        if changes_with_mode:  # or from call to call, whatever the mode
            switch_mode()
            if not traced().is_like(found):
                raise ConfigError(KEEPS_STATE)
    except (fx.proxy.TraceError, DataDependentOutputException) as error:
        by_count = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.momentum is None for m in network.modules())
        raise ConfigError(
            f"{title_of(network)} cannot be traced by torch.fx: {error}. Its forward must not branch on the "
            f"values of a tensor{' (BatchNorm with momentum=None does; give it one, such as 0.1)' * by_count}."
        ) from error
    except TypeError as error:  # it takes something else
        raise ConfigError(
            f"{title_of(network)} cannot be called with the inputs {', '.join(input_shapes)}: {error}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{title_of(network)} cannot be traced: {error}") from error
    except Exception as error:
        raise _does_not_accept(network, input_shapes, error) from error
    root = fx.GraphModule(_targets(network, found.graph, found.constants), found.graph)
    root.training = network.training
    reads_shape = found.reads_shape or other is None or other.reads_shape
    return root, found.structure, reads_shape, changes_with_mode


def _same(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether tensors are alike by name; those without content are where shapes are."""
    pairs = zip(ones.values(), others.values(), strict=False)
    return ones.keys() == others.keys() and all(
        (one.shape, one.dtype) == (other.shape, other.dtype) and (one.is_meta or torch.equal(one, other))
        for one, other in pairs
    )


def _twin(network: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers, for its code to leave traces in: some networks keep their outputs.

    Once an engine has moved its stages, the parameters lie on several devices; then they are all on the CPU.

    Raises:
        ConfigError: the network cannot be copied.
    """
    tensors = [*network.parameters(), *network.buffers()]
    try:
        if len({tensor.device for tensor in tensors}) > 1:
            return copy.deepcopy(network).cpu()
        return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{title_of(network)} cannot be copied: {str(error).partition('. ')[0]}. Does it keep a tensor that it has "
            "computed? torch.nn.utils.weight_norm does; torch.nn.utils.parametrizations.weight_norm does not."
        ) from error


def _targets(network: nn.Module, graph: fx.Graph, constants: dict[str, Tensor]) -> dict[str, Any]:
    """What a graph refers to: the network's own modules and parameters, and constants that its code has made."""
    names = [node.target for node in graph.nodes if node.op in ("call_module", "get_attr")]
    return {name: constants[name] if name in constants else attribute(network, name) for name in names}


def _sink_attributes(root: fx.GraphModule) -> list[fx.Node]:
    """Move every ``get_attr`` to just before its first user, so that a parameter lies in the cell that uses it."""
    order = {node: index for index, node in enumerate(root.graph.nodes)}
    for node in list(root.graph.nodes):
        if node.op == "get_attr" and node.users:
            min(node.users, key=lambda user: order[user]).prepend(node)
    root.graph.lint()
    return [node for node in root.graph.nodes if node.op not in ("placeholder", "output")]


def _cell_name(nodes: Sequence[fx.Node]) -> str:
    targets = [
        str(node.target) if node.op in ("call_module", "call_method") else node.name
        for node in nodes
        if node.op != "get_attr"
    ]
    return " + ".join(targets or [nodes[0].name])


class _Recorder(fx.Interpreter):
    """Runs the graph on fake tensors; notes which nodes are tensors, who shares storage, and who writes in place."""

    def __init__(self, root: fx.GraphModule):
        super().__init__(root)
        self.is_tensor: dict[fx.Node, bool] = {}
        self.first_of_storage: dict[int, int] = {}
        self.written: list[tuple[int, int]] = []  # (maker, writer): no cut from after maker to before writer
        self.position = {node: index for index, node in enumerate(root.graph.nodes)}
        self.attributes = {at: str(node.target) for node, at in self.position.items() if node.op == "get_attr"}
        self.n_inputs = sum(node.op == "placeholder" for node in root.graph.nodes)
        self.varies: set[fx.Node] = set()  # with the input
        self.last_use: dict[int, int] = {}  # of a storage
        self.changed: set[int] = set()  # storages of buffers that the forward changes: all that use them stays together
        self.whole_batch: str | None = None
        self.over_cases = OverCases()
        self.keep: list[Any] = []  # every result: a freed storage's address may be used again

    def dry_run(self, network: nn.Module, input_shapes: dict[str, Shape], dtypes: Sequence[torch.dtype]) -> None:
        try:
            dry_run(self, list(zip(input_shapes.values(), dtypes, strict=True)))
        except ConfigError:
            raise
        except Exception as error:
            raise _does_not_accept(network, input_shapes, error) from error

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "output":
            return super().run_node(node)
        seen: list[tuple[Tensor, int]] = []
        for source in node.all_input_nodes:
            seen += [(tensor, tensor._version) for tensor in _tensors(self.env[source])]
        if node.op == "placeholder" or not self.varies.isdisjoint(node.all_input_nodes):
            self.varies.add(node)
        named = self.fetch_attr(str(node.target)).named_buffers() if node.op == "call_module" else ()
        buffers = [(name, buffer, buffer._version) for name, buffer in named]
        self.over_cases.found = node in self.varies and _trains_batch_norm(node)
        with self.over_cases:
            result = super().run_node(node)
        if node.op == "placeholder":
            self.over_cases.add_input(result)
        if self.over_cases.found:
            self.whole_batch = f"{node.name!r} is computed over the mini-batch"
        for name, buffer, version in buffers:
            if buffer._version != version:
                self.whole_batch = f"{node.target}.{name} changes in the forward"
        position = self.position[node]
        self.last_use |= {_storage(tensor): position for tensor, _ in seen}
        for tensor, version in seen:
            if tensor._version != version:
                maker = self.first_of_storage[_storage(tensor)]
                if maker < self.n_inputs:
                    raise ConfigError(
                        f"{node.name!r} changes the network's input in place; work on a copy there (x = x.clone())."
                    )
                if self.attributes.get(maker, "").startswith(CONSTANT):
                    raise ConfigError(
                        f"{node.name!r} changes a tensor in place that the network's forward has made, and which the "
                        "graph of it would change again and again; write x = x + y there."
                    )
                if maker in self.attributes:
                    self.whole_batch = f"{self.attributes[maker]} changes in the forward"
                    self.changed.add(_storage(tensor))
                self.written.append((maker, position))
        for tensor in _tensors(result):
            self.first_of_storage.setdefault(_storage(tensor), position)
        self.is_tensor[node] = isinstance(result, Tensor)
        self.keep.append(result)
        return result

    def cuts(self, nodes: Sequence[fx.Node]) -> list[bool]:
        """For each of the nodes, whether the graph may be cut just before it."""
        last = {node: max((self.position[user] for user in node.users), default=-1) for node in self.position}
        self.written += [(self.first_of_storage[storage], self.last_use[storage]) for storage in self.changed]
        allowed = []
        for node in nodes:
            here = self.position[node]
            apart = all(not maker < here <= writer for maker, writer in self.written)
            crossing = (other for other, end in last.items() if self.position[other] < here <= end)
            allowed.append(apart and all(self.is_tensor[other] and other.op != "get_attr" for other in crossing))
        return allowed


def _trains_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a functional batch norm that uses the statistics of what it is given."""
    if getattr(node.target, "__name__", "") != "batch_norm":
        return False
    (training,) = [*node.args[5:6], *(value for key, value in node.kwargs.items() if key == "training")] or [False]
    return bool(training)


def _does_not_accept(network: nn.Module, input_shapes: dict[str, Shape], error: Exception) -> ConfigError:
    shown = input_text(input_shapes if len(input_shapes) > 1 else next(iter(input_shapes.values())))
    return ConfigError(f"{title_of(network)} does not accept an input of {shown}: {error}")


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
