"""What a stage has made worse, as one figure."""

from __future__ import annotations


def forgetting_percent(before: float, after: float) -> float:
    """Percent by which a loss has risen from the stage's start: [L(theta) - L(theta_0)] / L(theta_0) * 100."""
    return 100 * (after - before) / before
