"""What a plan must know of reward models alone: what the run will leave."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import LanguageStage
from posttrain.stages.language.plan import Extra, unit_tokens
from posttrain.stages.rm.stage import head_beside

__all__ = ["extra", "unit_tokens"]


def extra(cfg: LanguageStage, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """Nothing in memory; a note where the result is no class of transformers'."""
    line = head_beside(model)
    return Extra(notes=[line] if line else [])
