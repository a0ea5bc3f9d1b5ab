"""liger-kernel's RMSNorm and SwiGLU, one Triton kernel where `fused` runs several, where it is installed and the model on CUDA.

Each is tried on the card against `fused`'s, values and gradients, before it is given to a module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.errors import first_line
from posttrain.models.kernels.fused import OWN, RMSNorm, SiluProduct, mlp_forward, norm_forward

LIGER = "liger-kernel"
APART = 2e-2  # relative error that rounding to bfloat16 may cause
WIDTH = 128  # of what is tried


class Choice(NamedTuple):
    """forward: of liger-kernel, or None. why: what keeps it from being used; '' where nothing does, or it is not installed."""

    forward: Callable[..., Tensor] | None
    why: str = ""


def liger(kernel: str, device: torch.device) -> Choice:
    """What is to take the place of the kernel of this name (see candidates.KERNELS) on this device."""
    if kernel not in FORWARDS or device.type != "cuda" or find_spec("liger_kernel") is None:
        return Choice(None)
    why = tried(kernel, device)
    return Choice(None, f"{version(LIGER)} {why}") if why else Choice(FORWARDS[kernel])


@cache
def tried(kernel: str, device: torch.device) -> str:
    """'' where liger-kernel's function gives what ours does, else what is wrong with it."""
    theirs, ours, inputs = {
        "RMSNorm": (_norm, lambda x, weight: RMSNorm.apply(x, weight, 1e-6), ((8, WIDTH), (WIDTH,))),
        "SwiGLU": (_silu_product, SiluProduct.apply, ((8, WIDTH), (8, WIDTH))),
    }[kernel]
    random = torch.Generator().manual_seed(0)
    numbers = [torch.randn(*shape, generator=random).to(device, torch.bfloat16).requires_grad_() for shape in inputs]
    chooses = torch.randn(8, WIDTH, generator=random).to(device, torch.bfloat16)
    found: list[list[Tensor]] = []
    try:
        with torch.enable_grad():
            for compute in (theirs, ours):
                out: Any = compute(*numbers)
                found.append([out.detach(), *torch.autograd.grad((out * chooses).sum(), numbers)])
    except Exception as error:  # of Triton, a compiler, a driver or another version: whatever it is, ours is taken
        return f"does not run here ({first_line(error)})"
    apart = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(*found, strict=True))
    return "" if apart <= APART else f"computes something else here (relative error {apart:.1e})"


def _norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As LlamaRMSNorm: float32 up to the product with w. Not in place: others may read the gradient."""
    return import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    return import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply(gate, up)


def norm_by_liger(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm's forward. A weight of another format gives another format, which liger's does not."""
    if hidden_states.dtype != self.weight.dtype:
        return norm_forward(self, hidden_states)
    return _norm(hidden_states, self.weight, self.variance_epsilon)


def mlp_by_liger(self: Any, x: Tensor) -> Tensor:
    """LlamaMLP's forward. Before a layer with LoRA it is ours, which keeps less for the backward."""
    down = self.down_proj
    if hasattr(down, OWN):
        return mlp_forward(self, x)
    return down(_silu_product(self.gate_proj(x), self.up_proj(x)))


FORWARDS: dict[str, Callable[..., Tensor]] = {"RMSNorm": norm_by_liger, "SwiGLU": mlp_by_liger}
