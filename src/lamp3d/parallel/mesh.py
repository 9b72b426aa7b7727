"""Where a worker stands: which replica of the pipeline it belongs to, and which rank of the pipeline it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lamp3d.errors import PlanError
from lamp3d.plan import Plan


@dataclass(frozen=True)
class Place:
    """A worker's place among the plan's devices.

    Attributes:
        rank: among all workers.
        world_size: how many there are.
        replica: which pipeline.
        pipe_rank: the rank in it, as the plan counts.
        pipelines: the workers of every pipeline, in the plan's order.
        mesh: ("data", "pipe"), where there is more than one replica.
    """

    rank: int
    world_size: int
    replica: int
    pipe_rank: int
    pipelines: tuple[tuple[int, ...], ...]
    mesh: DeviceMesh | None

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
        mesh = None
        if plan.data > 1:
            mesh = init_device_mesh(plan.device_type, (plan.data, plan.pipe), mesh_dim_names=("data", "pipe"))
        pipelines = tuple(tuple(range(r * plan.pipe, (r + 1) * plan.pipe)) for r in range(plan.data))
        return cls(rank, world_size, *divmod(rank, plan.pipe), pipelines, mesh)

    @property
    def pipeline(self) -> tuple[int, ...]:
        """The workers of this worker's pipeline."""
        return self.pipelines[self.replica]

    @property
    def pipe_group(self) -> dist.ProcessGroup | None:
        """The group of this worker's pipeline (None: all workers)."""
        return None if self.mesh is None else self.mesh.get_group("pipe")

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The group of the workers that hold the same stages."""
        assert self.mesh is not None
        return self.mesh.get_group("data")
