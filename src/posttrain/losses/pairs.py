"""What the losses on preference pairs share: the pairs themselves, implicit rewards, and the figures that are reported of them.

Tables hold P pairs as [2P], chosen at even and rejected at odd places. A pair's weight is how often it counts in the loss; all
other figures are means over pairs as they are, so that runs of different weights can be compared by them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.batch import LossOutput, Metrics


@dataclass(frozen=True)
class Pairs:
    """Log-probs of the whole answers of P pairs.

    Args:
        policy: under the model in training, float32 [2P], in nats.
        reference: under the stage's start, [2P]; None for a loss that needs none.
        lengths: tokens of each answer, [2P].
        step: what `OverStep.values` says of each pair, [P] or [P, n], for a loss that has such.
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    step: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """log(policy / reference) of each answer, [2P]."""
        assert self.reference is not None, "the loss says that it needs no reference"
        return self.policy - self.reference


@dataclass(frozen=True)
class OverStep:
    """What a loss must know of all answers of a step before it is asked about any, so that it does not depend on how the step is
    cut into micro-batches and processes.

    Args:
        values: (all `Pairs`, or all `Answers`, of the step, under the weights before it) -> a value of each pair or answer,
            or several as columns.
        figure: what the mean of the values is called in reports; "": it is not reported.
        mismatched: the answers that it is shown are those of other prompts.
    """

    values: Callable[[Any], Tensor]
    figure: str = ""
    mismatched: bool = False


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss of `dpo.loss`.

    Args:
        per_pair: (pairs, *, beta) -> the loss of each pair, [P]. Every further keyword has a default, and is an option of this
            loss alone (`dpo.options`). Of a loss that is unpaired (answers, *, beta) -> the loss of each answer.
        needs_reference: whether it reads `pairs.reference`; if not, none is computed.
        smooths_labels: whether it takes `label_smoothing` too, the share of pairs taken to be the wrong way round.
        beta: the usual one, which holds where `dpo.beta` says nothing; None: it has no beta, and is given none.
        label_smoothing: the usual one, as beta.
        needs_smoothing: a label_smoothing of 0 is refused.
        per_token: it compares log-probs per token, so rewards that are reported are per token too.
        unpaired: it is of `Answers` (losses/answers.py), each with a label, and not of pairs.
        over_step: what it must know of the whole step.
    """

    per_pair: Callable[..., Tensor]
    needs_reference: bool
    smooths_labels: bool = False
    beta: float | None = 0.1
    label_smoothing: float = 0.0
    needs_smoothing: bool = False
    per_token: bool = False
    unpaired: bool = False
    over_step: OverStep | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Its own keywords, with their defaults."""
        keywords = list(inspect.signature(self.per_pair).parameters.values())[1:]
        return {each.name: each.default for each in keywords if each.name not in ("beta", "label_smoothing")}


def margins(values: Tensor) -> Tensor:
    """What the chosen answers have more than the rejected ones: [2P] -> [P]."""
    return values[0::2] - values[1::2]


def right(chosen: Tensor, rejected: Tensor | float = 0.0) -> Tensor:
    """1 where `chosen` is more, 0 where it is less, and half of it for a tie: before the first step all pairs are ties.

    float32, of chosen's shape. With one argument this is of margins.
    """
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def smoothed(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta margin), with a share of the pairs taken to be the wrong way round."""
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def chosen_nll(pairs: Pairs) -> Tensor:
    """-log p of a token of each chosen answer, [P]: the mean over its own tokens, so that it does not depend on who else is in
    the batch."""
    return -(pairs.policy / pairs.lengths)[0::2]


def implicit_rewards(pairs: Pairs, beta: float) -> Tensor:
    """beta log(policy / reference) (Rafailov et al. 2023, arXiv 2305.18290, section 4), without gradient: [2P].

    Without a reference beta log(policy), as for CPO.
    """
    return beta * (pairs.policy if pairs.reference is None else pairs.ratio).detach()


def pair_metrics(chosen: Tensor, rejected: Tensor, name: str) -> Metrics:
    """accuracy, margin and both means, of what the pairs' answers are compared by ([P] each)."""
    count = float(len(chosen))
    return {
        "accuracy": (right(chosen, rejected).sum(), count),
        "margin": ((chosen - rejected).sum(), count),
        f"{name}_chosen": (chosen.sum(), count),
        f"{name}_rejected": (rejected.sum(), count),
    }


def weighted(losses: Tensor, weight: Tensor, metrics: Metrics) -> LossOutput:
    """Sum of weight times loss over P pairs, [P] each; `loss` is its mean in the metrics, and of each pair in the rows."""
    each = weight * losses
    total = each.sum()
    rows = {"loss": each.detach(), "loss_count": weight}
    return LossOutput(total, {"loss": (total.detach(), weight.sum()), **metrics}, rows)
