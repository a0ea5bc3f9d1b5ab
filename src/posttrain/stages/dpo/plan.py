"""What a plan must know of DPO alone: the table of reference log-probs."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import LanguageStage
from posttrain.stages.dpo.loss import loss_of
from posttrain.stages.language.plan import Extra, trained_module, unit_tokens

__all__ = ["extra", "trained_module", "unit_tokens"]


def extra(cfg: LanguageStage, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """What the table of reference log-probs takes."""
    loss = loss_of(cfg)  # type: ignore[arg-type]
    if not loss.needs_reference:
        return Extra()
    notes = ["the reference is a table of log-probs, computed by the model itself before training; no second model"]
    if loss.over_step:
        notes.append("before each step its answers go through the model once more, for what the loss must know of all of them")
    columns = (1 if loss.unpaired else 2) + (1 if loss.over_step and loss.over_step.mismatched else 0)
    return Extra({"reference": 4.0 * columns * units}, passes=4 / 3 if loss.over_step else 1.0, notes=notes)
