"""The network as a sequence of cells joined by value edges, and its cut into stages.

A *cell* is the smallest piece of work that may be moved to another device: usually one module call (a convolution, a
norm, an activation, a concatenation). An *edge* carries a value from the cell that makes it to the cells that use it;
an edge that crosses a cut is the paper's :math:`e_{i,1}` (§2.2, eq. 3), whichever stages lie in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lamp3d.errors import PlanError


@dataclass(frozen=True)
class Cell:
    """A run of graph nodes that is never cut: its index in execution order, a readable name, its nodes' names."""

    index: int
    name: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """A value and the stages (or cells) that it joins.

    ``maker`` is -1 for the network's input; ``users`` are sorted and never contain the maker.
    """

    value: str
    maker: int
    users: tuple[int, ...]


class Stage(nn.Module):
    """A contiguous run of cells as a module that shares the network's parameters under their own names.

    ``forward(*inputs)`` takes the values named in ``inputs`` and returns those named in ``outputs``, in that order.
    """

    def __init__(self, root: fx.GraphModule, cells: Sequence[Cell], inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.cells = tuple(cells)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        nodes = {node.name: node for node in root.graph.nodes}
        for name in inputs:
            copies[nodes[name]] = graph.placeholder(name)
        for cell in cells:
            for name in cell.nodes:
                copies[nodes[name]] = graph.node_copy(nodes[name], lambda node: copies[node])
        graph.output(tuple(copies[nodes[name]] for name in outputs))
        # GraphModule copies references, not tensors: the parameters stay the network's own.
        self.body = fx.GraphModule(root, graph)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the cells on the values named in ``inputs``."""
        result: tuple[Tensor, ...] = self.body(*inputs)
        return result

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The parameters under the network's own names (a tied parameter once, under its first name)."""
        return dict(self.body.named_parameters())

    def buffers_by_name(self) -> dict[str, Tensor]:
        """The buffers under the network's own names."""
        return dict(self.body.named_buffers())


class CellGraph:
    """Cells in execution order and the values that pass between them.

    Args:
        root: the traced network; its sub-modules and parameters are the network's own.
        cells: a partition of the graph's nodes (placeholders and the output excepted) in execution order.
        structure: of the network's output, whose leaves the graph gives.
        reads_shape: whether the graph may hold for the shape alone that it was traced with.
        changes_with_mode: whether training and evaluation are different graphs (and not just modules in other modes).
        whole_batch: why the network has to see a mini-batch as a whole, in the mode that it was in; None: it need not.
    """

    def __init__(
        self,
        root: fx.GraphModule,
        cells: Sequence[Cell],
        structure: pytree.TreeSpec,
        *,
        reads_shape: bool = False,
        changes_with_mode: bool = False,
        whole_batch: str | None = None,
    ):
        self.root = root
        self.training = root.training
        self.reads_shape = reads_shape
        self.changes_with_mode = changes_with_mode
        self.whole_batch = whole_batch
        self.cells = tuple(cells)
        self._maker = {name: cell.index for cell in cells for name in cell.nodes}
        placeholders = [node for node in root.graph.nodes if node.op == "placeholder"]
        output = next(node for node in root.graph.nodes if node.op == "output")
        self.inputs: tuple[str, ...] = tuple(node.name for node in placeholders)
        self.input_names: tuple[str, ...] = tuple(node.target for node in placeholders)
        self._leaves: Any = output.args[0]
        self._structure = structure
        self.outputs: tuple[str, ...] = tuple(dict.fromkeys(node.name for node in output.all_input_nodes))
        self.edges: tuple[Edge, ...] = self._cell_edges()

    def _cell_edges(self) -> tuple[Edge, ...]:
        edges = []
        for node in self.root.graph.nodes:
            if node.op == "output":
                continue
            maker = self._maker.get(node.name, -1)
            users = {self._maker[user.name] for user in node.users if user.op != "output"} - {maker}
            if users:
                edges.append(Edge(node.name, maker, tuple(sorted(users))))
        return tuple(edges)

    def is_divided_like(self, other: CellGraph) -> bool:
        """Whether a plan for the other holds for this one: the same cells, and the same values between them."""
        return (self.cells, self.edges, self.outputs) == (other.cells, other.edges, other.outputs)

    def collect(self, values: Mapping[str, Tensor]) -> Any:
        """The network's output (a tensor, or the tuple, list or dict that it returns) from its values by name."""
        leaves = [values[leaf.name] if isinstance(leaf, fx.Node) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)

    def stage_edges(self, starts: Sequence[int]) -> tuple[Edge, ...]:
        """The edges that cross a cut: ``maker`` and ``users`` are stages.

        The network's input is made by stage 0 and its outputs are used by the last stage, where the loss is.

        Args:
            starts: the first cell of every stage; ``starts[0] == 0``, strictly increasing.
        """
        stage_of_cell = self._stage_of_cell(starts)
        last = len(starts) - 1
        users = {
            edge.value: {stage_of_cell[cell] for cell in edge.users}
            for edge in self.edges
            # Most values are used where they are made, and planning asks for the others of hundreds of cuts.
            if stage_of_cell[edge.users[-1]] != stage_of_cell[max(edge.maker, 0)]
        }
        for name in self.outputs:
            users.setdefault(name, set()).add(last)
        crossing = []
        for name, stages in users.items():
            maker = stage_of_cell[self._maker[name]] if name in self._maker else 0
            if elsewhere := tuple(sorted(stages - {maker})):
                crossing.append(Edge(name, maker, elsewhere))
        return tuple(crossing)

    def cut(self, starts: Sequence[int]) -> list[Stage]:
        """The stages that begin at the cells ``starts``, as modules that share the network's parameters."""
        stage_of_cell = self._stage_of_cell(starts)
        last = len(starts) - 1
        crossing = self.stage_edges(starts)
        stages = []
        for index in range(len(starts)):
            cells = [cell for cell in self.cells if stage_of_cell[cell.index] == index]
            own = {name for cell in cells for name in cell.nodes}
            used = {name for edge in self.edges if any(stage_of_cell[cell] == index for cell in edge.users)
                    for name in [edge.value]}  # fmt: skip
            inputs = [name for name in (*self.inputs, *self._maker) if name in used and name not in own]
            sent = {edge.value for edge in crossing if edge.maker == index}
            final = set(self.outputs) if index == last else set()
            outputs = [name for name in self._maker if name in own and name in sent | final]
            stages.append(Stage(self.root, cells, inputs, outputs))
        return stages

    def _stage_of_cell(self, starts: Sequence[int]) -> list[int]:
        bounds = [*starts, len(self.cells)]
        assert bounds[0] == 0, f"the first stage must begin at cell 0, not {bounds[0]}"
        assert all(a < b for a, b in itertools.pairwise(bounds)), f"stages must not be empty: {bounds}"
        return [stage for stage in range(len(starts)) for _ in range(bounds[stage], bounds[stage + 1])]


def refuse_tied_parameters(stages: Sequence[Stage], ranks: Sequence[int]) -> None:
    """Check that no parameter is used on more than one rank.

    Args:
        stages: of the whole network.
        ranks: the rank of each.

    Raises:
        PlanError: naming the parameter and the stages.
    """
    owner: dict[int, tuple[int, str]] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.parameters_by_name().items():
            first, known = owner.setdefault(id(parameter), (index, name))
            if ranks[first] != ranks[index]:
                tied = "" if known == name else f" (also {known!r})"
                raise PlanError(
                    f"parameter {name!r}{tied} is used in stage {first} and in stage {index}; a parameter "
                    "must lie on one device. Cut elsewhere, or give the two uses parameters of their own."
                )
