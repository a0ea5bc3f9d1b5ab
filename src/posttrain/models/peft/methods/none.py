"""Full training: every weight."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.models.peft.base import OwnWeights


class Full(OwnWeights):
    """Full training."""

    for_images = True
    method: Literal["none"]

    @property
    def in_words(self) -> str:
        return "in full"

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        return model.requires_grad_(True)


METHOD = Full
