"""What held-out figures say of a preference run, in words."""

from __future__ import annotations

from collections.abc import Mapping

FALL = 0.01  # of the log-prob at the start, from which a fall is worth a word


def alarms(metrics: Mapping[str, float]) -> list[str]:
    """metrics: of both ends of a run, as its manifest has them. Nothing is said where no row was held out."""
    before, after = metrics.get("eval/logp_chosen_before"), metrics.get("eval/logp_chosen")
    if before is None or after is None or after >= before - FALL * abs(before):
        return []
    rejected = [metrics.get(name) for name in ("eval/logp_rejected_before", "eval/logp_rejected")]
    theirs = "" if None in rejected else ", that of rejected ones from {:.4g} to {:.4g}".format(*rejected)
    return [
        f"the log-prob of chosen answers fell from {before:.4g} to {after:.4g}{theirs}: the model tells them apart by writing "
        "neither; add the likelihood of the chosen answers, as dpo.loss={sigmoid: 0.8, sft: 0.2}, or lower optim.lr "
        "(docs/preference.md)"
    ]
