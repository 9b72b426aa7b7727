"""One mini-batch under way on one rank: its values, its gradients, and the messages that bring and take them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp3d.graph import Edge, ValueSpec
from lamp3d.parallel.loss import MiniBatchLoss
from lamp3d.parallel.programs import Program
from lamp3d.parallel.replicas import GradientSum
from lamp3d.parallel.stage import StageRunner
from lamp3d.parallel.transfer import Receipt, Transfer
from lamp3d.plan import Action
from lamp3d.plan.routes import AHEAD, Message, Routes, user_ranks
from lamp3d.space.ranks import Space


@dataclass(frozen=True)
class Rank:
    """What a rank works with, whatever the mini-batch: its stages' runners, the edges of the cut, its transfers.

    Attributes:
        index: the rank's number among those of the pipeline.
        ranks: the rank of each stage.
        edges: the values that pass between stages.
        runners: this rank's stages, by number.
        space: the ranks with which it shares its volumes.
    """

    index: int
    ranks: tuple[int, ...]
    edges: tuple[Edge, ...]
    runners: Mapping[int, StageRunner]
    transfer: Transfer
    device: torch.device
    space: Space | None = None

    @property
    def last(self) -> int:
        """The last stage."""
        return len(self.ranks) - 1

    def incoming(self, stage: int) -> list[Edge]:
        """What a stage receives."""
        return [edge for edge in self.edges if stage in edge.users]

    def outgoing(self, stage: int) -> list[Edge]:
        """What a stage makes for others."""
        return [edge for edge in self.edges if edge.maker == stage]

    def user_ranks(self, edge: Edge) -> list[int]:
        """The ranks that use a value, each once."""
        return user_ranks(edge, self.ranks)

    def tag(self, value: str, micro_batch: int, backward: bool) -> int:
        """A number for a message, which both of its ends compute alike."""
        number = next(i for i, edge in enumerate(self.edges) if edge.value == value)
        return ((micro_batch % 1024) * len(self.edges) + number) * 2 + backward

    def users_here(self, edge: Edge) -> int:
        """How many stages of this rank use a value."""
        return sum(self.ranks[user] == self.index for user in edge.users)


class MiniBatch:
    """One mini-batch on one rank.

    Args:
        rank: what the rank works with.
        actions: of every rank, in order.
        programs: the network for inputs of each micro-batch's shape.
        inputs: of each micro-batch, by name, where the rank reads the network's input; otherwise None for each.
        routes: the messages of these actions.
    """

    def __init__(
        self,
        rank: Rank,
        actions: Sequence[Sequence[Action]],
        programs: Sequence[Program],
        inputs: Sequence[Mapping[str, Tensor] | None],
        routes: Routes,
    ):
        self.actions = actions[rank.index]
        self._rank = rank
        self._programs = programs
        self._inputs = list(inputs)
        self._routes = routes
        self._expected = {
            origin: list(reversed(messages)) for (origin, to), messages in routes.between.items() if to == rank.index
        }
        self._receipts: dict[Message, Receipt] = {}
        self._asked: set[Message] = set()
        self._posted = 0
        # What lies here for this rank's stages: the value and how many of them have yet to take it; the sum of the
        # gradients that they have given back, and how many have yet to.
        self._values: dict[tuple[str, int], tuple[Tensor, int]] = {}
        self._gradients: dict[tuple[str, int], tuple[Tensor | None, int]] = {}
        self._outputs: dict[int, dict[str, Tensor]] = {}
        self._of_outputs: dict[int, dict[str, Tensor]] = {}
        self.times: list[tuple[Action, float, float]] = []

    def run(
        self,
        loss: MiniBatchLoss,
        gradients: GradientSum | None = None,
        on_action: Callable[[Action], None] | None = None,
    ) -> Tensor:
        """Do this rank's actions.

        Args:
            loss: of the mini-batch.
            gradients: where there are several replicas, their sum.
            on_action: called after each.

        Returns:
            the loss, 0-dim float64 (zero on ranks that do not hold the output).
        """
        total = torch.zeros((), dtype=torch.float64)
        last = self._rank.last
        finals = {action.stage: index for index, action in enumerate(self.actions)}  # never a forward
        for index, action in enumerate(self.actions):
            self._post(index + AHEAD)
            final = finals[action.stage] == index
            if gradients is not None and final:
                gradients.last_backward(action.stage)
            for message in self._routes.needed[action]:  # so that the time line tells waiting from work
                if message in self._receipts:  # or another stage of this rank has taken it
                    self._receipts[message].wait()
            begin = time.perf_counter()
            if action.kind == "forward":
                self.forward(action)
            elif action.kind == "backward_weight":
                self._rank.runners[action.stage].backward_weight(action.micro_batch)
            else:
                if action.stage == last and action.micro_batch not in self._of_outputs:
                    total += self._loss(loss, action.micro_batch)
                self.backward(action)
            self.times.append((action, begin, time.perf_counter()))
            if gradients is not None and final:
                gradients.complete(action.stage)
            if on_action is not None:
                on_action(action)
        if gradients is not None:
            gradients.finish()
        return total

    def forward(self, action: Action) -> None:
        """Forward of one micro-batch through one stage; what others need is on its way afterwards."""
        rank, m, program = self._rank, action.micro_batch, self._programs[action.micro_batch]
        values: dict[str, Tensor] = {}
        if action.stage == 0:
            inputs = self._inputs[m]
            assert inputs is not None
            values |= inputs
            self._inputs[m] = None
        for edge in rank.incoming(action.stage):
            values[edge.value] = self._take(edge, m).detach().requires_grad_(program.specs[edge.value].requires_grad)
        values |= rank.runners[action.stage].forward(m, program.stages[action.stage], values, program.specs)
        for edge in rank.outgoing(action.stage):
            if here := rank.users_here(edge):
                self._values[edge.value, m] = values[edge.value], here
        self._send(action, lambda message: values[message.value])
        if action.stage == rank.last:
            self._outputs[m] = {name: values[name].detach() for name in program.graph.outputs}

    def backward(self, action: Action) -> None:
        """Backward of one micro-batch through one stage; what others need is on its way afterwards."""
        rank, m, specs = self._rank, action.micro_batch, self._programs[action.micro_batch].specs
        of_outputs = self._of_outputs.pop(m) if action.stage == rank.last else {}
        gradients: dict[str, Tensor | None] = dict(of_outputs)
        for edge in rank.outgoing(action.stage):
            if specs[edge.value].requires_grad:
                parts = [self._gradients.pop((edge.value, m))[0]] if rank.users_here(edge) else []
                # The first one is used in place: it was made or received for this and belongs to no one else.
                parts += [self._receipts.pop(n).wait() for n in self._routes.needed[action] if n.value == edge.value]
                gradients[edge.value] = _sum_in_place([gradients.get(edge.value), *parts])
        of_inputs = rank.runners[action.stage].backward(m, {n: g for n, g in gradients.items() if g is not None})
        for edge in rank.incoming(action.stage):
            if specs[edge.value].requires_grad:
                # A network output made by an earlier stage has its gradient from the loss, and perhaps from cells here.
                self._give(edge, m, of_inputs.get(edge.value))
                if edge.value in of_outputs:
                    known, missing = self._gradients[edge.value, m]
                    self._gradients[edge.value, m] = _sum_in_place([known, of_outputs[edge.value]]), missing
        self._send(action, lambda message: self._returned(message, specs[message.value]))

    def _post(self, until: int) -> None:
        """Post what the actions up to and including number ``until`` will receive."""
        for action in self.actions[self._posted : until + 1]:
            for message in self._routes.needed[action]:
                self._receive(message)
        self._posted = max(self._posted, until + 1)

    def _receive(self, message: Message) -> None:
        """Post the receive of a message, after those that its origin sends before it: NCCL knows no tags."""
        expected = self._expected[message.origin]
        while message not in self._asked:
            coming = expected.pop()
            spec = self._programs[coming.micro_batch].specs[coming.value]
            self._receipts[coming] = self._rank.transfer.receive(spec, coming.origin, self._tag(coming))
            self._asked.add(coming)

    def _send(self, action: Action, tensor: Callable[[Message], Tensor]) -> None:
        for message in self._routes.sent[action]:
            spec = self._programs[message.micro_batch].specs[message.value]
            self._rank.transfer.send(tensor(message), spec, message.to, self._tag(message))

    def _tag(self, message: Message) -> int:
        return self._rank.tag(message.value, message.micro_batch, message.backward)

    def _take(self, edge: Edge, micro_batch: int) -> Tensor:
        """A value for one of this rank's stages, received if it is the first of them and let go with the last."""
        key = edge.value, micro_batch
        if key not in self._values:
            message = Message(edge.value, micro_batch, False, self._rank.ranks[edge.maker], self._rank.index)
            self._values[key] = self._receipts.pop(message).wait(), self._rank.users_here(edge)
        value, users = self._values.pop(key)
        if users > 1:
            self._values[key] = value, users - 1
        return value

    def _give(self, edge: Edge, micro_batch: int, gradient: Tensor | None) -> None:
        """Add one stage's gradient of a value to those of this rank's other stages."""
        known, missing = self._gradients.get((edge.value, micro_batch), (None, self._rank.users_here(edge)))
        self._gradients[edge.value, micro_batch] = _sum_in_place([known, gradient]), missing - 1

    def _returned(self, message: Message, spec: ValueSpec) -> Tensor:
        """The gradient that goes back to a value's maker: zeros where no stage here makes anything of it."""
        gradient, missing = self._gradients.pop((message.value, message.micro_batch))
        assert not missing, message
        if gradient is None:
            return torch.zeros(spec.shape, dtype=spec.dtype, device=self._rank.device)
        return gradient

    def _loss(self, loss: MiniBatchLoss, micro_batch: int) -> Tensor:
        """The loss of one micro-batch, or of all where it may be any function of the mini-batch; its gradients."""
        ready = sorted(self._outputs) if loss.whole else [micro_batch]
        for m in ready:
            for name, output in self._outputs[m].items():
                output.requires_grad_(self._programs[m].specs[name].requires_grad)
        outputs_of = [self._programs[m].output(self._outputs[m], self._rank.space) for m in ready]
        total = loss.backward(ready, outputs_of)
        for m in ready:
            outputs = self._outputs.pop(m)
            self._of_outputs[m] = {name: o.grad for name, o in outputs.items() if o.grad is not None}
        return total


def _sum_in_place(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum, in the first one's memory; None where there is none."""
    present = [part for part in parts if part is not None]
    for other in present[1:]:
        present[0].add_(other)
    return present[0] if present else None
