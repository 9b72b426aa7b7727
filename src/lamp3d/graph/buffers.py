"""Buffers: BatchNorm's running statistics and counter, which running a module changes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lamp3d.errors import PlanError
from lamp3d.graph.cells import CellGraph


def training_batch_norm(network: nn.Module) -> str | None:
    """The name of a BatchNorm that uses the statistics of what it is given, or of a norm that tracks them.

    It wants whole mini-batches: neither micro-batches nor replicas that have a share of one.
    """
    for name, module in network.named_modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        batch, tracks = isinstance(module, nn.modules.batchnorm._BatchNorm), module.running_mean is not None
        if (batch and not tracks) or (module.training and (batch or tracks)):
            return str(name)
    return None


def wants_whole_batch(graph: CellGraph, network: nn.Module) -> str | None:
    """Why a network has to see a mini-batch as a whole, in its present mode; None: it need not.

    Args:
        graph: of the network.
        network: it.
    """
    if (name := training_batch_norm(network)) is not None:
        return f"{name} is a BatchNorm in training mode, or tracks statistics"
    return graph.whole_batch


def refuse_parts(graph: CellGraph, network: nn.Module) -> None:
    """Whether a network can be given parts of a mini-batch.

    Raises:
        PlanError: it wants the whole, as a BatchNorm that is trained does.
    """
    if (reason := wants_whole_batch(graph, network)) is not None:
        raise PlanError(
            f"{reason}: several micro-batches or replicas would each see a part of the mini-batch. Use norm='instance' "
            "or 'group', micro_batches=1 and data=1 (of whole volumes batch=1), or network.eval() to freeze statistics."
        )


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put the content of the module's buffers back on leaving: dry runs, profiling and recomputation leave no trace."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, content in saved:
            # Through `data`: autograd need not know, since a graph that saved the buffer's old content (BatchNorm in
            # evaluation) finds the same content, and in training BatchNorm's backward does not look at it.
            buffer.data.copy_(content)
