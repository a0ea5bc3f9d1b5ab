"""What was forgotten: by stage and domain in a recipe, and against what was gained in a sweep over data.alpha."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.evaluation.forgetting import forgetting_percent
from posttrain.reports.plots import COLORS, Curve, Figure, line_figure
from posttrain.reports.run_records import ChainRow

KEY = "data.alpha"


def forgetting_matrix(rows: list[ChainRow]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """(sets, (step, percent by which each set's loss has risen since the start of the whole chain)); None where it was not
    measured. rows: as `chain_table` has them, the start first."""
    if not rows:
        return [], []
    start = rows[0].values
    names = [name for name in start if name.endswith("/loss") and not name.startswith("eval/")]
    names = [name for name in names if any(name in row.values for row in rows[1:])]

    def percent(row: ChainRow, name: str) -> float | None:
        return forgetting_percent(start[name], row.values[name]) if name in row.values else None

    return [name.split("/")[0] for name in names], [(row.label, [percent(row, name) for name in names]) for row in rows[1:]]


@dataclass(frozen=True)
class Choice:
    """One alpha: gain of the domain and forgetting of general text in nats a token, and what alpha* minimises (SPEC 1.1):
    L_domain_val + weight * forgetting."""

    alpha: float
    gain: float
    forgotten: float
    score: float


def choices(jobs: list[tuple[str, dict[str, float], float]]) -> list[Choice]:
    """The best first. jobs: data.alpha as it was typed, metrics, forgetting.weight; others are left out."""
    found: list[Choice] = []
    for alpha, metrics, weight in jobs:
        needed = [f"{name}/loss{when}" for name in ("eval", "general") for when in ("", "_before")]
        try:
            share = float(alpha)
            after, before, general, general_before = (metrics[name] for name in needed)
        except (ValueError, KeyError):
            continue
        forgotten = general - general_before
        found.append(Choice(share, before - after, forgotten, after + weight * forgotten))
    return sorted(found, key=lambda choice: choice.score)


def describe(found: list[Choice]) -> str:
    """alpha* in words; empty where there is no choice."""
    if len(found) < 2:
        return ""
    best = found[0]
    return (
        f"alpha* = {best.alpha:g}: domain loss + weight x forgetting is least there, {best.score:.4f} "
        f"(gained {best.gain:+.4f}, forgotten {best.forgotten:+.4f} nats a token)"
    )


def choice_figure(found: list[Choice]) -> Figure | None:
    """Gain against forgetting, a point for each alpha, joined in its order."""
    if len(found) < 2:
        return None
    ordered = sorted(found, key=lambda choice: choice.alpha)
    line = Curve("", [c.forgotten for c in ordered], [c.gain for c in ordered], color=0)
    points = [
        Curve(
            f"alpha {c.alpha:g}" + (" ★" if c is found[0] else ""), [c.forgotten], [c.gain], i % COLORS + 1, "dots", strong=True
        )
        for i, c in enumerate(ordered)
    ]
    note = "up is better, left is better; ★ is alpha*"
    return line_figure("Domain gain against forgetting", [line, *points], "forgotten, nats a token of general text", note)
