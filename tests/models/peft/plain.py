"""An ordinary LoRA, for tests that are about something else."""

from typing import Any

from posttrain.models.peft.methods.lora import Lora


def plain_lora(**said: Any) -> Lora:
    """Rank 4, alpha 8, every linear layer, float32, no dropout; `said` in place of that."""
    usual = {"r": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "dtype": "float32", "lr_factor": 1.0}
    kind = {
        "method": "lora",
        "init": "default",
        "init_rows": 64,
        "rank_pattern": None,
        "alpha_pattern": None,
        "experts": True,
        "router": False,
    }
    return Lora(**(usual | kind | said))
