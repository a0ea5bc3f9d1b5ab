"""lm-eval's tasks, asked while a model is trained (`eval.tasks`)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.metrics import TASKS
from posttrain.config.schema import LanguageStage
from posttrain.evaluation.tasks import Asking, Tasks
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.soft_prompts import virtual_of
from posttrain.stages.steps import Session


@dataclass
class TasksDuring:
    """every: steps from one asking to the next; None: at both ends alone. asked: has the last evaluation asked them?"""

    asking: Asking
    tokenizer: Any
    chat: bool
    every: int | None
    asked: bool = False

    def during(self, done: int, lm: PackedLM, session: Session) -> dict[str, float]:
        """For an evaluation after so many steps: tasks/..., or nothing."""
        self.asked = bool(self.every) and done % self.every == 0
        return self._figures(lm, session) if self.asked else {}

    def at_end(self, lm: PackedLM, session: Session) -> dict[str, float]:
        """Before or after the run, behind that moment's evaluation: what that has not asked."""
        return {} if self.asked else self._figures(lm, session)

    def _figures(self, lm: PackedLM, session: Session) -> dict[str, float]:
        """Every process asks, since one that waited so long would be taken for lost; what rank 0 has found counts."""
        silent = virtual_of(lm.model) and not lm.prompt_kind  # soft tokens that are still random
        model: Any = lm.model
        with session.accelerator.autocast(), model.disable_adapter() if silent else nullcontext():
            found = self.asking.measure(model, self.tokenizer, self.chat)
        return session.processes.told(lambda: {f"{TASKS}/{name}": value for name, value in found.items()})


def tasks_during(cfg: LanguageStage, tokenizer: Any, is_chat: bool) -> TasksDuring | None:
    """None where none is asked for. is_chat: were the rows rendered by the chat template? Raises UserError before a model is
    loaded."""
    how = cfg.eval.harness
    if not cfg.eval.tasks:
        return None
    chat = None if how.chat_template == "auto" else how.chat_template
    include = Path(how.include).expanduser() if how.include else None
    asking = Tasks(tuple(cfg.eval.tasks), how.limit, how.shots, how.batch_size, chat, include).prepared(
        "eval.tasks", "eval.harness.include"
    )
    every = how.every * cfg.train.eval_steps if how.every and cfg.train.eval_steps else None
    return TasksDuring(asking, tokenizer, asking.chat(tokenizer, is_chat), every)
