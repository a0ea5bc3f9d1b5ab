"""Lion (Chen et al. 2023, arXiv 2302.06675), of bitsandbytes: the sign of a moving average, one number kept for each weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    from bitsandbytes.optim.lion import Lion

    return Lion(groups, lr=settings.lr, **settings.given)


OPTIMIZER = OptimizerKind(_make, lambda shape, _: math.prod(shape), width=4, takes=("betas",))
