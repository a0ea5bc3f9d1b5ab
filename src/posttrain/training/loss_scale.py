"""Loss scaling, for models that compute in float16: small gradients are zero there, and what is beyond 65,504 is infinite.

Losses are multiplied by a power of two; gradients, which are in float32, are divided by it again before they are read. It is
halved where a gradient overflows, and that update is left out; it is doubled after many that have not. The state is the run's
(`TrainState`), so a run that goes on scales as it would have. Not by torch's GradScaler: that one waits for the device once more,
and decides in an optimizer's step what this run decides by the norm that it reads anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from posttrain.errors import RunError, of_all
from posttrain.losses.ewc import Gradients, plain_gradients
from posttrain.training.state import TrainState

FIRST, SMALLEST = 2.0**16, 2.0**-14
GROWS_AFTER = 2000  # updates without an overflow, as in torch
OVERFLOW = "a gradient is beyond float16"
BEYOND = "numbers of the model itself may be beyond float16, which ends at 65,504; say model.dtype=float32, in a new run.dir"


def begin(state: TrainState) -> None:
    """Have the run's losses scaled, unless a checkpoint has said how."""
    state.loss_scale = state.loss_scale or FIRST


def unscale(gradients: Iterable[Tensor | None], state: TrainState) -> None:
    """Divide by what the losses were multiplied by, in place and exactly: it is a power of two."""
    if state.loss_scale:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(1 / state.loss_scale)


def overflowed(state: TrainState, loss: float, norm: float) -> bool:
    """After an update's figures are known: was it the scale that made the gradients infinite? Then it is half as large from here
    on. A loss that is not finite, or a scale as small as it may be, is another fault."""
    if not state.loss_scale:
        return False
    if not math.isfinite(norm):
        if not math.isfinite(loss) or state.loss_scale <= SMALLEST:
            return False
        state.loss_scale, state.scale_held = state.loss_scale / 2, 0
        return True
    state.scale_held += 1
    if state.scale_held == GROWS_AFTER:
        state.loss_scale, state.scale_held = state.loss_scale * 2, 0
    return False


def gradients_by(dtype: str) -> Gradients:
    """How gradients of single scalars are computed, where they go through numbers of this format."""
    return partial(scaled_gradients, state=TrainState()) if dtype == "float16" else plain_gradients


def scaled_gradients(value: Tensor, params: Sequence[Tensor], state: TrainState) -> list[Tensor | None]:
    """float32, of a scalar by itself: with it multiplied as losses are. Where one overflows the scale is halved and it is done
    again, so nothing is left out. state: keeps the scale for the next value. Raises RunError where no scale helps."""
    begin(state)
    while True:
        scale = state.loss_scale or 1.0
        raw = torch.autograd.grad(value * scale, params, retain_graph=True, allow_unused=True)
        found = [None if gradient is None else gradient.float() / scale for gradient in raw]
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in found if gradient is not None))
        if not overflowed(state, float(value.detach()), norm):
            break
    if not math.isfinite(norm):
        raise of_all(RunError(f"{OVERFLOW}, whatever it is multiplied by: {BEYOND}"))
    return found
