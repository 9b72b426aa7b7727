"""Running a module without lasting changes to its buffers (BatchNorm's running statistics and counter)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put the content of the module's buffers back on leaving: dry runs, profiling and recomputation leave no trace."""
    saved = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in saved:
                buffer.copy_(content)
