"""What must not reach the weights: values that are not finite, losses far above the usual, batches too large for the memory."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from posttrain.batch import Batch
from posttrain.errors import RunError
from posttrain.tensors import first_not_finite, here
from posttrain.training.state import TrainState

B = TypeVar("B", bound=Batch)
SOUND = 1e4  # a weight beyond it was not learnt: those of trained models are far below
LEFT_OUT = "left_out.json"  # in a run's directory: the rows of every batch that was not learnt from, and why
NAMED = 4  # rows of a batch that a message names


@dataclass(frozen=True)
class GuardConfig:
    """When an update may not be taken.

    Args:
        skip_nonfinite: how many updates that are not finite a run may leave out.
        spike_mads: how far a loss may lie above the median of the last spike_steps losses, in their median absolute deviation;
            None: anywhere.
        spike_steps: how many losses that median is of.
    """

    skip_nonfinite: int = 0
    spike_mads: float | None = None
    spike_steps: int = 64


class Spike(Exception):
    """A loss is far above the usual; no step was taken."""

    def __init__(self, entry: dict[str, Any]) -> None:
        super().__init__(f"loss {entry['loss']:.4g} is above {entry['limit']:.4g}")
        self.entry = entry


def check_update(
    limits: GuardConfig, state: TrainState, step: int, loss: float, norm: float, rows: list[int]
) -> dict[str, Any] | None:
    """None for an update that may be taken, else what to write down of one that may be left out. `state` remembers losses.

    Raises Spike, or RunError where too much has been left out already; its `entry` is then still to be written down.
    """
    entry = {"step": step, "loss": loss, "grad_norm": norm, "rows": rows}
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return entry | {"loss": str(loss), "grad_norm": str(norm), "why": "not finite"}  # JSON knows no NaN
    if limits.spike_mads is not None:
        if len(state.losses) >= limits.spike_steps:
            limit = spike_limit(state.losses, limits.spike_mads)
            if loss > limit:
                raise Spike(entry | {"limit": limit, "why": "spike"})
        state.losses = [*state.losses, loss][-limits.spike_steps :]
    return None


def spike_limit(losses: list[float], mads: float) -> float:
    """median + mads * MAD. The MAD is taken as at least a thousandth of the median, because it would be 0 for a flat curve."""
    middle = statistics.median(losses)
    spread = statistics.median(abs(loss - middle) for loss in losses)
    return middle + mads * max(spread, 1e-3 * abs(middle))


def not_finite(entry: dict[str, Any], limits: GuardConfig, why: str = "") -> RunError:
    """The error that ends a run whose loss or gradient is not finite, with the rows of the batch. why: as `diverged` says it, and
    then without them."""
    rows = entry["rows"]
    others = f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    more = f"; {limits.skip_nonfinite} such updates were left out before" if limits.skip_nonfinite else ""
    what = f"step {entry['step']}: loss or gradient is not finite (loss {entry['loss']}, gradient norm {entry['grad_norm']})"
    if why:
        return RunError(f"{what}: {why}")
    return RunError(
        f"{what}; "
        f"no step was taken{more}. Rows of the batch: {'; '.join(rows[:NAMED])}{others} (all of them in {LEFT_OUT}). The last "
        f"checkpoint is kept; train.skip_nonfinite={limits.skip_nonfinite + 1} leaves it out"
    )


def diverged(module: nn.Module, step: int, lr: float) -> str:
    """Why no batch is to blame for a loss of `step` that is not finite, and what to do; '' where the weights are sound."""
    trained = [(name, here(value)) for name, value in module.named_parameters() if value.requires_grad]
    broken = first_not_finite(module.named_parameters())
    if broken and (step == 1 or broken not in dict(trained)):
        return f"{broken} holds values that are not finite, as it was given; take a base without"
    sizes = [(float(value.abs().max()), name) for name, value in trained if value.numel()]
    size, name = max(sizes, default=(0.0, ""))
    if broken or size > SOUND:
        grown = f"{broken} is not finite" if broken else f"{name} has grown to {size:.1e}"
        return f"training has diverged ({grown}), so no batch is to blame; take an optim.lr below {lr:g}, in a new run.dir"
    return ""


def halved(batches: list[B]) -> list[B]:
    """Each batch split in two; a batch that cannot be split stays as it is."""
    return [half for batch in batches for half in batch.split()]
