"""What the network is on this rank, for every shape and in either mode: traced and cut at first use, then kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph, SpecsOnDemand, ValueSpec, infer_specs, refuse_tied_parameters, trace
from lamp3d.graph.buffers import refuse_parts
from lamp3d.graph.inputs import batch_of, input_text, with_batch
from lamp3d.graph.settings import settings_of
from lamp3d.graph.shapes import module_dtype
from lamp3d.parallel.announce import MicroBatchSpec
from lamp3d.parallel.mesh import Place
from lamp3d.parallel.stage import StageCells
from lamp3d.plan import Plan
from lamp3d.plan.plan import blocks_of
from lamp3d.space.ranks import Space
from lamp3d.space.slabs import described, placed, shard_input


@dataclass(frozen=True)
class Program:
    """What the network is for inputs of one shape.

    Attributes:
        graph: its cells.
        specs: what every value looks like.
        stages: this rank's, by number.
    """

    graph: CellGraph
    specs: Mapping[str, ValueSpec]
    stages: Mapping[int, StageCells]

    def output(self, values: Mapping[str, Tensor], space: Space | None) -> Any:
        """The network's output, made of values by name; of volumes that ranks share, as those."""
        if space is not None:
            values = {name: placed(values[name], self.specs[name], space) for name in self.graph.outputs}
        return self.graph.collect(values)


class Programs:
    """A network's programs by shape and mode.

    Args:
        network: the whole network.
        plan: by which it is cut.
        place: of this rank.
        device: to which this rank's stages go.

    Attributes:
        graph: the network's, for the input and in the mode for which the plan was made.
        stages: this rank's of that graph, by number.

    Raises:
        PlanError: the plan was made for another network, or cuts where this one must not be cut.
    """

    def __init__(self, network: nn.Module, plan: Plan, place: Place, device: torch.device):
        self._network, self._plan, self._place, self._device = network, plan, place, device
        self.graph = trace(network, with_batch(plan.input_shape, batch_of(plan.input_shape) // plan.data))
        _check_cells(self.graph.cells, plan)
        refuse_tied_parameters(self.graph.cut(plan.starts), plan.ranks)
        self.refuse_parts()
        self.stages = self._stages(self.graph)
        self._reads_shape, self._changes_with_mode = self.graph.reads_shape, self.graph.changes_with_mode
        self._settings = settings_of(network)
        self._graphs: dict[tuple[object, ...], tuple[CellGraph, dict[int, StageCells]]] = {}
        if not self._reads_shape:
            usual = (module_dtype(network),) * len(self.graph.input_names)
            self._graphs[None, usual, self._mode] = self.graph, self.stages
        self._programs: dict[tuple[object, ...], Program] = {}

    def refuse_parts(self, graph: CellGraph | None = None) -> None:
        """Refuse what wants whole mini-batches, where the plan cuts them; again, when the mode may have changed."""
        if self._plan.micro_batches > 1 or self._plan.data > 1:
            refuse_parts(graph or self.graph, self._network)

    def of(self, specs: Sequence[MicroBatchSpec]) -> list[Program]:
        """The network for such micro-batches (worked out at a shape's first use).

        Which values have a gradient depends on which parameters are frozen; these may change between steps, as may what
        the network's code looks at, such as whether it supervises deep.

        Raises:
            PlanError: the network is another one for this shape, in the mode that it is in, or as it is set up.
        """
        if (settings := settings_of(self._network)) != self._settings:
            self._settings = settings
            self._graphs.clear()
            self._programs.clear()
        trainable = tuple(parameter.requires_grad for parameter in self._network.parameters())
        return [self._of(spec, trainable) for spec in specs]

    def _of(self, spec: MicroBatchSpec, trainable: tuple[bool, ...]) -> Program:
        graph, stages = self._graph_for(spec)
        key = (spec, trainable, self._mode)
        if key not in self._programs:
            plan, space = self._plan, self._place.space
            shared = () if space is None else (partial(shard_input, space=space), described)
            specs = SpecsOnDemand(
                partial(infer_specs, graph, spec, plan.precision, plan.channels_last, self._device, *shared)
            )
            if plan.pipe * plan.slabs > 1:
                specs.work_out()  # what is refused is refused now, by all
            self._programs[key] = Program(graph, specs, stages)
        return self._programs[key]

    def _graph_for(self, spec: MicroBatchSpec) -> tuple[CellGraph, dict[int, StageCells]]:
        """The network's graph, traced anew for what it looks at: shapes, types, modes; divided alike, if shared."""
        if (key := self._key(spec)) not in self._graphs:
            plan = self._plan
            by_name = {name: shape for name, (shape, _) in zip(self.graph.input_names, spec, strict=True)}
            graph = trace(self._network, by_name, self._dtypes(spec))
            self.refuse_parts(graph)
            if not plan.is_for_any_cells and not graph.is_divided_like(self.graph):
                now, then = (" in training" if of.training else " in evaluation" for of in (graph, self.graph))
                now, then = (now, then) if now != then else ("", "")
                raise PlanError(
                    f"{plan.network} does something else with an input of {input_text(by_name)}{now} than with "
                    f"{input_text(plan.input_shape)}{then}, for which the plan was made, or is set up otherwise than "
                    "it was then; make a plan for this, or one with the whole network on each device (pipe=1, "
                    "recompute never or always), where any will do."
                )
            self._reads_shape |= graph.reads_shape  # which may come with other settings
            self._changes_with_mode |= graph.changes_with_mode
            key = self._key(spec)
            self._graphs[key] = graph, self._stages(graph)
        return self._graphs[key]

    def _key(self, spec: MicroBatchSpec) -> tuple[object, ...]:
        """What a graph depends on."""
        return (tuple(shape for shape, _ in spec) if self._reads_shape else None, self._dtypes(spec), self._mode)

    def _dtypes(self, spec: MicroBatchSpec) -> tuple[torch.dtype, ...]:
        """Types of the inputs; floating point counts as the weights', of which autocast takes any."""
        usual = module_dtype(self._network)
        return tuple(usual if dtype.is_floating_point else dtype for _, dtype in spec)

    @property
    def _mode(self) -> tuple[bool, ...] | None:
        """Which modules of the network are in training; None where that changes nothing but the modules themselves."""
        return tuple(module.training for module in self._network.modules()) if self._changes_with_mode else None

    def _stages(self, graph: CellGraph) -> dict[int, StageCells]:
        """This rank's stages, on its device, each also in runs that are, or are not, computed again in backward."""
        plan = self._plan
        blocks = blocks_of(plan.recompute, [cell.name for cell in graph.cells])
        flips = {i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]}
        starts = sorted({*plan.starts, *flips})
        parts = list(zip(starts, graph.cut(starts), strict=True))
        stages = {}
        for index, (stage, whole) in enumerate(zip(plan.stages, graph.cut(plan.starts), strict=True)):
            if stage.rank == self._place.pipe_rank:
                inside = [
                    (part.to(self._device), blocks[i] is not None)
                    for i, part in parts
                    if stage.first_cell <= i <= stage.last_cell
                ]
                stages[index] = StageCells(whole.to(self._device), inside)
        return stages


def _check_cells(cells: Sequence[Any], plan: Plan) -> None:
    names = [cell.name for cell in cells]
    if names != plan.cells:
        pairs = zip([*names, "(none)"], [*plan.cells, "(none)"], strict=False)
        ours, theirs = next(((a, b) for a, b in pairs if a != b), ("?", "?"))
        raise PlanError(
            f"the plan was made for another network: cell {ours!r} here is {theirs!r} there; make a new plan."
        )
