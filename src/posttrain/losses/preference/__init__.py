"""Losses on preferences: on pairs of answers, or on answers each with a label.

Each module of this folder is one, and its file's name is what `dpo.loss` calls it; an installed package adds others by entry
points of the group `posttrain.preference_losses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from posttrain.batch import LossOutput, Metrics
from posttrain.config.choices import PREFERENCE_LOSSES
from posttrain.errors import UserError, did_you_mean
from posttrain.losses.answers import Answers, answer_metrics
from posttrain.losses.pairs import OverStep, Pairs, PreferenceLoss, implicit_rewards, pair_metrics, weighted

Asked = str | Mapping[str, float]  # of dpo.loss: a name, or names with their weights in a sum
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Term:
    """One loss of a sum. settings: the keywords that it is called with."""

    name: str
    weight: float
    loss: PreferenceLoss
    settings: Options

    def words(self) -> str:
        """Its name and settings: "0.8 sigmoid (beta 0.1)"."""
        said = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.settings.items()]
        return (f"{self.weight:g} " if self.weight != 1 else "") + self.name + (f" ({', '.join(said)})" if said else "")


@dataclass(frozen=True)
class ChosenLoss:
    """The loss of a run: one, or a weighted sum of several, each with its settings."""

    terms: tuple[Term, ...]

    @property
    def needs_reference(self) -> bool:
        """Without, none is computed or held."""
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def unpaired(self) -> bool:
        """Of answers with labels, not of pairs."""
        return self.terms[0].loss.unpaired

    @property
    def over_step(self) -> OverStep | None:
        """What one of them must know of the whole step."""
        return next((term.loss.over_step for term in self.terms if term.loss.over_step), None)

    def __call__(self, pairs: Pairs | Answers, weight: Tensor) -> LossOutput:
        """Sum over P pairs, or answers, of their weight ([P]) times their loss, and what is reported of any of them: of several
        losses each one's own mean too."""
        each = [term.loss.per_pair(pairs, **term.settings) for term in self.terms]
        losses = sum(term.weight * values for term, values in zip(self.terms, each, strict=True))
        assert isinstance(losses, Tensor)
        found: Metrics = {}
        if len(self.terms) > 1:
            total = weight.sum()
            found = {f"loss_{t.name}": ((weight * v).sum().detach(), total) for t, v in zip(self.terms, each, strict=True)}
        return weighted(losses, weight, self._figures(pairs) | found)

    def _figures(self, pairs: Pairs | Answers) -> Metrics:
        """Implicit rewards by the beta of the first loss that has one, and log-probs."""
        beta = next((term.settings["beta"] for term in self.terms if "beta" in term.settings), 1.0)
        if isinstance(pairs, Answers):
            return answer_metrics(pairs, beta, self.over_step.figure if self.over_step else "")
        rewards, policy = implicit_rewards(pairs, beta), pairs.policy.detach()
        if not self.needs_reference and self.terms[0].loss.per_token:
            rewards = rewards / pairs.lengths
        count = float(len(policy) // 2)
        logps = {"logp_chosen": (policy[0::2].sum(), count), "logp_rejected": (policy[1::2].sum(), count)}
        return pair_metrics(rewards[0::2], rewards[1::2], "reward") | logps

    def line(self) -> str:
        """What a run says of it before it begins."""
        against = "against the model that the stage starts from" if self.needs_reference else "without a reference"
        return f"loss {' + '.join(term.words() for term in self.terms)}, {against}"


def chosen_loss(asked: Asked, beta: float | None, label_smoothing: float | None, options: Options | None) -> ChosenLoss:
    """The losses called so, with these settings; None: the usual one of each. Raises UserError where there is none of a name, or
    where none of them has what is asked."""
    weights: Mapping[str, float] = {asked: 1.0} if isinstance(asked, str) else asked
    losses: dict[str, PreferenceLoss] = {name: PREFERENCE_LOSSES.get(name) for name in weights}
    named = f"dpo.loss={asked}" if isinstance(asked, str) else f"dpo.loss={{{', '.join(weights)}}}"
    if beta is not None and all(loss.beta is None for loss in losses.values()):
        raise UserError(f"dpo.beta: {named} has none; leave it out")
    if label_smoothing and not any(loss.smooths_labels for loss in losses.values()):
        raise UserError(f"dpo.label_smoothing: {named} has none; leave it out")
    if label_smoothing == 0 and (strict := next((name for name, loss in losses.items() if loss.needs_smoothing), None)):
        raise UserError(f"dpo.label_smoothing: dpo.loss={strict} is infinite at 0; leave it out for the usual one")
    _check_sum(losses)
    _check_options(named, options or {}, {k: default for loss in losses.values() for k, default in loss.options.items()})
    return ChosenLoss(
        tuple(
            Term(name, weight, losses[name], _settings(losses[name], beta, label_smoothing, options or {}))
            for name, weight in weights.items()
        )
    )


def _check_sum(losses: Mapping[str, PreferenceLoss]) -> None:
    """Do they go together?"""
    kinds = {loss.unpaired: name for name, loss in losses.items()}
    if len(kinds) > 1:
        raise UserError(f"dpo.loss: {kinds[True]} is of answers with labels and {kinds[False]} of pairs; they do not add up")
    whole = [name for name, loss in losses.items() if loss.over_step]
    if len(whole) > 1:
        raise UserError(f"dpo.loss: {' and '.join(whole)} each look at the whole step, and one alone can; take one of them")


def _check_options(named: str, options: Options, known: Options) -> None:
    """known: those of the chosen losses, with their defaults."""
    for name, value in options.items():
        if name not in known:
            has = f"has {', '.join(known)}" if known else "has no options of its own"
            raise UserError(f"dpo.options.{name}: {named} {has}{did_you_mean(name, list(known))}")
        if isinstance(known[name], float) and (isinstance(value, bool | str) or not math.isfinite(value)):
            raise UserError(f"dpo.options.{name}: {value!r} is no number; the usual one is {known[name]:g}")


def _settings(loss: PreferenceLoss, beta: float | None, label_smoothing: float | None, options: Options) -> dict[str, Any]:
    """What the loss has, as it is asked for or as is usual."""
    found: dict[str, Any] = {} if loss.beta is None else {"beta": loss.beta if beta is None else beta}
    if loss.smooths_labels:
        found["label_smoothing"] = loss.label_smoothing if label_smoothing is None else label_smoothing
    return found | loss.options | {name: value for name, value in options.items() if name in loss.options}
