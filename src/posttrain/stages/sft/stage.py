"""Supervised fine-tuning: next token on the assistant's tokens (Ouyang et al. 2022, arXiv 2203.02155)."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import Sft
from posttrain.evaluation.held_out import TOKENS
from posttrain.runs.directory import Run
from posttrain.stages.language.stage import run_language


def run(cfg: Sft, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    return run_language(cfg, run, TOKENS)
