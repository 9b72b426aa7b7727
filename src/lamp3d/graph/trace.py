"""From an ordinary module to a :class:`CellGraph`: ``torch.fx`` gives the nodes, a dry run says where cutting is safe.

The dry run uses fake tensors (shapes and strides, no data), so it costs milliseconds and no memory. Two consecutive
nodes stay in one cell when cutting between them would

* make something cross that is not a tensor (a size, a number), or
* part a value from an in-place operation on it: the maker would send one content and keep another, and the user would
  overwrite a leaf of its own autograd graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lamp3d.errors import ConfigError
from lamp3d.graph.cells import Cell, CellGraph
from lamp3d.graph.shapes import dry_run


def trace(network: nn.Module, input_shape: Sequence[int]) -> CellGraph:
    """Trace ``network`` into cells.

    Args:
        network: any module that ``torch.fx`` can trace and that takes one tensor; it is not changed.
        input_shape: (B, C, D, H, W) of an input that the network accepts.

    Raises:
        ConfigError: the network cannot be traced, changes its input in place, or behaves differently in training and
            evaluation other than through its sub-modules.
    """
    root = _symbolic_trace(network)
    placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        names = ", ".join(node.name for node in placeholders)
        raise ConfigError(f"the network takes {len(placeholders)} inputs ({names}); lamp3d can split those with one.")
    nodes = _sink_attributes(root)
    recorder = _Recorder(root)
    recorder.dry_run(network, input_shape)
    cells: list[Cell] = []
    begin = 0
    for end in range(1, len(nodes) + 1):
        if end == len(nodes) or recorder.may_cut(nodes, end):
            cells.append(Cell(len(cells), _cell_name(nodes[begin:end]), tuple(node.name for node in nodes[begin:end])))
            begin = end
    return CellGraph(root, cells)


def _symbolic_trace(network: nn.Module) -> fx.GraphModule:
    modes = [(module, module.training) for module in network.modules()]
    codes = []
    try:
        for mode in (not network.training, network.training):
            network.train(mode)
            root = fx.symbolic_trace(network)
            codes.append(root.code)
    except Exception as error:
        raise ConfigError(
            f"{type(network).__name__} cannot be traced by torch.fx: {error}. Its forward must not branch on the "
            "values or the shape of a tensor."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    for line, other in zip(*(code.splitlines() for code in codes), strict=False):
        if line != other:
            raise ConfigError(
                f"{type(network).__name__} computes something else in training than in evaluation outside its "
                f"sub-modules ({line.strip()!r} against {other.strip()!r}). Use a module such as nn.Dropout3d instead "
                "of the function with training=self.training."
            )
    return root


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
        self.n_inputs = sum(node.op == "placeholder" for node in root.graph.nodes)
        self.keep: list[Any] = []  # every result: a freed storage's address may be used again

    def dry_run(self, network: nn.Module, input_shape: Sequence[int]) -> None:
        try:
            dry_run(self, input_shape)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{type(network).__name__} does not accept an input of shape {tuple(input_shape)}: {error}"
            ) from error

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "output":
            return super().run_node(node)
        seen: list[tuple[Tensor, int]] = []
        for source in node.all_input_nodes:
            seen += [(tensor, tensor._version) for tensor in _tensors(self.env[source])]
        result = super().run_node(node)
        position = self.position[node]
        for tensor, version in seen:
            if tensor._version != version:
                maker = self.first_of_storage[_storage(tensor)]
                if maker < self.n_inputs:
                    raise ConfigError(
                        f"{node.name!r} changes the network's input in place; work on a copy there (x = x.clone())."
                    )
                self.written.append((maker, position))
        for tensor in _tensors(result):
            self.first_of_storage.setdefault(_storage(tensor), position)
        self.is_tensor[node] = isinstance(result, Tensor)
        self.keep.append(result)
        return result

    def may_cut(self, nodes: Sequence[fx.Node], end: int) -> bool:
        """Whether the graph may be cut just before ``nodes[end]``."""
        here = self.position[nodes[end]]
        if any(maker < here <= writer for maker, writer in self.written):
            return False
        live = (
            node
            for node in self.position
            if self.position[node] < here and any(self.position[user] >= here for user in node.users)
        )
        return all(self.is_tensor[node] and node.op != "get_attr" for node in live)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
