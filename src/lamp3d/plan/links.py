"""What joins the devices of one machine, and what joins machines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from lamp3d.errors import ConfigError
from lamp3d.plan.amounts import parse_bytes
from lamp3d.plan.descriptions import checked, read_description
from lamp3d.settings import Settings

USUAL_NETWORK = "network100"
"""What joins machines, unless it is said."""

_LINKS = Path(__file__).parent / "links.yaml"


class Link(Settings):
    """How two devices are joined.

    Attributes:
        title: for people.
        gbs: 10⁹ bytes a second in each direction.
        seconds: that a message takes beside.
        source: of these figures.
        by_cores: whether sending and receiving keep the devices from computing.
    """

    title: str
    gbs: PositiveFloat
    seconds: float = Field(ge=0)
    source: str
    by_cores: bool = False

    def of(self, size: float) -> float:
        """Seconds until a message of ``size`` bytes has arrived."""
        return self.seconds + size / (self.gbs * 1e9)


LinkTable = tuple[tuple[Link, ...], ...]
"""The link from each rank of a pipeline to each."""


class Links(Settings):
    """How all devices are joined.

    Workers are numbered machine by machine, and on the mesh replica by replica, slab by slab, rank by rank of a
    pipeline (:class:`lamp3d.parallel.mesh.Place`). So it is pipelines that stay on one machine first of all, then the
    slabs of a volume; replicas, which exchange the least, are what machines are for.

    Attributes:
        within: between two devices of a machine.
        across: between two machines, for all of their devices together; None: there is one machine.
        per_machine: devices of a machine.
    """

    within: Link
    across: Link | None = None
    per_machine: PositiveInt = 1

    @model_validator(mode="after")
    def _is_no_detour(self) -> Links:
        """What passes between machines is no faster than what passes within one."""
        near, far = self.within, self.across
        if far is not None and (far.gbs > near.gbs or far.seconds < near.seconds or far.by_cores < near.by_cores):
            slower = {
                "gbs": min(far.gbs, near.gbs),
                "seconds": max(far.seconds, near.seconds),
                "by_cores": far.by_cores or near.by_cores,
            }
            object.__setattr__(self, "across", far.model_copy(update=slower))
        return self

    def between(self, first: int, second: int, block: int) -> Link:
        """What joins two workers of every block of so many; the slower link where blocks lie differently."""
        if self.across is None:
            return self.within
        machine, begins = self.per_machine, range(0, math.lcm(block, self.per_machine), block)
        alike = all((begin + first) // machine == (begin + second) // machine for begin in begins)
        return self.within if alike else self.across

    def in_pipeline(self, pipe: int) -> LinkTable:
        """What joins the ranks of every pipeline of so many."""
        return tuple(tuple(self.between(a, b, pipe) for b in range(pipe)) for a in range(pipe))

    def among_slabs(self, slabs: int, pipe: int) -> Link:
        """What joins the ranks that share a volume: the slowest link among them."""
        return self.between(0, (slabs - 1) * pipe, slabs * pipe)

    def sum_seconds(self, size: float, ranks: int, pipe: int) -> float:
        """What it takes to sum gradients of ``size`` bytes over replicas and slabs, each rank of a pipeline its own.

        Those of a machine that sum at the same time share the way out of it.
        """
        link, sharing = self.within, 1
        if self.across is not None and (ranks - 1) * pipe >= self.per_machine:
            link, sharing = self.across, min(pipe, self.per_machine)
        ring = 2 * (ranks - 1) / ranks * size * sharing / (link.gbs * 1e9)
        return ring + 2 * math.ceil(math.log2(ranks)) * link.seconds


def load_link(text: str) -> Link:
    """A link by its name in ``links.yaml``, or by what it carries in a second, such as "10GB".

    Raises:
        ConfigError: it is neither.
    """
    links = read_description(_LINKS)
    if text in links:
        return checked(Link, links[text], str(_LINKS))
    if not text[:1].isdigit():
        raise ConfigError(f"no link {text!r}; there are {', '.join(links)}; or say what it carries, such as 10GB.")
    return Link(title=f"{text} a second", gbs=parse_bytes(text) / 1e9, seconds=0.0, source="as given")


def local_link(kind: Literal["cpu", "cuda"]) -> Link:
    """What joins the devices of this machine: gloo over loopback; or PCIe 4, a guess."""
    return load_link("pcie4" if kind == "cuda" else "loopback")
