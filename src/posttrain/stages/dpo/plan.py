"""What a plan must know of DPO alone: the table of reference log-probs."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import LanguageStage
from posttrain.stages.dpo.stage import loss_of
from posttrain.stages.language.plan import Extra, unit_tokens

__all__ = ["extra", "unit_tokens"]


def extra(cfg: LanguageStage, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """What the table of reference log-probs takes."""
    if not loss_of(cfg).needs_reference:  # type: ignore[arg-type]
        return Extra()
    note = "the reference is a table of log-probs, computed by the model itself before training; no second model"
    return Extra({"reference": 8.0 * units}, notes=[note])
