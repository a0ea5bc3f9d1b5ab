"""Which loss a file asks for: one or several with their weights, or what its trainer adds to it."""

from __future__ import annotations

from typing import Any, cast

from posttrain.commands.bring.tools import FACTORY
from posttrain.commands.bring.translation import Translation

_NAMES = {"aot_pair": "aot_unpaired"}  # TRL's before 1.0 -> now
_WORDS = ("loss_type", "pref_loss", "dpo_loss_type")
_WEIGHTS = ("loss_weights", "dpo_loss_weights")


def read_losses(found: Translation) -> None:
    """dpo.loss and its options, and rm.centering."""
    if found.stage == "rm":
        found.put("rm.centering", found.number("center_rewards_coefficient") or 0.0, "center_rewards_coefficient")
    if found.stage != "dpo":
        return
    loss, words = _asked(found)
    cpo = found.tool != FACTORY and (found.has("cpo_alpha") or found.has("simpo_gamma") or loss == "simpo")
    if cpo:
        loss = _of_cpo(found, loss or "sigmoid", words)
    elif loss == "simpo":
        _put_gamma(found)
    for word in ("rpo_alpha", "pref_ftx"):
        if weight := found.number(word):
            loss, words = _with_sft(found, loss or "sigmoid", weight, word), [*words, word]
    if loss:
        found.put("dpo.loss", loss, ", ".join(words) or "its words")


def _asked(found: Translation) -> tuple[Any, list[str]]:
    """(a name, or names with their weights; the words for it)."""
    loss, words = found.settings.pop("dpo.loss", (None, []))  # what comes with the stage
    word = next((each for each in _WORDS if found.has(each)), "")
    given = found.take(word) if word and loss is None else None
    if isinstance(given, list):
        names = [str(each) for each in cast("list[Any]", given)]
        how = next((each for each in _WEIGHTS if found.has(each)), "")
        weights = found.take(how) if how else [1.0] * len(names)
        if not isinstance(weights, list) or len(cast("list[Any]", weights)) != len(names):
            found.note(how, weights, "a weight for each loss is needed")
            weights = [1.0] * len(names)
        pairs = dict(zip(map(_name, names), cast("list[Any]", weights), strict=True))
        return next(iter(pairs)) if len(pairs) == 1 else pairs, [word, how] if how else [word]
    return (loss, words) if given is None else (_name(str(given)), [word])


def _name(theirs: str) -> str:
    return _NAMES.get(theirs, theirs)


def _of_cpo(found: Translation, loss: Any, words: list[str]) -> Any:
    """The loss of TRL's CPO trainer, which adds the chosen answers' likelihood to each."""
    alpha = found.number("cpo_alpha")
    alpha = 1.0 if alpha is None else alpha
    words.append("cpo_alpha" if found.has("cpo_alpha") else "cpo_alpha: 1 there where nothing is said")
    if loss == "simpo":
        _put_gamma(found)
        return _with_sft(found, loss, alpha, "cpo_alpha") if alpha else loss
    found.take("simpo_gamma")
    if loss == "sigmoid":
        found.put("dpo.options.alpha", alpha, "cpo_alpha")
        return "cpo"
    found.note(words[0], loss, "of CPO's trainer is a loss that has no like here")
    return None


def _put_gamma(found: Translation) -> None:
    gamma = found.number("simpo_gamma")
    found.put("dpo.options.gamma", 0.5 if gamma is None else gamma, "simpo_gamma")


def _with_sft(found: Translation, loss: Any, weight: float, word: str) -> Any:
    if isinstance(loss, dict):
        found.note(word, weight, "dpo.loss is a sum already; add sft with its weight")
        return cast("Any", loss)
    return {loss: 1.0, "sft": weight}
