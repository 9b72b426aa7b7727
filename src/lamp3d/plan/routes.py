"""Which messages a mini-batch takes, between which ranks and in which order: derived by every rank alike.

A value travels once to every other rank that uses it, however many of that rank's stages do; its gradients are summed
there and travel back once, with the last of these stages. A value whose user lies on its maker's rank stays there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from lamp3d.graph import Edge
from lamp3d.plan.schedule import Action

AHEAD = 2
"""How many actions ahead of the present one receives are posted."""


class Message(NamedTuple):
    """One value of one micro-batch, or its gradient, from one rank to another."""

    value: str
    micro_batch: int
    backward: bool
    origin: int
    to: int


class Routes:
    """The messages of one mini-batch.

    Args:
        edges: the values that pass between stages.
        ranks: the rank of each stage.
        actions: of every rank, in order.
        differentiable: by micro-batch, the values that have a gradient.

    Attributes:
        needed: by action, the messages that must have arrived before it.
        sent: by action, the messages that leave after it.
        between: by (origin, to), the messages in the order in which the origin sends them.
    """

    def __init__(
        self,
        edges: Sequence[Edge],
        ranks: Sequence[int],
        actions: Sequence[Sequence[Action]],
        differentiable: Sequence[Collection[str]],
    ):
        self.needed: dict[Action, list[Message]] = {}
        self.sent: dict[Action, list[Message]] = {}
        self.between: dict[tuple[int, int], list[Message]] = defaultdict(list)
        incoming = [[edge for edge in edges if stage in edge.users] for stage in range(len(ranks))]
        outgoing = [[edge for edge in edges if edge.maker == stage] for stage in range(len(ranks))]
        used_by = {edge.value: user_ranks(edge, ranks) for edge in edges}
        for rank, of_rank in enumerate(actions):
            open_users: dict[tuple[str, int], int] = {}
            for action in of_rank:
                m, kind = action.micro_batch, action.kind
                needed, sent = [], []
                if kind == "forward":
                    needed = [
                        Message(edge.value, m, False, ranks[edge.maker], rank)
                        for edge in incoming[action.stage]
                        if ranks[edge.maker] != rank
                    ]
                    sent = [
                        Message(edge.value, m, False, rank, to)
                        for edge in outgoing[action.stage]
                        for to in used_by[edge.value]
                        if to != rank
                    ]
                elif kind != "backward_weight":
                    needed = [
                        Message(edge.value, m, True, origin, rank)
                        for edge in outgoing[action.stage]
                        if edge.value in differentiable[m]
                        for origin in used_by[edge.value]
                        if origin != rank
                    ]
                    for edge in incoming[action.stage]:
                        key = edge.value, m
                        here = sum(ranks[user] == rank for user in edge.users)
                        open_users[key] = open_users.get(key, here) - 1
                        if not open_users[key] and ranks[edge.maker] != rank and edge.value in differentiable[m]:
                            sent.append(Message(edge.value, m, True, rank, ranks[edge.maker]))
                self.needed[action], self.sent[action] = needed, sent
                for message in sent:
                    self.between[rank, message.to].append(message)


def user_ranks(edge: Edge, ranks: Sequence[int]) -> list[int]:
    """The ranks that use a value, each once."""
    return sorted({ranks[user] for user in edge.users})
