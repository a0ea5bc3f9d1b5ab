"""What a forward and a backward pass keep, compute and move, counted operation by operation on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Work = tuple[tuple[float, float], ...]  # of each operation: its products' FLOPs, and the bytes that it reads and writes
Kept = TypeVar("Kept")
_ONE_KERNEL: ContextVar[bool] = ContextVar("in one kernel", default=False)
_AUTOCAST: ContextVar[torch.dtype | None] = ContextVar("autocast", default=None)
PRODUCTS = {
    nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm,
    torch.addmm, torch.baddbmm,
}  # fmt: skip


class Cost(NamedTuple):
    """kept: bytes that a forward pass leaves for the backward, each storage once and no parameter's. forward, backward: work."""

    kept: float
    forward: Work
    backward: Work


def flops(work: Work) -> float:
    """Of all operations."""
    return sum(operations for operations, _ in work)


@contextmanager
def in_one_kernel() -> Iterator[None]:
    """Inside, products count and what is moved between them does not: on a GPU it stays within the kernel."""
    token = _ONE_KERNEL.set(True)
    try:
        yield
    finally:
        _ONE_KERNEL.reset(token)


def cost(
    forward: Callable[[], Kept],
    outputs: Callable[[Kept], list[Tensor]],
    weights: Iterable[Tensor] = (),
    operations: dict[Any, Any] | None = None,
) -> tuple[Kept, Cost]:
    """What `forward` gives, and what it and the backward pass from its outputs cost. weights: of which views are not counted
    as kept either. operations: how to count what torch's own counter of FLOPs does not know."""
    storages = _Storages(weights)
    with _Counter(display=False, custom_mapping=operations) as counter:
        with saved_tensors_hooks(storages.keep, lambda tensor: tensor):
            found = forward()
        before = len(counter.work)
        if trained := [output.sum() for output in outputs(found) if output.requires_grad]:
            torch.stack(trained).sum().backward()
    return found, Cost(storages.bytes, tuple(counter.work[:before]), tuple(counter.work[before:]))


def kept_by(forward: Callable[[], Any], weights: Iterable[Tensor] = ()) -> float:
    """Bytes that it leaves for a backward, as `Cost` counts them."""
    storages = _Storages(weights)
    with saved_tensors_hooks(storages.keep, lambda tensor: tensor):
        forward()
    return storages.bytes


class _Storages:
    """Of tensors that are kept, each once and no parameter's. weights: of which views are not counted either."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.own, self.found = {weight.untyped_storage()._cdata for weight in weights}, dict[int, Any]()

    def keep(self, tensor: Tensor) -> Tensor:
        """As a hook of autograd's."""
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self.own:
            self.found[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> float:
        """In all."""
        return float(sum(storage.nbytes() for storage in self.found.values()))


class _Counter(FlopCounterMode):
    """torch's counter of FLOPs, with the bytes of every operation beside."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.work: list[tuple[float, float]] = []

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        products, moved = 0.0, 0.0 if _ONE_KERNEL.get() else _moved(func_packet.__name__, out, args, kwargs)
        if func_packet in self.flop_registry:
            products = float(self.flop_registry[func_packet](*args, **kwargs, out_val=out))  # type: ignore[operator]
        if products or moved:
            self.work.append((products, moved))
        return out


def _moved(name: str, out: Any, args: Any, kwargs: Any) -> float:
    """Bytes that an operation reads and writes; none of a view."""
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    places = {tensor.untyped_storage()._cdata for tensor in read}
    if not name.endswith("_") and all(tensor.untyped_storage()._cdata in places for tensor in written):
        return 0.0
    if name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"):
        return 0.0
    if name in ("index", "gather", "embedding"):  # of what is looked up in, only what is found is read
        read = written
    return float(sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*read, *written)))


def autocast_to(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch's autocast for the meta device, which has none: products of float32 are computed in `dtype`. None: nothing is."""
    return nullcontext() if dtype is None else _Autocast(dtype)


class _Autocast(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> Any:
        self.token = _AUTOCAST.set(self.dtype)
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _AUTOCAST.reset(self.token)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            args = [self._cast(each) for each in args]
            kwargs = {name: self._cast(each) for name, each in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        """As autocast does: a parameter once, all else each time."""
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.dtype)
        return self.copies.setdefault(id(value), (value, value.to(self.dtype)))[1]


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As the kernels of attention are given them."""
    dtype = _AUTOCAST.get()
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)
