"""While the gradients of a step are computed no weight changes: what is made of weights alone is made once, not in every call.

Nothing else says so: bitsandbytes' optimizers write weights without telling torch, so a tensor's version does not count them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_made: dict[Any, tuple[Sequence[Tensor], Any]] | None = None


@contextmanager
def weights_at_rest() -> Generator[None]:
    """Inside, no weight changes, and what `made_once` makes is kept."""
    global _made
    before, _made = _made, {}
    try:
        yield
    finally:
        _made = before


def made_once(make: Callable[..., T], weights: Sequence[Tensor], *settings: Any) -> T:
    """make(weights, *settings), or what it has given for these very tensors since weights came to rest."""
    if _made is None:
        return make(weights, *settings)
    key = (make, *map(id, weights), *settings, torch.is_inference_mode_enabled())  # whose tensors no backward may keep
    if key not in _made:
        _made[key] = (weights, make(weights, *settings))  # as long as a tensor is there, no other one has its id
    return _made[key][1]
