"""What a volume's cells cost a rank that has a slab of it: its share of the work, and what it exchanges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lamp3d.errors import PlanError
from lamp3d.graph import CellGraph
from lamp3d.graph.inputs import InputShape, Shape, volume_of
from lamp3d.plan.links import Link
from lamp3d.plan.profile import CellProfile, Profile, Timing
from lamp3d.plan.work import CellWork, Work

MOST_GATHERED = 3
"""Levels of a network that are gathered unasked, at most."""


@dataclass(frozen=True)
class Slabs:
    """How a volume is cut.

    Attributes:
        mesh: how many slabs along each axis that is cut: (4,) or (2, 2); empty for a whole volume.
        dims: of a (B, C, D, H, W) tensor, the dimension that each of these axes is.
        least: a level whose slabs have fewer planes is gathered and computed by every rank.
    """

    mesh: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    least: int = 1

    @property
    def count(self) -> int:
        """How many ranks share the volume."""
        return math.prod(self.mesh)

    @cached_property
    def needed_planes(self) -> tuple[tuple[int, int], ...]:
        """Of each dimension that is cut, how many planes a value needs to be cut there."""
        return tuple((dim, size * max(1, self.least)) for size, dim in zip(self.mesh, self.dims, strict=True))


def longest_axes(input_shape: InputShape, mesh: Sequence[int], least: int = 1) -> Slabs:
    """Cut along the longest axes, the most slabs along the longest of them: the fewest bytes of halos.

    Raises:
        PlanError: there are more than two axes to cut, or more slabs than planes.
    """
    if not mesh:
        return Slabs((), (), least)
    volume = volume_of(input_shape)
    if len(mesh) > 2 or len(volume) != 5:
        raise PlanError(f"a (B, C, D, H, W) volume is cut along one axis or two; space={tuple(mesh)} is not that.")
    longest = sorted((2, 3, 4), key=lambda dim: -volume[dim])[: len(mesh)]
    order = sorted(range(len(mesh)), key=lambda axis: -mesh[axis])
    dims = dict(zip(order, longest, strict=True))
    for axis, size in enumerate(mesh):
        if volume[dims[axis]] < size:
            raise PlanError(f"{volume[dims[axis]]} planes cannot be cut into {size} slabs; take fewer.")
    thinnest = min(volume[dims[axis]] // size for axis, size in enumerate(mesh))
    return Slabs(tuple(mesh), tuple(dims[axis] for axis in range(len(mesh))), min(least, thinnest))


def slab_shape(shape: Shape | dict[str, Shape], slabs: Slabs, divisor: int) -> Shape | dict[str, Shape]:
    """A shape that the network takes, near to that of a slab: at least two of the coarsest voxels, for norms."""
    volumes = shape if isinstance(shape, dict) else {"": shape}
    extents = volume_of(volumes)
    sides = list(extents)
    for size, dim in zip(slabs.mesh, slabs.dims, strict=True):
        sides[dim] = min(extents[dim], max(2, math.ceil(extents[dim] / size / divisor)) * divisor)

    def cut(of: Shape) -> Shape:
        return (*of[:2], *sides[2:]) if of[2:] == extents[2:] else of

    near = {name: cut(of) for name, of in volumes.items()}
    return near if isinstance(shape, dict) else near[""]


def shared(
    profile: Profile, near: Work, whole: Work, graph: CellGraph, slabs: Slabs, link: Link, entire: Timing | None = None
) -> Profile:
    """A slab's profile.

    A rank has as many planes as the thickest slab. A border's planes travel behind the slab's own convolution, unless
    the cores do the sending; what they add costs a third of a convolution of so many planes. A norm waits for the
    others' sums in forward and in backward. What a level's slabs are too thin for is computed by every rank.

    Args:
        profile: of a volume near in size.
        near: what its cells do.
        whole: what the whole volume's cells do.
        graph: the cells.
        slabs: how the volume is cut.
        link: between the ranks that share it.
        entire: the whole volume's cells; None: what is gathered takes in proportion, too much for small levels.
    """
    if not slabs.mesh:
        return profile
    cells = [
        _share(cell, small, large, slabs, link)
        for cell, small, large in zip(profile.cells, near.cells, whole.cells, strict=True)
    ]
    if entire is not None:
        cells = [
            cell._replace(forward_seconds=of.forward, backward_seconds=of.backward, weight_seconds=of.weight)
            if is_gathered(work, slabs)
            else cell
            for cell, work, of in zip(cells, whole.cells, entire.cells, strict=True)
        ]
    cells = _with_gathers(cells, whole, graph, slabs, link)
    names = {node: cell.index for cell in graph.cells for node in cell.nodes}
    value_bytes = {}
    for name, size in profile.value_bytes.items():
        index, of_all = names.get(name, 0), whole.values[name]
        part = part_of(near.cells[index], whole.cells[index], slabs)
        value_bytes[name] = of_all.nbytes if _is_thin(of_all.shape, slabs) else round(size * part)
    return replace(profile, cells=tuple(cells), value_bytes=value_bytes)


def gather_levels(whole: Work, slabs: Slabs) -> list[int]:
    """What ``least`` may be: as little as can be, or so that the coarsest level, or two or three, are gathered.

    The finest level is not: what a network reads is never gathered.
    """
    levels = {
        min(cell.extents[dim - 2] // size for size, dim in zip(slabs.mesh, slabs.dims, strict=True))
        for cell in whole.cells
        if cell.extents is not None
    }
    return [1, *(1 + planes for planes in sorted(levels - {0})[:-1][:MOST_GATHERED])]


def _with_gathers(
    cells: Sequence[CellProfile], whole: Work, graph: CellGraph, slabs: Slabs, link: Link
) -> list[CellProfile]:
    """Cells that wait for what the others have made, as their result is gathered, and in backward for its gradient."""
    cells = list(cells)
    for edge in graph.edges:
        maker, value = edge.maker, whole.values[edge.value]
        if maker < 0 or whole.cells[maker].extents is None or is_gathered(whole.cells[maker], slabs):
            continue
        if _is_thin(value.shape, slabs):
            cell, seconds = cells[maker], link.of(value.nbytes)
            cells[maker] = cell._replace(
                forward_seconds=cell.forward_seconds + seconds,
                backward_seconds=cell.backward_seconds + seconds,
                exchanged_bytes=cell.exchanged_bytes + round(2 * value.nbytes * (slabs.count - 1) / slabs.count),
            )
    return cells


def part_of(near: CellWork, whole: CellWork, slabs: Slabs) -> float:
    """A rank's planes over those of the volume whose cells are known."""
    if near.extents is None or whole.extents is None:
        return 1.0
    part = 1.0
    gathered = is_gathered(whole, slabs)
    for size, dim in zip(slabs.mesh, slabs.dims, strict=True):
        planes = whole.extents[dim - 2]
        part *= (planes if gathered else -(-planes // size)) / near.extents[dim - 2]
    return part


def is_gathered(whole: CellWork, slabs: Slabs) -> bool:
    """Whether every rank computes all of it."""
    return whole.extents is not None and _is_thin((1, 1, *whole.extents), slabs)


def _is_thin(shape: Sequence[int], slabs: Slabs) -> bool:
    """Whether every rank has all of such a value: what is no volume, or has too few planes to be cut."""
    return len(shape) != 5 or any(shape[dim] < planes for dim, planes in slabs.needed_planes)


def _share(cell: CellProfile, near: CellWork, whole: CellWork, slabs: Slabs, link: Link) -> CellProfile:
    part = part_of(near, whole, slabs)
    forward, backward = cell.forward_seconds * part, cell.backward_seconds * part
    sent = saved = 0
    if not is_gathered(whole, slabs) and whole.extents is not None:
        inner = [min(size - 1, 2) for size in slabs.mesh]  # borders of the rank with the most of them
        for halo in near.halos:
            sizes = [
                halo.bytes[dim - 2] * borders * part * near.extents[dim - 2] / -(-whole.extents[dim - 2] // size)
                for size, dim, borders in zip(slabs.mesh, slabs.dims, inner, strict=True)
                if near.extents is not None
            ]
            planes = sum(
                borders / 3 / -(-whole.extents[dim - 2] // size)
                for size, dim, borders in zip(slabs.mesh, slabs.dims, inner, strict=True)
            )
            arrives = sum(link.of(size) for size in sizes)
            share = 1 / len(near.halos)  # of the cell's convolutions
            forward += _beyond(arrives, forward * share, link) + forward * share * planes
            if halo.gradient:
                backward += _beyond(arrives, backward * share, link)
            backward += backward * share * planes
            sent += round(sum(sizes)) * (2 if halo.gradient else 1)
            saved += round(sum(sizes))
        turns = math.ceil(math.log2(slabs.count))
        for numbers in near.sums:
            waits = turns * link.of(4 * numbers)
            forward, backward = forward + waits, backward + waits
            sent += 2 * 4 * numbers
    return cell._replace(
        forward_seconds=forward,
        backward_seconds=backward,
        weight_seconds=cell.weight_seconds * part,
        internal_bytes=round(cell.internal_bytes * part) + saved,
        deferred_bytes=round(cell.deferred_bytes * part),
        workspace_bytes=round(cell.workspace_bytes * part),
        exchanged_bytes=sent,
    )


def _beyond(arrives: float, behind: float, link: Link) -> float:
    """What a message takes that travels behind other work; on cores that send themselves, all of it."""
    return arrives if link.by_cores else max(0.0, arrives - behind)
