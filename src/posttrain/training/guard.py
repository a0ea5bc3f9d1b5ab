"""What must not reach the weights: values that are not finite, losses far above the usual, batches too large for the memory."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from posttrain.batch import Batch
from posttrain.errors import RunError
from posttrain.training.state import TrainState

B = TypeVar("B", bound=Batch)
LEFT_OUT = "left_out.json"  # in a run's directory: the rows of every batch that was not learnt from, and why
NAMED = 4  # rows of a batch that a message names
# by whom: the CPU's allocator, CUDA's runtime and driver, cuBLAS, cuDNN, NCCL, bitsandbytes and Triton through them
OUT_OF_MEMORY = (
    "can't allocate memory", "out of memory", "error_out_of_memory", "error_memory_allocation", "status_alloc_failed",
    "failed to allocate", "unable to allocate",
)  # fmt: skip


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


def not_finite(entry: dict[str, Any], limits: GuardConfig) -> RunError:
    """The error that ends a run whose loss or gradient is not finite, with the rows of the batch."""
    rows = entry["rows"]
    others = f"; and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    more = f"; {limits.skip_nonfinite} such updates were left out before" if limits.skip_nonfinite else ""
    return RunError(
        f"step {entry['step']}: loss or gradient is not finite (loss {entry['loss']}, gradient norm {entry['grad_norm']}); "
        f"no step was taken{more}. Rows of the batch: {'; '.join(rows[:NAMED])}{others} (all of them in {LEFT_OUT}). The last "
        f"checkpoint is kept; train.skip_nonfinite={limits.skip_nonfinite + 1} leaves it out"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an error class for its own allocator; all others are known by their words."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(each in words for each in OUT_OF_MEMORY)
    )


def halved(batches: list[B]) -> list[B]:
    """Each batch split in two; a batch that cannot be split stays as it is."""
    return [half for batch in batches for half in batch.split()]
