"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), PyTorch's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    import torch

    params = [p for group in groups for p in group["params"]]
    fused = params[0].device.type == "cuda" or all(p.dtype == torch.float32 for p in params)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=fused, **settings.given)


OPTIMIZER = OptimizerKind(_make, lambda shape, _: 2 * math.prod(shape), shards=True, moments="adamw")
