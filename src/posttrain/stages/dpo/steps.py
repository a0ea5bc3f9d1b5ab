"""What a preference run does beside any other stage of language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from posttrain.console import say
from posttrain.data.collate import other_prompt
from posttrain.data.examples import Examples
from posttrain.errors import UserError
from posttrain.stages.dpo.diagnostics import alarms, line_of_labels
from posttrain.stages.dpo.loss import loss_of
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.steps import Context, Outcome, Prepared, Trainable


@dataclass(frozen=True)
class PreferenceSteps(LanguageSteps):
    """Says at the end, and on the run's page, what its figures have of bad news."""

    def prepare(self, context: Context) -> Prepared[PreparedData]:
        """As for other stages; of labelled answers it is said how many are good. Raises UserError where a loss compares an answer
        with those of other prompts, and there are none."""
        prepared, loss = super().prepare(context), loss_of(context.cfg)
        data = prepared.data.data
        if loss.unpaired:
            prepared.lines.insert(-1, line_of_labels(data.train.margins))
        if loss.over_step and loss.over_step.mismatched:
            _check_prompts("data.path: the rows to train on", data.train, "give more of them")
            _check_prompts("the held-out rows", data.held_out, "hold more out by data.eval_share or data.eval_path, or none by 0")
        return prepared

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


def _check_prompts(which: str, examples: Examples, way: str) -> None:
    try:
        if len(examples):
            other_prompt(examples, 0)
    except LookupError:
        raise UserError(f"{which} have one prompt alone, and dpo.loss looks at answers to others; {way}") from None
