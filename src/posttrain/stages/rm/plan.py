"""What a plan must know of reward models alone: what the run will leave, and the head."""

from __future__ import annotations

from typing import Any

from torch import nn

from posttrain.config.schema import LanguageStage
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.stages.language.plan import Extra, unit_tokens
from posttrain.stages.rm.stage import head_beside

__all__ = ["extra", "unit_tokens"]


def extra(cfg: LanguageStage, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """Nothing in memory; a note where the result is no class of transformers'."""
    line = head_beside(model)
    return Extra(notes=[line] if line else [])


def trained_module(cfg: LanguageStage, lm: PackedLM) -> nn.Module:
    """With the head that scores."""
    return PackedScorer(lm.model, cfg.model.attention, "reference", cfg.train.packing)
