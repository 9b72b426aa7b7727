"""Whether a network can be run on volumes that ranks share, found out without any ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph, infer_specs
from lamp3d.graph.inputs import InputShape, shapes_by_name
from lamp3d.graph.shapes import module_dtype
from lamp3d.space.ranks import Space
from lamp3d.space.slabs import described, shard_input


def refusal(graph: CellGraph, input_shape: InputShape, sizes: Sequence[int], dims: Sequence[int]) -> str | None:
    """Why the first rank would refuse to run a network on its slab; None if it would not.

    Args:
        graph: of the network.
        input_shape: (B, C, D, H, W) of the whole volume; of several inputs, by name.
        sizes, dims: how volumes are cut, as for :class:`Space`.
    """
    inputs = [(shape, module_dtype(graph.root)) for shape in shapes_by_name(input_shape, graph.root).values()]
    cut = partial(shard_input, space=Space(sizes, dims, range(math.prod(sizes)), 0))
    try:
        infer_specs(graph, inputs, "fp32", False, torch.device("cpu"), cut, described)
    except PlanError as error:
        return str(error)
    return None
