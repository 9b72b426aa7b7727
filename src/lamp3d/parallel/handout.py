"""From what the caller gives to micro-batches: all ranks of a pipeline know their shapes, the first one holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp3d.errors import LampError, PlanError
from lamp3d.graph import CellGraph, laid_out
from lamp3d.graph.inputs import batch_of
from lamp3d.parallel.announce import Announcer, MicroBatchSpec
from lamp3d.parallel.mesh import Place
from lamp3d.parallel.shares import micro_batch_sizes, own_share
from lamp3d.plan import Plan
from lamp3d.space.slabs import own_slab

Inputs = Tensor | Mapping[str, Tensor]
"""The tensor that a network takes, or the tensors by the names of its ``forward``'s parameters."""


@dataclass(frozen=True)
class MicroBatches:
    """What a step, or a pass forward, is about.

    Attributes:
        specs: shape and dtype of every micro-batch's inputs.
        whole: whether they are pieces of one mini-batch; else the caller's own.
        inputs: by the graph's names, on the device, where the rank reads the network's input (of volumes that are
            shared, its slab); otherwise None for each.
    """

    specs: Sequence[MicroBatchSpec]
    whole: bool
    inputs: Sequence[Mapping[str, Tensor] | None]


class Handout:
    """Cuts mini-batches into micro-batches and tells the pipeline's other ranks.

    Args:
        graph: of the network.
        plan: into how many micro-batches, and in which layout.
        place: this worker's.
        device: this worker's.
        announcer: to the pipeline's other ranks.
    """

    def __init__(self, graph: CellGraph, plan: Plan, place: Place, device: torch.device, announcer: Announcer):
        self._values = dict(zip(graph.input_names, graph.inputs, strict=True))
        self._plan, self._place, self._device, self._announcer = plan, place, device, announcer

    def micro_batches(self, given: Inputs | Sequence[Inputs] | None, *, shared: bool = False) -> MicroBatches:
        """The micro-batches of one call, to be asked for by all ranks of the pipeline.

        Args:
            given: the mini-batch, or a sequence of micro-batches; ignored by ranks that do not read the input.
            shared: whether a replica takes its share of them, rather than all.

        Raises:
            PlanError: they do not suit the network or the plan; the other ranks are told.
        """
        if self._place.pipe_rank != 0:
            specs, whole = self._announcer.hear()
            return MicroBatches(specs, whole, [None] * len(specs))
        try:
            if given is None:
                raise PlanError("rank 0 of the plan reads the network's input; pass it the images.")
            whole = isinstance(given, Tensor | Mapping)
            if shared:
                given = own_share(given, self._place.replica, self._plan.data, listed=not whole)
            pieces = self._pieces(given) if isinstance(given, Tensor | Mapping) else [self._by_value(g) for g in given]
            specs = [tuple((tuple(tensor.shape), tensor.dtype) for tensor in piece.values()) for piece in pieces]
            self._announcer.announce(specs, whole)
        except LampError:
            self._announcer.refuse()
            raise
        return MicroBatches(specs, whole, [{n: self._on_device(t) for n, t in piece.items()} for piece in pieces])

    def _by_value(self, given: Inputs) -> dict[str, Tensor]:
        """The tensors by the graph's names, in its order."""
        if isinstance(given, Tensor):
            given = {next(iter(self._values)): given}
        if set(given) != set(self._values):
            raise PlanError(
                f"the plan is for a network with the inputs {', '.join(self._values)}, but it was given "
                f"{', '.join(given)}; pass those, or make a plan for these."
            )
        return {value: given[name] for name, value in self._values.items()}

    def _pieces(self, given: Inputs) -> list[dict[str, Tensor]]:
        by_value = self._by_value(given)
        batch = batch_of({name: tensor.shape for name, tensor in by_value.items()})
        sizes = micro_batch_sizes(batch, self._plan.micro_batches)
        pieces = zip(*(torch.split(tensor, sizes) for tensor in by_value.values()), strict=True)
        return [dict(zip(by_value, piece, strict=True)) for piece in pieces]

    def _on_device(self, tensor: Tensor) -> Tensor:
        if self._place.space is not None:
            tensor = own_slab(tensor, self._place.space)
        tensor = tensor.to(self._device, non_blocking=True)
        return laid_out(tensor, True) if self._plan.channels_last else tensor
