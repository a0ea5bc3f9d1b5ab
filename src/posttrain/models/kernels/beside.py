"""Two ways of computing the same, run beside each other: how far apart their values and gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def compared(
    compute: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], place: torch.device | None = None
) -> float:
    """The largest relative error of the values and gradients of `compute`, of the inputs as they are; `reference` has the same
    numbers in float32. place: where; None: where the inputs are."""
    # copies: a backward may write over what it was given (liger-kernel's does)
    mine = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().to(place or x.device, torch.float32).requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, expected = compute(*mine), reference(*theirs)
        chooses = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), device="cpu").to(out.dtype)
        grads = torch.autograd.grad((out * chooses.to(out.device)).sum(), mine)
        wanted = torch.autograd.grad((expected * chooses.to(expected.device, torch.float32)).sum(), theirs)
    return max(apart(a, b) for a, b in zip((out, *grads), (expected, *wanted), strict=True))


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative, of whole tensors; infinite where something is not finite."""
    found, expected = found.detach().cpu().float(), expected.detach().cpu().float()
    difference = float((found - expected).norm() / expected.norm())
    return difference if difference == difference else float("inf")
