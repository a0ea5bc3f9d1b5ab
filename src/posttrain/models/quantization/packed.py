"""Weights that are kept in fewer bits and read as what they stand for, by a parametrization of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize


class Packed(nn.Module):
    """Makes a weight of a packed parameter. shape: of the weight. compute_dtype: what it is made in.

    added: what adapters add to it while they are active, as (left, right, scale) of each expert's product.
    """

    added: tuple[tuple[Tensor, Tensor, float], ...] = ()

    def __init__(self, shape: torch.Size, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.compute_dtype = shape, compute_dtype

    def decode(self, packed: Tensor) -> Tensor:
        """The weight, in `compute_dtype`."""
        raise NotImplementedError

    def forward(self, packed: Tensor) -> Tensor:
        """With what adapters add."""
        weight = self.decode(packed)
        for left, right, scale in self.added:
            weight = torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype), alpha=scale)
        return weight


def read_through(module: nn.Module, name: str, packed: Packed) -> None:
    """Make a packed parameter of a module read as what it stands for.

    A linear layer makes it for the product forward, and again for the one backward, so that no weight waits for its turn there.
    Any other module makes it once in a forward pass.
    """
    parametrize.register_parametrization(module, name, packed, unsafe=True)
    if type(module).__bases__[0] is nn.Linear and name == "weight":
        module.forward = _by_products(module)
    else:
        module.forward = _made_once(module.forward)


def packed_of(module: nn.Module, name: str) -> Packed | None:
    """What a parameter of a module is read through."""
    held: Any = getattr(module, "parametrizations", {})
    return held[name][0] if name in held and isinstance(held[name][0], Packed) else None


def stored(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a module as it lies in memory."""
    held: Any = getattr(module, "parametrizations", {})
    return held[name].original if name in held else getattr(module, name)


class _Product(torch.autograd.Function):
    """x W' + b of a frozen W, which is made anew for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed, held: Tensor) -> Tensor:
        ctx.packed, ctx.held = packed, held
        return linear(x, packed.decode(held), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad, (needs_x, needs_bias, *_) = gradients[0], ctx.needs_input_grad
        of_x = grad @ ctx.packed.decode(ctx.held).to(grad.dtype) if needs_x else None
        return of_x, grad.flatten(0, -2).sum(0) if needs_bias else None, None, None


def _by_products(module: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        found: Any = _Product.apply(x, module.bias, packed_of(module, "weight"), stored(module, "weight"))
        return found

    return forward


def _made_once(forward: Any) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        with parametrize.cached():
            return forward(*args, **options)

    return run
