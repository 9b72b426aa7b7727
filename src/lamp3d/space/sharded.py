"""A volume that several ranks share, slab by slab, and that networks take for an ordinary tensor.

``ShardedVolume`` is a tensor without memory: it has the whole volume's shape, and the rank's own slab beside it. What
torch's functions do to it is decided here, by ``__torch_function__``: each is either known to give the numbers that it
gives on one device, perhaps after an exchange of planes or of sums, or it is refused by name. Nothing falls through.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from lamp3d.errors import PlanError
from lamp3d.space.collect import collect
from lamp3d.space.layout import AxisCut, Layout, even_bounds
from lamp3d.space.ranks import Space

Rule = Callable[..., Any]

RULES: dict[Callable[..., Any], Rule] = {}
"""By torch's function, what stands in for it where a sharded volume is among its arguments."""

_METADATA = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "names")
_OF_LOCAL = ("requires_grad", "grad_fn", "is_leaf")
_QUESTIONS = ("size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "element_size", "stride",
              "nelement", "is_contiguous", "get_device", "__len__", "__hash__")  # fmt: skip


class ShardedVolume(Tensor):
    """A (B, C, D, H, W) volume, of which this rank holds a slab.

    Attributes:
        local: the slab, an ordinary tensor with its autograd history; the whole volume where nothing is cut.
        placement: how the volume is cut.
        space: the ranks that share it.
        stands_for_view: whether it is a copy of planes that torch would have as a view, not to be changed in place.
    """

    stands_for_view = False
    local: Tensor
    placement: Layout
    space: Space

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, space: Space) -> ShardedVolume:
        """The volume whose slab on this rank is ``local``."""
        part = layout.part(space.coordinate)
        assert tuple(local.shape[2:]) == tuple(end - begin for begin, end in part), (local.shape, layout)
        shape = (*local.shape[:2], *layout.extents)
        volume = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        volume.local, volume.placement, volume.space = local, layout, space
        return volume

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedVolume({tuple(self.shape)}, {self.dtype}, here {tuple(self.local.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "a scripted function")
        if called == "__get__":
            name = getattr(func, "__self__").__name__  # noqa: B009 (mypy knows no descriptors)
            if name in _METADATA:
                return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
            if name in _OF_LOCAL:
                return getattr(args[0].local, name)
            raise _refusal(name, args)
        if called in _QUESTIONS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        rule = RULES.get(func)
        if rule is None:
            raise _refusal(called, args)
        return rule(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise _refusal(str(func), args)

    def relaid(self, layout: Layout) -> ShardedVolume:
        """The same volume, cut in another way."""
        if layout == self.placement:
            return self
        assert layout.extents == self.placement.extents
        volume = self
        here = {cut.axis: cut for cut in self.placement.cuts}
        there = {cut.axis: cut for cut in layout.cuts}
        for axis, cut in here.items():
            if axis in there and there[axis].dim == cut.dim:
                volume = volume._recut(cut, there[axis])
            else:
                volume = volume._gathered(cut)
        for axis, cut in there.items():
            if axis not in here or here[axis].dim != cut.dim:
                volume = volume._split(cut)
        return volume

    def gathered(self) -> ShardedVolume:
        """The same volume, all of it on every rank."""
        return self.relaid(Layout(self.placement.extents, ()))

    def _recut(self, cut: AxisCut, other: AxisCut) -> ShardedVolume:
        local = collect(self.local, self.space, cut, other.slabs)
        return self._with(local, cut, other)

    def _gathered(self, cut: AxisCut) -> ShardedVolume:
        everyone = [(0, cut.extent)] * self.space.sizes[cut.axis]
        return self._with(collect(self.local, self.space, cut, everyone), cut, None)

    def _split(self, cut: AxisCut) -> ShardedVolume:
        begin, end = cut.slabs[self.space.coordinate[cut.axis]]
        return self._with(self.local.narrow(cut.dim, begin, end - begin), None, cut)

    def _with(self, local: Tensor, gone: AxisCut | None, new: AxisCut | None) -> ShardedVolume:
        cuts = [cut for cut in self.placement.cuts if cut != gone] + ([] if new is None else [new])
        return ShardedVolume(
            local, Layout(self.placement.extents, tuple(sorted(cuts, key=lambda c: c.axis))), self.space
        )


def shard(whole: Tensor, space: Space) -> ShardedVolume:
    """A (B, C, D, H, W) volume that all ranks have, cut into slabs as equal as can be.

    Raises:
        PlanError: there are fewer planes than slabs.
    """
    volume = gathered_volume(whole, space)
    return volume.relaid(even_cut(volume.placement.extents, space))


def gathered_volume(whole: Tensor, space: Space) -> ShardedVolume:
    """A volume that all ranks have, as one that is not cut."""
    depth, height, width = whole.shape[2:]
    return ShardedVolume(whole, Layout((depth, height, width), ()), space)


def even_cut(extents: tuple[int, int, int], space: Space) -> Layout:
    """Slabs as equal as can be.

    Raises:
        PlanError: there are fewer planes than slabs.
    """
    if (layout := even_layout(extents, space)) is None:
        sides, slabs = ("×".join(map(str, numbers)) for numbers in (extents, space.sizes))
        raise PlanError(f"a volume of {sides} has too few planes for {slabs} slabs; take fewer (space=…).")
    return layout


def even_layout(extents: tuple[int, int, int], space: Space) -> Layout | None:
    """Slabs as equal as can be; None where some would be empty."""
    cuts = [
        AxisCut(dim, axis, even_bounds(extents[dim - 2], size))
        for axis, (dim, size) in enumerate(zip(space.dims, space.sizes, strict=True))
    ]
    return Layout(extents, tuple(cuts)) if all(cut.thinnest >= 1 for cut in cuts) else None


def local_of(value: Any) -> Any:
    """A sharded volume's slab; anything else as it is."""
    return value.local if isinstance(value, ShardedVolume) else value


def whole(value: Any) -> Any:
    """All of a volume that ranks share, on every rank; anything else as it is. To be called by all of them."""
    return value.gathered().local if isinstance(value, ShardedVolume) else value


def rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Declare what stands in for some of torch's functions."""

    def declare(stand_in: Rule) -> Rule:
        for function in dict.fromkeys(functions):  # some have several names
            assert function not in RULES, function
            RULES[function] = stand_in
        return stand_in

    return declare


def refuse(what: str, why: str) -> PlanError:
    """The error for a call that is known, but not with these arguments."""
    return PlanError(
        f"{what}{_place()} cannot be done exactly on a volume that is cut into slabs: {why}. Take space=1 for this "
        "network, or replace the operation."
    )


def _refusal(name: str, args: Any) -> PlanError:
    shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor)) if isinstance(args, tuple) else ""
    return refuse(f"{name!r} on {shapes}" if shapes else repr(name), "lamp3d does not know the operation")


def _place() -> str:
    """In which module of the network, as far as the Python stack tells."""
    modules: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        node, found = frame.f_locals.get("n"), frame.f_locals.get("self")
        if isinstance(node, fx.Node):  # a traced network runs: the node knows the module whose forward called it
            entries = list(node.meta.get("nn_module_stack", {}).values())
            return _in_module(*entries[-1]) if entries else " in the network's forward"
        if isinstance(found, nn.Module) and (not modules or modules[-1] is not found):
            modules.append(found)
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return ""
    inner, outer = modules[0], modules[-1]
    return _in_module(next((name for name, module in outer.named_modules() if module is inner), ""), type(inner))


def _in_module(path: str, kind: type[nn.Module]) -> str:
    return f" in {path} ({kind.__name__})" if path else f" in {kind.__name__}"
