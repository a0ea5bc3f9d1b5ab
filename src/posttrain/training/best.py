"""The best evaluation so far, and whether a run has waited long enough for a better one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from posttrain.errors import UserError, did_you_mean


class Best(TypedDict):
    """As a checkpoint has it. step, value: of the best evaluation, None before one was a number; waited: evaluations since."""

    step: int | None
    value: float | None
    waited: int


@dataclass(frozen=True)
class Judge:
    """metric: by which evaluations are compared; lower: is less better? patience: evaluations that are not better, after which
    the run ends; None: it goes on. keeps: is the best checkpoint the result?"""

    metric: str
    lower: bool
    patience: int | None
    keeps: bool

    def check(self, measured: dict[str, float]) -> None:
        """Raises UserError where the metric is not among what the first evaluation has measured."""
        if self.metric in measured:
            return
        key = "train.keep_best" if self.keeps else "train.early_stopping.metric"
        if not measured:
            raise UserError(f"{key}: no row is held out, so nothing is measured; give data.eval_rows or data.eval_path")
        near, known = did_you_mean(self.metric, sorted(measured)), ", ".join(sorted(measured))
        raise UserError(f"{key}: no evaluation measures '{self.metric}'{near}; it measures {known}")

    def judged(self, best: Best | None, step: int, value: float) -> Best:
        """What is the best after an evaluation. Of equals the earlier one is; what is no number is never better."""
        then = best["value"] if best else None
        if math.isfinite(value) and (then is None or (value < then if self.lower else value > then)):
            return Best(step=step, value=value, waited=0)
        return Best(step=best["step"] if best else None, value=then, waited=best["waited"] + 1 if best else 1)

    def is_over(self, best: Best | None) -> bool:
        """Has the run waited as long as its patience?"""
        return self.patience is not None and best is not None and best["waited"] >= self.patience

    def kept(self, best: Best | None) -> int | None:
        """The step whose checkpoint must stay."""
        return best["step"] if self.keeps and best else None

    def told(self, best: Best, done: int, last: int, before: float | None = None) -> str:
        """What became of a run of `last` steps that is over after `done`, in a line. before: the metric before the first step."""
        if best["step"] is None:
            found = f"{self.metric} was never a number"
        else:
            found = f"the {'lowest' if self.lower else 'highest'} {self.metric} is {best['value']:.4g}, at step {best['step']}"
        if (
            best["value"] is not None
            and before is not None
            and (before < best["value"]) == self.lower
            and before != best["value"]
        ):
            found += f" (before training it was better: {before:.4g})"
        result = best["step"] if self.keeps and best["step"] is not None else done
        end = f"ended at step {done} of {last}, after {best['waited']} evaluations that were no better: " if done < last else ""
        return f"{end}{found}; the result has the weights of step {result}"
