"""What is asked of a model, and the optimizer steps that it is asked in."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from posttrain.batch import Batch, LossOutput, Metrics

B = TypeVar("B", bound=Batch)
LossFunction = Callable[[nn.Module, B], LossOutput]  # module, micro-batch -> sum of losses with gradient


@dataclass(frozen=True)
class Objective(Generic[B]):
    """How units of examples become a batch, and what is asked of the model about it.

    Args:
        pack: (examples, numbers of units) -> batch.
        loss: of one micro-batch.
        needs_reference: the loss reads batch.extra["reference"], the answers' log-probs at the start.
        summary: metrics of all held-out units together, from the values of each.
        scores: the model is one that scores answers (models/language/reward_model.py).
        perplexity: exp(loss) means something, and is reported.
        training_loss: of one micro-batch in training, where that is another than what is measured.
    """

    pack: Callable[[Any, Sequence[int]], B]
    loss: LossFunction[B]
    needs_reference: bool = False
    summary: Callable[[dict[str, Tensor]], dict[str, float]] | None = None
    scores: bool = False
    perplexity: bool = False
    training_loss: LossFunction[B] | None = None


@dataclass(frozen=True)
class Update(Generic[B]):
    """One step of the optimizer: this process's micro-batches (none: no step), and figures as in `LossOutput`."""

    batches: list[B]
    metrics: Metrics = field(default_factory=Metrics)


@dataclass(frozen=True)
class UpdateOutcome:
    """What an update's micro-batches gave: this process's figures, as the loss left them, in their order."""

    metrics: list[Metrics]

    def total(self, name: str) -> tuple[float | Tensor, float | Tensor]:
        """Sum and count of one figure; (0, 0) where no micro-batch has it."""
        total, count = 0.0, 0.0
        for each in self.metrics:
            if name in each:
                total, count = total + each[name][0], count + each[name][1]
        return total, count


# step of the run (from 0) -> its updates: one, or in PPO as many as a rollout feeds. A generator is told each update's outcome.
UpdateSource = Callable[[int], Iterable[Update[B]] | Generator[Update[B], UpdateOutcome, None]]
