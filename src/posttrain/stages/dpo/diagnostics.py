"""What held-out figures say of a preference run, in words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

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


def line_of_labels(labels: NDArray[np.floating]) -> str:
    """How many answers are good, and what to say where one kind outweighs the other. labels: 1 or -1 each."""
    good = int((labels > 0).sum())
    bad = len(labels) - good
    line = f"{good:,} good and {bad:,} other answers"
    if not min(good, bad):
        return f"{line}: with one kind alone a loss of labels has nothing to tell apart; give rows of both"
    if max(good, bad) > 4 / 3 * min(good, bad):  # KTO's section 4.3: within 1 : 1 and 4 : 3
        name = "undesirable" if bad < good else "desirable"
        line += f"; dpo.options.{name}_weight={max(good, bad) / min(good, bad):.3g} lets both count alike"
    return line
