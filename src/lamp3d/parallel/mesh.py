"""Where a worker stands on the mesh of devices: which replica, which slab of the volume, which rank of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lamp3d.errors import PlanError
from lamp3d.parallel.groups import group_of, mesh_of
from lamp3d.parallel.space.ranks import Space
from lamp3d.plan import Plan


@dataclass(frozen=True)
class Place:
    """A worker's place among the plan's devices: worker (d·S + s)·K + k has replica d, slab s and pipeline rank k.

    Attributes:
        rank: among all workers.
        world_size: how many there are.
        replica: which share of the mini-batch.
        slab: which part of the volumes.
        pipe_rank: the rank in its pipeline, as the plan counts.
        pipelines: the workers of every pipeline, in order.
        mesh: ("data", "space", "pipe"), where there is more than one pipeline.
        gradient_group: the workers that hold the same stages; None where this one is alone.
        space: those that share a volume; None where each has its own.
    """

    rank: int
    world_size: int
    replica: int
    slab: int
    pipe_rank: int
    pipelines: tuple[tuple[int, ...], ...]
    mesh: DeviceMesh | None
    gradient_group: dist.ProcessGroup | None
    space: Space | None

    @classmethod
    def of(cls, plan: Plan) -> Place:
        """This worker's place; to be called by all workers.

        Raises:
            PlanError: there are more or fewer workers than the plan has devices.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if plan.devices != world_size:
            raise PlanError(
                f"the plan is for {plan.devices} device(s), but {world_size} worker(s) run; start as many workers "
                f"as the plan has devices (devices={plan.devices}), or make a plan for {world_size}."
            )
        pipe, slabs = plan.pipe, plan.slabs
        copy, pipe_rank = divmod(rank, pipe)
        replica, slab = divmod(copy, slabs)
        mesh, group, space = None, None, None
        if plan.data * slabs > 1:
            mesh = mesh_of(plan.device_type, plan.data, slabs, pipe)
            group = mesh.get_group("data" if slabs == 1 else "space")
        if plan.data > 1 and slabs > 1:
            groups = [group_of(tuple(range(first, world_size, pipe)), plan.device_type) for first in range(pipe)]
            group = groups[pipe_rank]
        if mesh is not None and slabs > 1:
            first = replica * slabs * pipe + pipe_rank
            workers = range(first, first + slabs * pipe, pipe)
            space = Space(
                plan.space, plan.space_dims, workers, rank, mesh.get_group("space"),
                least=plan.least_planes, channels_last=plan.channels_last,
            )  # fmt: skip
        pipelines = tuple(tuple(range(c * pipe, (c + 1) * pipe)) for c in range(plan.data * slabs))
        return cls(rank, world_size, replica, slab, pipe_rank, pipelines, mesh, group, space)

    @property
    def pipeline(self) -> tuple[int, ...]:
        """The workers of this worker's pipeline."""
        return self.pipelines[self.rank // len(self.pipelines[0])]

    @property
    def pipe_group(self) -> dist.ProcessGroup | None:
        """The group of this worker's pipeline (None: all workers)."""
        return None if self.mesh is None else self.mesh.get_group("pipe")
