"""Which way a figure gets better, by its name."""

from __future__ import annotations

LOWER_IS_BETTER = ("loss", "perplexity", "percent")
HIGHER_IS_BETTER = ("accuracy", "margin", "gap", "reward", "gold", "logp", "clip_i", "clip_t", "dino")
ANSWERS = "answers"  # the group of what `eval.generate` scores: rewards, of which more is better


def direction(name: str) -> int:
    """-1 where lower is better, +1 where higher is, 0 where neither can be said."""
    group, _, kind = name.rpartition("/")
    return -1 if kind in LOWER_IS_BETTER else int(kind in HIGHER_IS_BETTER or group == ANSWERS)
