"""Full training: every weight that text runs through."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.models.peft.base import OwnWeights


class Full(OwnWeights):
    """Full training."""

    for_images = True
    adds_tokens = True
    method: Literal["none"]

    @property
    def in_words(self) -> str:
        return "in full"

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        from posttrain.models.language.architecture import outside_text

        model.requires_grad_(True)
        for parameter in outside_text(model).values():
            parameter.requires_grad_(False)
        return model


METHOD = Full
