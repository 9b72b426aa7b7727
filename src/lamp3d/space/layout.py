"""Where a volume's planes lie: pure arithmetic on extents, no tensors and no processes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

Range = tuple[int, int]
"""Planes begin … end - 1, by their index in the whole volume."""


@dataclass(frozen=True)
class AxisCut:
    """One axis of a volume, cut into slabs.

    Attributes:
        dim: of the (B, C, D, H, W) tensor: 2, 3 or 4.
        axis: of the mesh of ranks over which the slabs are spread.
        bounds: slab i holds the planes bounds[i] … bounds[i + 1] - 1.
    """

    dim: int
    axis: int
    bounds: tuple[int, ...]

    @property
    def slabs(self) -> list[Range]:
        """The planes of every slab."""
        return list(itertools.pairwise(self.bounds))

    @property
    def extent(self) -> int:
        """Planes of the whole volume."""
        return self.bounds[-1]

    @property
    def thinnest(self) -> int:
        """Planes of the thinnest slab."""
        return min(end - begin for begin, end in self.slabs)

    def with_bounds(self, bounds: tuple[int, ...]) -> AxisCut:
        """The same axis, cut elsewhere."""
        return replace(self, bounds=bounds)


@dataclass(frozen=True)
class Layout:
    """A volume's extents and its cuts; without any, every rank has the whole volume.

    Attributes:
        extents: (D, H, W) of the whole volume.
        cuts: at most one an axis of the volume, and one an axis of the mesh.
    """

    extents: tuple[int, int, int]
    cuts: tuple[AxisCut, ...]

    def part(self, coordinate: tuple[int, ...]) -> tuple[Range, Range, Range]:
        """The planes along every axis that the rank at this place of the mesh holds."""
        ranges: list[Range] = [(0, extent) for extent in self.extents]
        for cut in self.cuts:
            ranges[cut.dim - 2] = cut.slabs[coordinate[cut.axis]]
        depth, height, width = ranges
        return depth, height, width


def even_bounds(extent: int, parts: int) -> tuple[int, ...]:
    """Slabs as equal as can be."""
    return tuple(extent * i // parts for i in range(parts + 1))


def pieces(owned: list[Range], wanted: list[Range]) -> list[list[Range | None]]:
    """For every part that is wanted, what of it lies in each of the parts that are owned."""

    def common(a: Range, b: Range) -> Range | None:
        begin, end = max(a[0], b[0]), min(a[1], b[1])
        return (begin, end) if begin < end else None

    return [[common(want, own) for own in owned] for want in wanted]


@dataclass(frozen=True)
class Window:
    """An operation that makes each plane from a few neighbouring ones: convolution, pooling.

    Output plane o reads the planes o·stride - padding + t·dilation for t = 0 … kernel - 1.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    ceil: bool = False

    @property
    def reach(self) -> int:
        """From the first plane that is read to the last."""
        return (self.kernel - 1) * self.dilation

    @property
    def is_pointwise(self) -> bool:
        """Whether each plane is made from the one at its place alone."""
        return self.kernel == 1 and self.stride == 1 and self.padding == 0

    def extent(self, extent: int) -> int:
        """How many planes it makes of so many."""
        room = extent + 2 * self.padding - self.reach - 1
        made = (-(-room // self.stride) if self.ceil else room // self.stride) + 1
        if self.ceil and (made - 1) * self.stride >= extent + self.padding:
            made -= 1  # a window must begin inside
        return made

    def bounds(self, bounds: tuple[int, ...]) -> tuple[int, ...]:
        """How what is made is cut: each plane lies with the middle of what it is made of."""
        made = self.extent(bounds[-1])
        inner = [-(-(2 * bound - self.reach + 2 * self.padding) // (2 * self.stride)) for bound in bounds[1:-1]]
        return (0, *(min(max(bound, 0), made) for bound in inner), made)

    def reads(self, made: Range, extent: int) -> tuple[Range, int, int]:
        """What planes are needed to make some, and how many before the first and after the last are padding."""
        first = made[0] * self.stride - self.padding
        end = (made[1] - 1) * self.stride - self.padding + self.reach + 1
        inside = max(first, 0), min(end, extent)
        return inside, inside[0] - first, end - inside[1]


@dataclass(frozen=True)
class Spread:
    """The opposite: each plane is spread over a few of a larger volume, as a transposed convolution does.

    Plane i adds to the output planes i·stride - padding + t·dilation.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    output_padding: int = 0

    def extent(self, extent: int) -> int:
        """How many planes it makes of so many."""
        full = (extent - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return full - 2 * self.padding + self.output_padding

    def bounds(self, bounds: tuple[int, ...]) -> tuple[int, ...]:
        """How what is made is cut."""
        made = self.extent(bounds[-1])
        return (0, *(min(bound * self.stride, made) for bound in bounds[1:-1]), made)

    def reads(self, made: Range, extent: int) -> tuple[Range, int]:
        """What planes are needed to make some, and which one the first of these begins at."""
        first = -(-(made[0] + self.padding - (self.kernel - 1) * self.dilation) // self.stride)
        last = (made[1] - 1 + self.padding) // self.stride
        begin = min(max(first, 0), extent - 1)
        end = max(min(last + 1, extent), begin + 1)
        return (begin, end), begin * self.stride - self.padding
