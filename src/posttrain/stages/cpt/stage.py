"""The steps of continued pre-training: every token counts."""

from __future__ import annotations

from posttrain.models.language.objectives import TOKENS
from posttrain.stages.cpt.config import Cpt
from posttrain.stages.language.stage import LanguageSteps


def steps(cfg: Cpt) -> LanguageSteps:
    """The steps of a run of this config."""
    return LanguageSteps(TOKENS)
