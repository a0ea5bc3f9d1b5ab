"""Continued pre-training: next token on every token of a corpus (Gururangan et al. 2020, arXiv 2004.10964)."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import Cpt
from posttrain.evaluation.held_out import TOKENS
from posttrain.runs.directory import Run
from posttrain.stages.language.stage import run_language


def run(cfg: Cpt, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    return run_language(cfg, run, TOKENS)
