"""How many bytes of tensors are alive: what a schedule's memory on paper is held against."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """While active, follows the memory of every tensor that is made until it is freed; for measurements, and slow.

    Attributes:
        now: bytes of the tensors that were made and are alive.
        peak: the most that :meth:`note` found.
        highest: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = self.highest = 0
        self._known: set[int] = set()

    def note(self, *_: object) -> None:
        """Compare what is alive at present with the peak so far (``engine.on_action = live.note``)."""
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf)._cdata for leaf in pytree.tree_leaves((args, kwargs)) if _has_storage(leaf)}
        for leaf in pytree.tree_leaves(result):
            if _has_storage(leaf) and _storage(leaf)._cdata not in given:
                self._follow(_storage(leaf))
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.highest = max(self.highest, self.now)
            # torch keeps a storage's Python object for as long as the storage lives, also where only C++ holds it.
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
