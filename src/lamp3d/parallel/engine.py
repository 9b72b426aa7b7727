"""The engine: runs a plan on ``torch.distributed``, one process a device, with the plain network's numbers.

Every rank holds one or several stages and walks through its list of actions. A value goes straight from the rank that
makes it to every rank that uses it, over however many stages, or stays where it is; its gradient comes straight back.
Nothing is pickled between the ranks on the way of the data: the first rank announces the micro-batches' shapes, and
each rank derives from them what it will receive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lamp3d.errors import LampError, PlanError
from lamp3d.graph import lay_out_weights
from lamp3d.graph.allocator import (
    forget_peak_resident_bytes,
    limit_freed_memory,
    peak_resident_bytes,
    return_freed_memory,
)
from lamp3d.parallel.announce import Announcer, MicroBatchSpec
from lamp3d.parallel.conveyor import Conveyor
from lamp3d.parallel.handout import Handout, Inputs
from lamp3d.parallel.loss import LossFunction, MiniBatchLoss, concatenate
from lamp3d.parallel.mesh import Place
from lamp3d.parallel.programs import Program, Programs
from lamp3d.parallel.replicas import GradientSum
from lamp3d.parallel.shares import own_share
from lamp3d.parallel.stage import StageRunner
from lamp3d.parallel.step import MiniBatch, Rank
from lamp3d.parallel.transfer import Transfer
from lamp3d.plan import Action, Plan, TimeLine
from lamp3d.plan.routes import Routes
from lamp3d.space.slabs import own_targets


class Engine:
    """One rank of a network that runs over several devices.

    Make it in every worker process with the same network (same weights) and the same plan. Afterwards the parameters
    of this rank's stage lie on this rank's device; they remain the network's own ``nn.Parameter`` objects.

    Args:
        network: the whole network, as an ordinary module.
        plan: who does what; ``plan.devices`` must be the number of worker processes. Workers 0 … K-1 are the first
            pipeline, K … 2K-1 the next one, which has the next slab of the volume, or the next replica's share.

    Attributes:
        rank, world_size: of this worker among all.
        replica: the pipeline to which it belongs.
        parameters, buffers: those of this rank's stages, by the network's own names.
        reads_input: whether this rank needs the images; others may pass None.
        holds_output: whether this rank needs the targets and gets the output; others may pass None and get None.
        space: the ranks with which this one shares its volumes; None where it has them whole.
        on_action: called after every action of a step, for measurements.

    Raises:
        PlanError: the plan was made for another network or another number of devices.
    """

    def __init__(self, network: nn.Module, plan: Plan):
        self.plan = plan
        self._place = Place.of(plan)
        return_freed_memory()
        limit_freed_memory(plan.memory_limit_bytes if plan.device_type == "cpu" else None)
        self.rank, self.world_size, self.replica = self._place.rank, self._place.world_size, self._place.replica
        if plan.ranks[0] != 0:
            raise PlanError(f"a plan's first stage must lie on device 0, where the images are, not on {plan.ranks[0]}.")
        self.space = self._place.space
        self.device = _own_device(plan)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            forget_peak_resident_bytes()
        self._network = network
        self._programs = Programs(network, plan, self._place, self.device)
        self.graph, own = self._programs.graph, self._programs.stages
        self.on_action: Callable[[Action], None] | None = None
        # All of the network's: every rank derives from the weights' layout in which layout a value travels.
        lay_out_weights(network, plan.channels_last)
        edges = self.graph.stage_edges(plan.starts)
        between = {(plan.ranks[edge.maker], plan.ranks[user]) for edge in edges for user in edge.users}
        pairs = {pair for a, b in between if a != b for pair in ((a, b), (b, a))}
        runners = {index: StageRunner(self.device, plan.precision, plan.splits_backward, self.space) for index in own}
        transfer = Transfer(self.device, self._place, pairs)
        self._rank = Rank(self._place.pipe_rank, plan.ranks, edges, runners, transfer, self.device, self.space)
        named = {parameter: name for name, parameter in network.named_parameters()}  # tied ones under their first name
        self.parameters = {named[p]: p for cells in own.values() for p in cells.whole.parameters()}
        buffers = dict(network.named_buffers(remove_duplicate=False))  # beside them, cells have tensors that code makes
        self.buffers = {
            n: b for cells in own.values() for n, b in cells.whole.buffers_by_name().items() if n in buffers
        }
        self._stage_parameters = {i: list(cells.whole.parameters_by_name().values()) for i, cells in own.items()}
        self._announcer = Announcer(self._place.pipeline)
        self._handout = Handout(self.graph, plan, self._place, self.device, self._announcer)
        self._schedules: dict[tuple[object, ...], tuple[list[list[Action]], Routes]] = {}
        self._times: list[tuple[Action, float, float]] = []

    @property
    def reads_input(self) -> bool:
        """Whether this rank needs the images."""
        return self._place.pipe_rank == 0

    @property
    def holds_output(self) -> bool:
        """Whether this rank needs the targets and gets the output."""
        return self._place.pipe_rank == self.plan.ranks[-1]

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank is the first of those that hold the same parameters."""
        return self.replica == 0 and self._place.slab == 0

    @property
    def is_first_slab(self) -> bool:
        """Whether this rank is the first of those that share its volumes."""
        return self._place.slab == 0

    @property
    def random_stream(self) -> int:
        """Which ranks draw the same random numbers: those that share volumes and hold the same stages."""
        return self.replica * self.plan.pipe + self._place.pipe_rank

    @property
    def bytes_sent(self) -> int:
        """Bytes of values and their gradients that this rank has sent to others so far; not those of parameters."""
        return self._rank.transfer.bytes_sent + (0 if self.space is None else self.space.bytes_sent)

    def peak_bytes(self) -> int:
        """Peak memory of this rank since its engine was made: allocated on CUDA, resident on a CPU with Linux."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()

    def step(self, inputs: Inputs | Sequence[Inputs] | None, targets: Any, loss_fn: LossFunction) -> Tensor:
        """Forward and backward of one mini-batch; gradients are added to the parameters' ``grad`` on their ranks.

        Every replica is given the whole mini-batch, and takes its share.

        Args:
            inputs: (B, C, D, H, W), or such tensors by the names of ``forward``'s parameters, cut into the plan's
                micro-batches (evenly, the first ones one larger where M does not divide B); or a sequence of such
                inputs of any shapes, each of them one micro-batch. Needed where ``reads_input``.
            targets: what ``loss_fn`` takes beside the output; a sequence of the same length if ``inputs`` is one.
                Needed where ``holds_output``.
            loss_fn: ``loss_fn(output, targets)`` -> 0-dim. For one mini-batch it sees the whole mini-batch, so any
                function of it is exact, unless it is declared to be a mean over cases (``lamp3d.mean_over_cases``): it
                is then called a micro-batch at a time. For a sequence the loss is the mean over its elements.

        Returns:
            the loss, 0-dim float64 on the CPU, on every rank.

        Raises:
            PlanError: the plan's schedule, or its replicas, need a loss that is a mean over cases; or the mini-batch
                cannot be shared evenly; or the network's parameters have been replaced.
        """
        self._programs.refuse_parts()  # again: the network's mode may have changed
        self._refuse_other_parameters()
        micro_batches = self._handout.micro_batches(inputs, shared=True)
        with self._refusals():
            programs = self._programs.of(micro_batches.specs)
            if self._place.gradient_group is not None:
                self._refuse_unsummed_parameters(programs)
            actions, routes = self._schedule(programs)
            loss = MiniBatchLoss(
                loss_fn,
                self._own_targets(targets, micro_batches.specs, listed=not micro_batches.whole),
                [shape[0] for (shape, _), *_ in micro_batches.specs],
                listed=not micro_batches.whole,
                at_end=_loss_at_end(actions, self._rank),
                replicas=self.plan.data,
                sharers=self.plan.slabs,
            )
        step = MiniBatch(self._rank, actions, programs, micro_batches.inputs, routes)
        gradients = None
        if (group := self._place.gradient_group) is not None:
            gradients = GradientSum(group, self._stage_parameters)
        try:
            total = step.run(loss, gradients, self.on_action)
            self._flush()
        except BaseException:
            for runner in self._rank.runners.values():
                runner.discard()
            if gradients is not None:
                gradients.discard()
            raise
        self._times = step.times
        if self.world_size > 1:
            dist.all_reduce(total)  # zero where there is no output
        return total

    def time_line(self) -> TimeLine:
        """When every action of the last step began and ended, on this pipeline's ranks; to be called by all of them.

        Seconds since the first action began, by the machine's clock. On CUDA an action is over when its work has been
        queued, so the picture is that of the host.
        """
        times: list[Any] = [None] * self.plan.pipe
        if self.plan.pipe > 1:
            dist.all_gather_object(times, self._times, group=self._place.pipe_group)
        else:
            times = [self._times]
        zero = min((begin for rank in times for _, begin, _ in rank), default=0.0)
        return TimeLine(tuple(tuple((action, b - zero, e - zero) for action, b, e in rank) for rank in times))

    def forward(self, inputs: Inputs | Sequence[Inputs] | None) -> Any:
        """The network's output without gradients, on the rank that holds it; None on the others.

        Replicas all compute the same.

        Args:
            inputs: as for :meth:`step`; for a sequence the output is the list of outputs.
        """
        micro_batches = self._handout.micro_batches(inputs)
        conveyor = Conveyor(self._rank)
        with self._refusals():
            programs = self._programs.of(micro_batches.specs)
        for program, piece in zip(programs, micro_batches.inputs, strict=True):
            conveyor.put(program, piece)
        outputs = []
        while conveyor.unfinished:
            done, output = conveyor.advance()
            outputs += [output] * done
        self._flush()
        if not self.holds_output:
            return None
        return concatenate(outputs) if micro_batches.whole else outputs

    def stream(self, volumes: Iterable[Inputs | None]) -> Iterator[Any]:
        """Outputs without gradients for volumes of any shapes, one after the other in flight through the stages.

        Until it ends (or is closed) no other engine may be used on these workers: messages are told apart by order.

        Args:
            volumes: (B, C, D, H, W) tensors, or tensors by name, where ``reads_input``; as many Nones elsewhere. As
                many are read ahead as there are stages.

        Yields:
            one output for each volume, in order, on the rank that holds the output; None on the others.
        """
        conveyor = Conveyor(self._rank)
        coming = iter(volumes)
        # The others hear of a micro-batch at the tick after the one at which it begins: see Conveyor.put.
        behind = not self.reads_input
        more = True
        while more or conveyor.unfinished:
            if behind:
                behind = False
            elif more:
                more = self._put_next(conveyor, coming)
            done, output = conveyor.advance()
            if done:
                try:
                    yield output
                except GeneratorExit:  # the caller has what it wants, as zip does after its last pair
                    if more and not self.reads_input:  # one volume is under way that this rank has not heard of
                        self._put_next(conveyor, coming)
                    while conveyor.unfinished:
                        conveyor.advance()
                    self._flush()
                    raise
        self._flush()

    def _put_next(self, conveyor: Conveyor, coming: Iterator[Inputs | None]) -> bool:
        """Put the next volume on its way, if there is one."""
        for volume in coming:
            micro_batches = self._handout.micro_batches(None if volume is None else [volume])
            with self._refusals():
                (program,) = self._programs.of(micro_batches.specs)
            conveyor.put(program, micro_batches.inputs[0])
            return True
        return False

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """What is refused is refused by every rank, but not before all have heard what it is about."""
        try:
            yield
        except LampError:
            self._announcer.flush()
            raise

    def _own_targets(self, targets: Any, specs: Sequence[MicroBatchSpec], listed: bool) -> Any:
        """This replica's share of the targets; of volumes that are shared, as those."""
        batch = self.plan.data * sum(shape[0] for (shape, _), *_ in specs)
        targets = own_share(targets, self.replica, self.plan.data, listed=listed, batch=batch)
        if self.space is None or targets is None:
            return targets
        extents = {shape[2:] for spec in specs for shape, _ in spec if len(shape) == 5}
        for extent in extents:
            targets = own_targets(targets, extent, self.space)
        return targets

    def _refuse_other_parameters(self) -> None:
        """Others than those of which this engine knows would get gradients that nobody sums or moves."""
        now = dict(self._network.named_parameters(remove_duplicate=False))
        if name := next((name for name, known in self.parameters.items() if now.get(name) is not known), None):
            raise PlanError(
                f"the parameter {name} is another one than when the engine was made; make a new engine after what "
                "replaces parameters, such as load_state_dict(…, assign=True), or load without assign."
            )

    def _refuse_unsummed_parameters(self, programs: Sequence[Program]) -> None:
        """What a graph uses that the first one did not, such as heads of training alone, is in no sum of gradients."""
        used = (cells.whole.parameters_by_name() for program in programs for cells in program.stages.values())
        known = set(self.parameters.values())
        unknown = (name for named in used for name, p in named.items() if p.requires_grad and p not in known)
        if name := next(unknown, None):
            raise PlanError(
                f"{self.plan.network} uses {name}, which it did not when the engine was made; with data or space, make "
                "the engine (and its plan) in the mode, and with the settings, in which the network will be trained."
            )

    def _flush(self) -> None:
        """Wait until everything that was sent has arrived; whoever made this engine may drop it then."""
        self._rank.transfer.flush()
        self._announcer.flush()

    def _schedule(self, programs: Sequence[Program]) -> tuple[list[list[Action]], Routes]:
        """Every rank's actions for so many micro-batches, and their messages."""
        differentiable = [
            frozenset(edge.value for edge in self._rank.edges if program.specs[edge.value].requires_grad)
            for program in programs
        ]
        key = tuple(differentiable)
        if key not in self._schedules:
            actions = self.plan.actions(len(programs))
            self._schedules[key] = actions, Routes(self._rank.edges, self.plan.ranks, actions, differentiable)
        return self._schedules[key]


def _loss_at_end(actions: Sequence[Sequence[Action]], rank: Rank) -> bool:
    """Whether all of the last stage's forwards precede its first backward."""
    kinds = [action.kind for action in actions[rank.ranks[-1]] if action.stage == rank.last]
    return "forward" not in kinds[kinds.count("forward") :]


def _own_device(plan: Plan) -> torch.device:
    if plan.device_type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlanError("the plan is for CUDA devices, but this machine has none; make a plan on this machine.")
    return torch.device("cuda", torch.cuda.current_device())
