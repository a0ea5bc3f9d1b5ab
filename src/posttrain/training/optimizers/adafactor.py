"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), transformers': it keeps means of the rows and columns of squares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch import Size
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    from transformers.optimization import Adafactor

    own = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(groups, lr=settings.lr, **own, **settings.options)  # pyright: ignore[reportArgumentType]


def _numbers(shape: Size, is_matrix: bool) -> int:
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


OPTIMIZER = OptimizerKind(
    _make, _numbers, width=4, takes=(), options={"clip_threshold": float, "decay_rate": float, "beta1": float}
)
