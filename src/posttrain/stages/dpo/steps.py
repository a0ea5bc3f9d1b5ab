"""What a preference run does beside any other stage of language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from posttrain.console import say
from posttrain.stages.dpo.diagnostics import alarms
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.steps import Context, Outcome, Prepared, Trainable


@dataclass(frozen=True)
class PreferenceSteps(LanguageSteps):
    """Says at the end, and on the run's page, what its figures have of bad news."""

    def save(
        self,
        context: Context,
        prepared: Prepared[PreparedData],
        built: Trainable[TrainableModel],
        outcome: Outcome,
        accelerator: Accelerator,
    ) -> dict[str, Any]:
        """Write the result; returns the stage's part of the manifest."""
        record = super().save(context, prepared, built, outcome, accelerator)
        found = alarms(outcome.metrics)
        for line in found:
            say(f"warning: {line}")
        return record | {"alarms": [{"step": outcome.steps, "text": line} for line in found]}
