"""What the losses on labelled answers share: answers that are each said to be good or not, without a rival."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.batch import LossOutput, Metrics
from posttrain.losses.pairs import right


@dataclass(frozen=True)
class Answers:
    """Log-probs of A whole answers.

    Args:
        policy: under the model in training, float32 [A], in nats.
        reference: under the stage's start, [A].
        lengths: tokens of each answer, [A].
        good: bool [A], the label.
        step: what `OverStep.values` says of each answer, [A]: log(policy / reference) from which an answer counts as raised.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    good: Tensor
    step: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """log(policy / reference) of each answer, [A]."""
        return self.policy - self.reference

    @property
    def towards(self) -> Tensor:
        """+1 where the label is good, -1 where it is not: [A]."""
        return torch.where(self.good, 1.0, -1.0)

    @property
    def shifted(self) -> Tensor:
        """log(policy / reference) beyond `step`, in the direction of the label: positive where it is as it should be."""
        return self.towards * (self.ratio if self.step is None else self.ratio - self.step)


def answer_metrics(answers: Answers, beta: float, figure: str) -> Metrics:
    """Means over good and over other answers, and the share of answers on the right side of `step`. figure: the name of its
    mean."""
    rewards, policy = (beta * answers.ratio).detach(), answers.policy.detach()
    found: Metrics = {"accuracy": (right(answers.shifted.detach()).sum(), float(len(policy)))}
    for name, among in (("chosen", answers.good.float()), ("rejected", 1 - answers.good.float())):
        found |= {f"reward_{name}": ((among * rewards).sum(), among.sum()), f"logp_{name}": ((among * policy).sum(), among.sum())}
    if figure and answers.step is not None:
        found[figure] = (answers.step.sum(), float(len(policy)))
    return found


def labelled_likelihood(mean: Tensor, good: Tensor) -> LossOutput:
    """Mean log-prob of a token of good and of other answers, each answer counting alike. mean, good: [A]. Nothing to train on."""
    among = {"logp_chosen": good.float(), "logp_rejected": 1 - good.float()}
    return LossOutput(torch.zeros(()), {name: ((which * mean).sum(), which.sum()) for name, which in among.items()})


def labelled(losses: Tensor, answers: Answers, good: float, bad: float) -> Tensor:
    """Times what an answer of each label counts."""
    return torch.where(answers.good, good, bad) * losses
