"""Where a worker stands on the mesh of devices: which replica, which slab of the volume, which rank of the pipeline."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lamp3d.errors import PlanError
from lamp3d.parallel.groups import group_of
from lamp3d.plan import Plan, counted
from lamp3d.space.ranks import Space


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
        pipe_group: the workers of this one's pipeline; None where that is all of them.
        gradient_group: the workers that hold the same stages; None where this one is alone.
        space: those that share a volume; None where each has its own.
    """

    rank: int
    world_size: int
    replica: int
    slab: int
    pipe_rank: int
    pipelines: tuple[tuple[int, ...], ...]
    pipe_group: dist.ProcessGroup | None
    gradient_group: dist.ProcessGroup | None
    space: Space | None

    @classmethod
    def of(cls, plan: Plan) -> Place:
        """This worker's place; to be called by all workers.

        Raises:
            PlanError: there are more or fewer workers than the plan has devices, or others have another plan.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if plan.devices != world_size:
            raise PlanError(
                f"the plan is for {counted(plan.devices, 'device')}, not for {counted(world_size, 'worker')}: start as "
                f"many workers as the plan has devices, or make a plan for {world_size}."
            )
        _refuse_other_plans(plan)
        pipe, slabs = plan.pipe, plan.slabs
        copy, pipe_rank = divmod(rank, pipe)
        replica, slab = divmod(copy, slabs)
        pipe_group, gradient_group, space = None, None, None
        if plan.data * slabs > 1:
            kind, firsts = plan.device_type, range(0, world_size, pipe)
            pipe_group = group_of([tuple(range(first, first + pipe)) for first in firsts], "pipe", kind)
            alike = [tuple(range(first, world_size, pipe)) for first in range(pipe)]  # hold the same stages
            gradient_group = group_of(alike, "gradients", kind)
        if slabs > 1:
            sharers = [workers[r * slabs : (r + 1) * slabs] for workers in alike for r in range(plan.data)]
            own = next(workers for workers in sharers if rank in workers)
            space = Space(
                plan.space, plan.space_dims, own, rank, group_of(sharers, "space", kind),
                least=plan.least_planes, channels_last=plan.channels_last,
            )  # fmt: skip
        pipelines = tuple(tuple(range(c * pipe, (c + 1) * pipe)) for c in range(plan.data * slabs))
        return cls(rank, world_size, replica, slab, pipe_rank, pipelines, pipe_group, gradient_group, space)

    @property
    def pipeline(self) -> tuple[int, ...]:
        """The workers of this worker's pipeline."""
        return self.pipelines[self.rank // len(self.pipelines[0])]


_SAME_ON_ALL = (
    "devices", "data", "space", "space_dims", "least_planes", "micro_batches", "schedule", "recompute", "precision",
    "channels_last", "starts", "ranks",
)  # fmt: skip


def _refuse_other_plans(plan: Plan) -> None:
    """Workers with different plans would wait for each other for ever.

    Of the seconds that a plan foretells only the order of actions counts that may follow from them.
    """
    if not dist.is_initialized():
        return
    facts = [*(getattr(plan, name) for name in _SAME_ON_ALL), plan.actions(plan.micro_batches)]
    number = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "big")
    ends = torch.tensor([number, -number])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    if ends[0] != -ends[1]:
        raise PlanError(
            "the workers have different plans, as happens where each makes its own, from timings of its own: make one, "
            "and hand it to all, as lamp3d.launch(work, devices, (plan,)) does."
        )
