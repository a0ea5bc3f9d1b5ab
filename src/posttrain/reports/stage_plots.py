"""Plots that only some runs have: AdaLoRA's final ranks, a reward model's calibration, reward against KL."""

from __future__ import annotations

import json
import math
from typing import Any

from posttrain.reports.plots import Curve, Figure, heat_figure, line_figure
from posttrain.reports.run_records import Record


def stage_figures(record: Record) -> list[Figure]:
    """The plots that this run has data for."""
    rows_file = record.dir / "held_out.json"
    rows: dict[str, Any] = json.loads(rows_file.read_text(encoding="utf-8")) if rows_file.exists() else {}
    found = [
        rank_figure(record.manifest.peft.ranks if record.manifest else {}),
        reliability_figure(rows),
        length_figure(rows),
        reward_kl_figure(record),
    ]
    return [figure for figure in found if figure]


def rank_figure(ranks: dict[str, int]) -> Figure | None:
    """AdaLoRA's final ranks by layer: a row for each kind of matrix over the layers."""
    places = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in ranks}
    rows = {name.rsplit(".", 1)[-1]: [math.nan] * (max(places.values()) + 1) for name in ranks}
    for name, rank in ranks.items():
        rows[name.rsplit(".", 1)[-1]][places[name]] = float(rank)
    note = f"from 0 (blank) to {max(ranks.values())}" if ranks else ""
    return heat_figure("Ranks that were kept", rows, "layer", note)


def reliability_figure(rows: dict[str, list[float]]) -> Figure | None:
    """How often a reward model is right, by its confidence. On the grey line it is perfectly calibrated."""
    if "rejected" not in rows:
        return None
    import torch  # which pages of other runs need not wait for

    from posttrain.evaluation.calibration import reliability

    bins = reliability(torch.tensor(rows["chosen"]) - torch.tensor(rows["rejected"]))
    perfect = Curve("perfect", [0.5, 1.0], [0.5, 1.0], color=0)
    seen = Curve("this model", [b.confidence for b in bins], [b.accuracy for b in bins], style="points")
    return line_figure(
        "Share that is right, by confidence", [perfect, seen], x_label="confidence", x_ticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    )


def length_figure(rows: dict[str, list[float]]) -> Figure | None:
    """Scores against the answers' lengths."""
    if "chosen_tokens" not in rows:
        return None
    curves = [
        Curve(name, rows[f"{name}_tokens"], rows[name], color=color, style="dots")
        for color, name in ((1, "chosen"), (2, "rejected"))
    ]
    return line_figure("Score, by length of the answer", curves, x_label="tokens")


def reward_kl_figure(record: Record) -> Figure | None:
    """Reward against the KL from the reference that it cost (Gao et al. 2022, arXiv 2210.10760)."""
    pairs = [(line["train/kl"], line) for line in record.history if "train/kl" in line and "train/reward" in line]
    if not pairs:
        return None
    kl = [value for value, _ in pairs]
    curves = [Curve("reward", kl, [line["train/reward"] for _, line in pairs], style="dots")]
    if all("train/gold" in line for _, line in pairs):
        curves.append(Curve("gold", kl, [line["train/gold"] for _, line in pairs], color=2, style="dots"))
    return line_figure("Reward against KL", curves, x_label="KL to the reference, nats an answer")
