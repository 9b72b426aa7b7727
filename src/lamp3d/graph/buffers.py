"""Running a module without lasting changes to its buffers (BatchNorm's running statistics and counter)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
