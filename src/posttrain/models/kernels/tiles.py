"""A part of a layer that is computed again for its backward, done a tile of tokens at a time.

What an MLP has inside is then never there of all tokens: of Llama 3 8B and 80,000 tokens each tensor as wide as it would be
2.3 GB, and its backward has several. No product is computed more often than in a layer that is recomputed as a whole. The idea is
TiledMLP's (Bekman et al. 2025, arXiv 2506.13996).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

TILE = 8192  # tokens of a tile at least: products of so many rows are as fast as those of more
SIZE = "_tile"  # of a module: from twice so many tokens on it goes in tiles; it has none where its layer is not recomputed

Part = Callable[[Tensor, bool], Tensor]  # x, and whether numbers are asked for or the way of the gradient alone


def go_in_tiles(layer: nn.Module, tokens: int | None) -> None:
    """Have what can of a layer that is recomputed go in tiles of so many tokens; None: of none of it."""
    for module in layer.modules():
        setattr(module, SIZE, tokens)


def number_of(tokens: int, size: int | None) -> int:
    """Of tiles for so many tokens."""
    return max(1, tokens // size) if size else 1


def largest_tile(tokens: int, size: int) -> int:
    """Tokens of the largest one."""
    return math.ceil(tokens / number_of(tokens, size))


def in_tiles(module: nn.Module, part: Part, x: Tensor) -> Tensor:
    """part(x, True) of x [..., H], which gives a tensor of the same shape, each token by itself. module: whose parameters it
    reads."""
    rows = x.reshape(-1, x.shape[-1])
    number = number_of(len(rows), getattr(module, SIZE, None))
    if number == 1 or not torch.is_grad_enabled():
        return part(x, True)
    trained = [p for p in module.parameters() if p.requires_grad]
    way: Any = _Way.apply(rows, part, number, *trained)
    whole: Any = _Whole.apply(way, rows.detach(), part, number)
    return whole.view(x.shape)


class _Way(torch.autograd.Function):
    """The gradient's way through all tiles, and no numbers: it keeps x, and each tile is computed again in the backward. So a
    layer that is being recomputed has all that it needs before the first of its tiles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Part, number: int, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.part, ctx.number, ctx.trained, ctx.around = part, number, trained, Around.of(x.device)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        with ctx.around.again(), _by_itself():
            tiles, gradients = x.tensor_split(ctx.number), grads[0].tensor_split(ctx.number)
            for rows, grad, to in zip(tiles, gradients, _tiles(of_x, ctx.number), strict=True):
                own = rows.detach().requires_grad_(to is not None)
                found = _gradients(ctx.part(own, False), grad, [own, *ctx.trained] if to is not None else ctx.trained)
                if to is not None:
                    of_rows = found.pop(0)
                    to.zero_() if of_rows is None else to.copy_(of_rows)
                sums = [_added(a, b) for a, b in zip(sums, found, strict=True)]
        return of_x, None, None, *sums


class _Whole(torch.autograd.Function):
    """The numbers, tile by tile; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, way: Tensor, x: Tensor, part: Part, number: int) -> Tensor:
        with _by_itself():
            return torch.cat([part(rows, True).detach() for rows in x.tensor_split(number)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


class Around(NamedTuple):
    """What else a computation depends on: the state of random numbers, and autocast."""

    device: torch.device
    random: tuple[Tensor, ...]
    autocast: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(cls, device: torch.device) -> Around:
        """As they are now."""
        kind = device.type
        random = (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if kind == "cuda" else []))
        if not torch.amp.is_autocast_available(kind):
            return cls(device, random, nullcontext)
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(device, random, lambda: torch.autocast(kind, dtype, enabled))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, as they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.autocast():
            torch.set_rng_state(self.random[0])
            for state in self.random[1:]:
                torch.cuda.set_rng_state(state, self.device)
            yield


@contextmanager
def _by_itself() -> Iterator[None]:
    """Inside, a graph of one tile is made, which nobody else's hooks count or send away."""
    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


def _tiles(x: Tensor | None, number: int) -> Sequence[Tensor | None]:
    return [None] * number if x is None else x.tensor_split(number)


def _gradients(made: Tensor, grad: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    if not wanted or not made.requires_grad:
        return [None] * len(wanted)
    return list(torch.autograd.grad(made, wanted, grad.to(made.dtype), allow_unused=True))


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total.add_(part)
