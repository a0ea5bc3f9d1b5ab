"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682): an average of the weights in place of a falling rate.

Gradients are those of y, between the average x and the fast weights z. A checkpoint has y; what is measured and left is x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    from schedulefree import AdamWScheduleFree  # pyright: ignore

    made: Any = AdamWScheduleFree(groups, lr=settings.lr, **settings.given, **settings.options)
    made.train()
    return made


OPTIMIZER = OptimizerKind(
    _make,
    lambda shape, _: 2 * math.prod(shape),
    package="schedulefree",
    options={"r": float, "weight_lr_power": float},
    schedules=("constant",),
    keeps=("k", "weight_sum", "lr_max", "scheduled_lr"),
    averages=True,
)
