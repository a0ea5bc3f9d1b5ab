"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), with the stage's own start as the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.config.schema import Dpo
from posttrain.data.collate import pack_pairs
from posttrain.evaluation.held_out import Task
from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss, preference_loss
from posttrain.losses.tokens import answer_sums
from posttrain.runs.directory import Run
from posttrain.stages.language.stage import run_language


def run(cfg: Dpo, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    options = cfg.dpo
    loss = chosen_loss(options.loss, options.label_smoothing, options.options or {})

    def objective(module: nn.Module, batch: PackedBatch) -> LossOutput:
        logps = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
        lengths = answer_sums(torch.ones_like(batch.weight), batch.sequence_id, batch.num_answers)
        return preference_loss(
            options.loss,
            Pairs(logps, batch.extra.get("reference"), lengths),
            batch.extra["pair_weight"],
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            options=options.options or {},
        )

    return run_language(cfg, run, Task(pack_pairs, objective, needs_reference=loss.needs_reference))
