"""The engine: runs a plan on ``torch.distributed``, one process a device, with the plain network's numbers.

Every rank holds one stage and walks through its list of actions. A value goes straight from the rank that makes it to
every rank that uses it, over however many stages; its gradient comes straight back. Nothing is pickled between the
ranks on the way of the data: the first rank announces the micro-batches' shapes, and each rank derives from them what
it will receive.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lamp3d.errors import PlanError
from lamp3d.graph import Edge, ValueSpec, infer_specs, lay_out_weights, refuse_tied_parameters, trace
from lamp3d.parallel.announce import Announcer, MicroBatchSpec
from lamp3d.parallel.stage import StageRunner
from lamp3d.parallel.transfer import Receipt, Transfer
from lamp3d.plan import SCHEDULES, Action, Plan

LossFunction = Callable[[Any, Any], Tensor]

AHEAD = 2
"""How many actions ahead of the present one receives are posted."""


class Engine:
    """One rank of a network that runs over several devices.

    Make it in every worker process with the same network (same weights) and the same plan. Afterwards the parameters
    of this rank's stage lie on this rank's device; they remain the network's own ``nn.Parameter`` objects.

    Args:
        network: the whole network, as an ordinary module.
        plan: who does what; ``plan.devices`` must be the number of worker processes.

    Attributes:
        parameters, buffers: those of this rank's stage, by the network's own names.
        reads_input: whether this rank needs the images; others may pass None.
        holds_output: whether this rank needs the targets and gets the output; others may pass None and get None.

    Raises:
        PlanError: the plan was made for another network or another number of devices.
    """

    def __init__(self, network: nn.Module, plan: Plan):
        self.plan = plan
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        if plan.devices != self.world_size:
            raise PlanError(
                f"the plan is for {plan.devices} device(s), but {self.world_size} worker(s) run; start as many workers "
                f"as the plan has devices (devices={plan.devices}), or make a plan for {self.world_size}."
            )
        self.device = _own_device(plan)
        self.graph = trace(network, plan.input_shape)
        _check_cells(self.graph.cells, plan)
        stages = self.graph.cut(plan.starts)
        refuse_tied_parameters(stages)
        stage = stages[self.rank]
        stage.to(self.device)
        # All of the network's: every rank derives from the weights' layout in which layout a value travels.
        lay_out_weights(network, plan.channels_last)
        if plan.micro_batches > 1:
            _refuse_batch_norm(stages)
        self._runner = StageRunner(stage, self.device, plan.precision, plan.recompute == "always")
        self.parameters = stage.parameters_by_name()
        self.buffers = stage.buffers_by_name()
        self._edges = self.graph.stage_edges(plan.starts)
        self._tags = {edge.value: index for index, edge in enumerate(self._edges)}
        pairs = {pair for edge in self._edges for user in edge.users for pair in _both(edge.maker, user)}
        self._transfer = Transfer(self.device, pairs)
        self._announcer = Announcer()
        self._specs: dict[tuple[object, ...], dict[str, ValueSpec]] = {}

    @property
    def reads_input(self) -> bool:
        """Whether this rank needs the images."""
        return self.rank == 0

    @property
    def holds_output(self) -> bool:
        """Whether this rank needs the targets and gets the output."""
        return self.rank == self.world_size - 1

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to others so far."""
        return self._transfer.bytes_sent

    def peak_bytes(self) -> int:
        """Peak memory of this rank so far: allocated on CUDA, resident on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def step(self, images: Tensor | Sequence[Tensor] | None, targets: Any, loss_fn: LossFunction) -> Tensor:
        """Forward and backward of one mini-batch; gradients are added to the parameters' ``grad`` on their ranks.

        Args:
            images: (B, C, D, H, W), cut into the plan's micro-batches (evenly, the first ones one larger where M does
                not divide B); or a sequence of such tensors of any shapes, each of them one micro-batch.
                Needed where ``reads_input``.
            targets: what ``loss_fn`` takes beside the output; a sequence of the same length if ``images`` is one.
                Needed where ``holds_output``.
            loss_fn: ``loss_fn(output, targets)`` -> 0-dim. For one tensor it sees the whole mini-batch, so any
                function of it is exact; for a sequence the loss is the mean over its elements.

        Returns:
            the loss, 0-dim float64 on the CPU, on every rank.
        """
        micro_batches, whole = self._announced(images)
        shapes = [tuple(shape) for shape, _ in micro_batches]
        specs = [self._infer(shape, dtype) for shape, dtype in micro_batches]
        pieces = self._pieces(images, whole, shapes) if self.reads_input else []
        step = _Step(self, specs, pieces)
        loss = torch.zeros((), dtype=torch.float64)
        try:
            for index, action in enumerate(step.actions):
                step.post_receives(index + AHEAD)
                if action.kind == "forward":
                    step.forward(action.micro_batch)
                    continue
                if self.holds_output and not step.gradients_of_output:
                    loss = step.loss(targets, loss_fn, whole)
                step.backward(action.micro_batch)
            self._flush()
        except BaseException:
            self._runner.discard()
            raise
        if self.world_size > 1:
            dist.broadcast(loss, self.world_size - 1)
        return loss

    def forward(self, images: Tensor | Sequence[Tensor] | None) -> Any:
        """The network's output without gradients, on the rank that holds it; None on the others.

        Args:
            images: as for :meth:`step`; for a sequence the output is the list of outputs.
        """
        micro_batches, whole = self._announced(images)
        shapes = [shape for shape, _ in micro_batches]
        pieces = self._pieces(images, whole, shapes) if self.reads_input else [None] * len(shapes)
        outputs = [
            self._infer_one(index, piece, self._infer(*micro_batches[index])) for index, piece in enumerate(pieces)
        ]
        self._flush()
        if not self.holds_output:
            return None
        return _concatenate(outputs) if whole else outputs

    def stream(self, volumes: Iterable[Tensor | None]) -> Iterator[Any]:
        """Outputs without gradients for volumes of any shapes, one after the other in flight through the stages.

        Args:
            volumes: (B, C, D, H, W) tensors where ``reads_input``; as many Nones elsewhere.

        Yields:
            one output for each volume, in order, on the rank that holds the output; None on the others.
        """
        for index, volume in enumerate(volumes):
            micro_batches, _ = self._announced(volume if volume is None else [volume])
            piece = self._place(volume) if volume is not None else None
            result = self._infer_one(index, piece, self._infer(*micro_batches[0]))
            try:
                yield result
            except GeneratorExit:  # the caller has what it wants, as zip does after its last pair
                self._flush()
                raise
        self._flush()

    def _flush(self) -> None:
        """Wait until everything that was sent has arrived; whoever made this engine may drop it then."""
        self._transfer.flush()
        self._announcer.flush()

    def _infer_one(self, index: int, image: Tensor | None, specs: dict[str, ValueSpec]) -> Any:
        step = _Step(self, [specs], [image], first=index)
        step.post_receives(0)
        values = step.infer(0)
        return self.graph.collect(values) if self.holds_output else None

    def _announced(self, images: Tensor | Sequence[Tensor] | None) -> tuple[list[MicroBatchSpec], bool]:
        """The shapes and dtypes of the micro-batches, and whether they are pieces of one tensor; known to all ranks."""
        if not self.reads_input:
            return self._announcer.hear()
        if images is None:
            raise PlanError("rank 0 of the plan reads the network's input; pass it the images.")
        whole = isinstance(images, Tensor)
        shapes: list[MicroBatchSpec]
        if isinstance(images, Tensor):
            sizes = _split(images.shape[0], self.plan.micro_batches)
            shapes = [((size, *images.shape[1:]), images.dtype) for size in sizes]
        else:
            shapes = [(tuple(image.shape), image.dtype) for image in images]
        if self.world_size > 1:
            self._announcer.announce(shapes, whole, self.world_size)
        return shapes, whole

    def _pieces(self, images: Any, whole: bool, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        pieces = images.split([shape[0] for shape in shapes]) if whole else images
        return [self._place(piece) for piece in pieces]

    def _place(self, image: Tensor) -> Tensor:
        image = image.to(self.device, non_blocking=True)
        return image.contiguous(memory_format=torch.channels_last_3d) if self.plan.channels_last else image

    def _infer(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, ValueSpec]:
        """What every value of a micro-batch of this shape looks like (a dry run at a shape's first use).

        Which values have a gradient depends on which parameters are frozen; these may change between steps.
        """
        trainable = tuple(parameter.requires_grad for parameter in self.graph.root.parameters())
        key = (tuple(shape), dtype, trainable)
        if key not in self._specs:
            plan = self.plan
            self._specs[key] = infer_specs(self.graph, shape, dtype, plan.precision, plan.channels_last, self.device)
        return self._specs[key]


class _Step:
    """One mini-batch under way on one rank."""

    def __init__(
        self, engine: Engine, specs: list[dict[str, ValueSpec]], images: Sequence[Tensor | None], first: int = 0
    ):
        self._engine = engine
        self._runner = engine._runner
        self._transfer = engine._transfer
        self._specs = specs
        self._images = list(images)
        self._first = first
        rank = engine.rank
        self.actions: list[Action] = SCHEDULES[engine.plan.schedule](engine.world_size, len(specs))[rank]
        self._incoming = [edge for edge in engine._edges if rank in edge.users]
        self._outgoing = [edge for edge in engine._edges if edge.maker == rank]
        self._posted = 0
        self._receipts: dict[tuple[str, int, int], Receipt] = {}
        self._outputs: dict[int, dict[str, Tensor]] = {}
        self.gradients_of_output: dict[int, dict[str, Tensor]] = {}

    def post_receives(self, until: int) -> None:
        """Post what the actions up to and including number ``until`` will receive."""
        while self._posted <= min(until, len(self.actions) - 1):
            action = self.actions[self._posted]
            specs = self._specs[action.micro_batch]
            if action.kind == "forward":
                for edge in self._incoming:
                    self._post(specs[edge.value], edge, edge.maker, action.micro_batch, backward=False)
            else:
                for edge in self._outgoing:
                    if specs[edge.value].requires_grad:
                        for user in edge.users:
                            self._post(specs[edge.value], edge, user, action.micro_batch, backward=True)
            self._posted += 1

    def _post(self, spec: ValueSpec, edge: Edge, origin: int, micro_batch: int, *, backward: bool) -> None:
        receipt = self._transfer.receive(spec, origin, self._tag(edge, micro_batch, backward))
        self._receipts[edge.value, origin, micro_batch] = receipt

    def _tag(self, edge: Edge, micro_batch: int, backward: bool) -> int:
        count = len(self._engine._edges)
        return (((self._first + micro_batch) % 1024) * count + self._engine._tags[edge.value]) * 2 + backward

    def _values(self, micro_batch: int) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if (image := self._images[micro_batch] if self._images else None) is not None:
            values[self._engine.graph.inputs[0]] = image
            self._images[micro_batch] = None
        for edge in self._incoming:
            values[edge.value] = self._receipts.pop((edge.value, edge.maker, micro_batch)).wait()
        return values

    def _send_outputs(self, micro_batch: int, values: dict[str, Tensor]) -> None:
        for edge in self._outgoing:
            for user in edge.users:
                tag = self._tag(edge, micro_batch, False)
                self._transfer.send(values[edge.value], self._specs[micro_batch][edge.value], user, tag)

    def infer(self, micro_batch: int) -> dict[str, Tensor]:
        """Forward without gradients; returns all values that this rank has."""
        values = self._values(micro_batch)
        values |= self._runner.infer(values)
        self._send_outputs(micro_batch, values)
        return values

    def forward(self, micro_batch: int) -> None:
        """Forward of one micro-batch; what others need is on its way afterwards."""
        values = self._values(micro_batch)
        for edge in self._incoming:
            values[edge.value].requires_grad_(self._specs[micro_batch][edge.value].requires_grad)
        values |= self._runner.forward(micro_batch, values)
        self._send_outputs(micro_batch, values)
        if self._engine.holds_output:
            self._outputs[micro_batch] = {name: values[name].detach() for name in self._engine.graph.outputs}

    def loss(self, targets: Any, loss_fn: LossFunction, whole: bool) -> Tensor:
        """The mini-batch's loss; leaves its gradients with respect to every micro-batch's outputs behind."""
        graph = self._engine.graph
        for micro_batch, outputs in self._outputs.items():
            for name, output in outputs.items():
                output.requires_grad_(self._specs[micro_batch][name].requires_grad)
        order = range(len(self._outputs))
        with torch.enable_grad():
            if whole:
                loss = loss_fn(_concatenate([graph.collect(self._outputs[m]) for m in order]), targets)
                torch.autograd.backward(loss)
                total = loss.detach().double().cpu()
            else:
                total = torch.zeros((), dtype=torch.float64)
                for m, target in zip(order, targets, strict=True):
                    loss = loss_fn(graph.collect(self._outputs[m]), target) / len(order)
                    torch.autograd.backward(loss)
                    total += loss.detach().double().cpu()
        for m in order:
            outputs = self._outputs.pop(m)
            self.gradients_of_output[m] = {n: o.grad for n, o in outputs.items() if o.grad is not None}
        return total

    def backward(self, micro_batch: int) -> None:
        """Backward of one micro-batch; the gradients that others need are on their way afterwards."""
        specs = self._specs[micro_batch]
        gradients = self.gradients_of_output.get(micro_batch, {})
        if self._engine.holds_output:
            self.gradients_of_output[micro_batch] = {}
        for edge in self._outgoing:
            if specs[edge.value].requires_grad:
                for user in edge.users:
                    received = self._receipts.pop((edge.value, user, micro_batch)).wait()
                    # The first one is used in place: it was received for this and belongs to no one else.
                    known = gradients.get(edge.value)
                    gradients[edge.value] = received if known is None else known.add_(received)
        of_inputs = self._runner.backward(micro_batch, gradients)
        for edge in self._incoming:
            spec = specs[edge.value]
            if spec.requires_grad:
                # A network output made by an earlier stage has its gradient from the loss, and perhaps from cells here.
                parts = [g for g in (of_inputs.get(edge.value), gradients.get(edge.value)) if g is not None]
                gradient = parts[0] if len(parts) == 1 else sum(parts[1:], parts[0]) if parts else None
                if gradient is None:
                    gradient = torch.zeros(spec.shape, dtype=spec.dtype, device=self._engine.device)
                self._transfer.send(gradient, spec, edge.maker, self._tag(edge, micro_batch, True))


def _split(batch: int, micro_batches: int) -> list[int]:
    """Sizes of the micro-batches: as even as can be, the larger ones first."""
    count = min(batch, micro_batches)
    return [batch // count + (index < batch % count) for index in range(count)]


def _both(a: int, b: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (a, b), (b, a)


def _concatenate(outputs: Sequence[Any]) -> Any:
    """Micro-batches' outputs (tensors, or tuples, lists, dicts of them) joined along the batch."""
    if len(outputs) == 1:
        return outputs[0]
    return pytree.tree_map(lambda *pieces: torch.cat(pieces), outputs[0], *outputs[1:])


def _own_device(plan: Plan) -> torch.device:
    if plan.device_type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlanError("the plan is for CUDA devices, but this machine has none; make a plan on this machine.")
    return torch.device("cuda", torch.cuda.current_device())


def _check_cells(cells: Sequence[Any], plan: Plan) -> None:
    names = [cell.name for cell in cells]
    planned = [name for stage in plan.stages for name in stage.cells]
    if names != planned:
        pairs = zip([*names, "(none)"], [*planned, "(none)"], strict=False)
        ours, theirs = next(((a, b) for a, b in pairs if a != b), ("?", "?"))
        raise PlanError(
            f"the plan was made for another network: cell {ours!r} here is {theirs!r} there; make a new plan."
        )


def _refuse_batch_norm(stages: Sequence[nn.Module]) -> None:
    for stage in stages:
        for name, module in stage.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
                raise PlanError(
                    f"{name.removeprefix('body.')} is a BatchNorm in training mode: with more than one micro-batch its "
                    "statistics would be those of a micro-batch, not of the mini-batch. Use norm='instance' or 'group',"
                    " micro_batches=1, or network.eval() to freeze the statistics."
                )
