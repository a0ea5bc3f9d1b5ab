"""Reward model on preference pairs (Bradley-Terry; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from typing import Any

from posttrain.after.measure import reward_task
from posttrain.config.schema import Rm
from posttrain.rundir import Run
from posttrain.stages.assembly import run_stage


def run(cfg: Rm, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    return run_stage(cfg, run, reward_task(cfg.rm.centering))
