"""posttrain: take a pretrained model through continued pre-training, fine-tuning and preference training."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def run(stage: str, *overrides: str) -> dict[str, Any]:
    """Run one stage as the command line would and return its manifest: `run("sft", "+peft=qlora", "model=tiny")`.

    Raises posttrain.errors.UserError, RunError or Stopped.
    """
    from posttrain.config.compose import compose_run
    from posttrain.launch.worker import run_config

    return run_config(compose_run(stage, list(overrides)))
