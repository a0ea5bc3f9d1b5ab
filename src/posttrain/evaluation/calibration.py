"""How far a reward model's scores can be trusted: calibration, correlation with length, confidence interval of the accuracy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.losses.pairs import right

BINS = 10
SUSPICIOUS = 0.4  # a correlation of score and length from which a warning is due


class Bin(NamedTuple):
    """Pairs about which the model was equally confident: their mean confidence, the share that was right, their number."""

    confidence: float
    accuracy: float
    pairs: int


def reliability(margins: Tensor) -> list[Bin]:
    """Pairs by the model's confidence in its own choice, sigma(|r_chosen - r_rejected|), in ten bins of 0.5 to 1."""
    confidence, wins = torch.sigmoid(margins.abs()).double(), right(margins).double()
    which = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    found: list[Bin] = []
    for i in range(BINS):
        inside = which == i
        if count := int(inside.sum()):
            found.append(Bin(float(confidence[inside].mean()), float(wins[inside].mean()), count))
    return found


def expected_calibration_error(margins: Tensor) -> float:
    """Mean over pairs of |share that was right - confidence| of their bin (Naeini et al. 2015)."""
    return sum(b.pairs * abs(b.accuracy - b.confidence) for b in reliability(margins)) / len(margins)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's r; 0 where either does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / scale if scale else 0.0


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share among `count` (Wilson 1927)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def score_summary(rows: dict[str, Tensor]) -> dict[str, float]:
    """Metrics over all held-out pairs. rows: chosen, rejected (scores) and chosen_tokens, rejected_tokens, each [pairs]."""
    margins = rows["chosen"] - rows["rejected"]
    scores = torch.cat([rows["chosen"], rows["rejected"]])
    lengths = torch.cat([rows["chosen_tokens"], rows["rejected_tokens"]])
    accuracy = float(right(margins).double().mean())
    low, high = wilson(accuracy, len(margins))
    return {
        "accuracy_low": low,
        "accuracy_high": high,
        "calibration_error": expected_calibration_error(margins),
        "length_correlation": correlation(scores, lengths.float()),
        "score_std": float(scores.std()) if len(scores) > 1 else 0.0,
    }
