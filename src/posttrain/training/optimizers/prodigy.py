"""Prodigy (Mishchenko & Defazio 2023, arXiv 2306.06101): Adam that finds its rate from how far the weights have come."""

from __future__ import annotations

import contextlib
import io
import math
from typing import TYPE_CHECKING

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    from prodigyopt import Prodigy  # pyright: ignore

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what its weight decay is
        return Prodigy(groups, lr=settings.lr, **settings.given, **settings.options)


OPTIMIZER = OptimizerKind(
    _make,
    lambda shape, _: 4 * math.prod(shape),
    package="prodigyopt",
    options={
        "d0": float,
        "d_coef": float,
        "growth_rate": float,
        "safeguard_warmup": bool,
        "use_bias_correction": bool,
    },
    keeps=("k", "d", "d_max", "d_numerator", "d_denom", "d_hat"),
    one_rate=True,
    finds_rate=True,
)
