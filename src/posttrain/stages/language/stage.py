"""A stage of language models: the steps that all of them share, around one objective."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import Accelerator

from posttrain.batch import PackedBatch
from posttrain.console import say
from posttrain.models.language.architecture import towers
from posttrain.stages.language.build import FirstValues, TrainableModel, build_model
from posttrain.stages.language.first_values import first_values
from posttrain.stages.language.prepare import PreparedData, prepare_language
from posttrain.stages.language.recompute import fit_memory, largest_batch
from posttrain.stages.language.save import save_language
from posttrain.stages.language.training import MakeReferences, train_language
from posttrain.stages.steps import Context, Outcome, Prepared, Session, Trainable, Training
from posttrain.training.objective import Objective
from posttrain.training.processes import Processes


@dataclass(frozen=True)
class LanguageSteps:
    """One batch a step, one loss. make_references: of an objective that compares with the stage's start."""

    objective: Objective[PackedBatch]
    make_references: MakeReferences | None = None

    def prepare(self, context: Context) -> Prepared[PreparedData]:
        """Everything that can be refused before a weight is loaded: base, data, parents."""
        return prepare_language(context)

    def build(self, context: Context, prepared: Prepared[PreparedData], accelerator: Accelerator) -> Trainable[TrainableModel]:
        """The model with what is trained of it."""
        values_of = _values_of(context, prepared.data, self.objective, accelerator)
        model = build_language(context, prepared.data, prepared.num_steps, self.objective.scores, values_of)
        for line in (*model.module.report.lines, model.module.reading.line):
            if line:
                say(line)
        fit_memory(context.cfg, model.module, model, largest_batch(context.cfg, prepared.data), context.device)
        return Trainable(model.module, model, model.trained, model.total, lambda: as_given(prepared.data, model))

    def training(
        self, context: Context, prepared: Prepared[PreparedData], built: Trainable[TrainableModel], session: Session
    ) -> Training[PackedBatch]:
        """What a step draws, its loss, and what is measured."""
        return train_language(context, prepared.data, built.model, session, self.objective, self.make_references)

    def save(
        self,
        context: Context,
        prepared: Prepared[PreparedData],
        built: Trainable[TrainableModel],
        outcome: Outcome,
        accelerator: Accelerator,
    ) -> dict[str, Any]:
        """Write the result; returns the stage's part of the manifest."""
        return save_language(context, prepared.data, built.model, outcome, accelerator, self.objective.scores)


def build_language(
    context: Context, data: PreparedData, num_steps: int, scores: bool, values_of: FirstValues | None = None
) -> TrainableModel:
    """scores: as a reward model. values_of: see `build_model`."""
    start = data.start, data.base, num_steps, context.device
    built = build_model(context.cfg, *start, scores, data.new_tokens, values_of)
    if frozen := towers(built.module.causal):
        parts = ", ".join(f"{name} ({count:,} parameters)" for name, count in frozen.items())
        say(f"the rows are text: the language model is trained, and {parts} stays as it is")
    return built


def _values_of(
    context: Context, data: PreparedData, objective: Objective[PackedBatch], accelerator: Accelerator
) -> FirstValues | None:
    if not context.cfg.peft.reads:
        return None
    processes, writes = Processes.of(accelerator), accelerator.is_local_main_process
    return partial(first_values, context, data, objective, processes, writes)


def as_given(data: PreparedData, model: TrainableModel) -> AbstractContextManager[None]:
    """Without soft tokens that are still random."""
    return nullcontext() if data.start.mode == "continue" else model.module.without_prompt()
