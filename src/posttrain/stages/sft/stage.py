"""The steps of supervised fine-tuning: the assistant's tokens count."""

from __future__ import annotations

from posttrain.models.language.objectives import TOKENS
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.sft.config import Sft


def steps(cfg: Sft) -> LanguageSteps:
    """The steps of a run of this config."""
    return LanguageSteps(TOKENS)
