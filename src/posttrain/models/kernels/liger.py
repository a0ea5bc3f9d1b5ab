"""liger-kernel's RMSNorm, one Triton kernel where `fused` runs several, where it is installed and the model on CUDA.

It is tried on the card against `fused`'s, values and gradients, before it is given to a module.
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
from posttrain.models.kernels.fused import RMSNorm, norm_forward
from posttrain.models.kernels.usable import beside

LIGER = "liger-kernel"
NORM = "RMSNorm"  # its name among candidates.KERNELS
WIDTH = 128  # of what is tried


class Choice(NamedTuple):
    """forward: of liger-kernel, or None. why: what keeps it from being used; '' where nothing does, or it is not installed."""

    forward: Callable[..., Tensor] | None
    why: str = ""


def liger(kernel: str, device: torch.device) -> Choice:
    """What is to take the place of the kernel of this name (see candidates.KERNELS) on this device."""
    if kernel not in FORWARDS or device.type != "cuda" or find_spec("liger_kernel") is None:
        return Choice(None)
    why = tried(device)
    return Choice(None, f"{version(LIGER)} {why}") if why else Choice(FORWARDS[kernel])


@cache
def tried(device: torch.device) -> str:
    """'' where liger-kernel's function gives what ours does, else what is wrong with it."""
    try:
        return beside(_norm, lambda x, weight: RMSNorm.apply(x, weight, 1e-6), [(8, WIDTH), (WIDTH,)], device)
    except Exception as error:  # of Triton, a compiler, a driver or another version: whatever it is, ours is taken
        return f"does not run here ({first_line(error)})"


def _norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """As LlamaRMSNorm: float32 up to the product with w. Not in place: others may read the gradient."""
    return import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def norm_by_liger(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm's forward. A weight of another format gives another format, which liger's does not."""
    if hidden_states.dtype != self.weight.dtype:
        return norm_forward(self, hidden_states)
    return _norm(hidden_states, self.weight, self.variance_epsilon)


FORWARDS: dict[str, Callable[..., Tensor]] = {NORM: norm_by_liger}
