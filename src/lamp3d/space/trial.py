"""Whether a network can be run on volumes that ranks share, found out without any ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph, infer_specs
from lamp3d.graph.shapes import InputSpec
from lamp3d.space.ranks import Space
from lamp3d.space.slabs import described, shard_input


def refusal(
    graph: CellGraph,
    inputs: Sequence[InputSpec],
    sizes: Sequence[int],
    dims: Sequence[int],
    *,
    least: int = 1,
    precision: str = "fp32",
    channels_last: bool = False,
) -> str | None:
    """Why the first rank would refuse to run a network on its slab; None if it would not.

    Args:
        graph: of the network.
        inputs: whole volumes, and whatever else it takes.
        sizes, dims, least: how volumes are cut, as for :class:`Space`.
        precision: ``"fp32"`` or ``"bf16"``.
        channels_last: layout of the volumes.
    """
    space = Space(sizes, dims, range(torch.Size(sizes).numel()), 0, least=least, channels_last=channels_last)
    try:
        infer_specs(
            graph, inputs, precision, channels_last, torch.device("cpu"), partial(shard_input, space=space), described
        )
    except PlanError as error:
        return str(error)
    return None
