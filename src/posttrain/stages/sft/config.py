"""The config of supervised fine-tuning."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.choices import TOKEN_LOSSES
from posttrain.config.schema import Conversational, SftConfig


class Sft(Conversational):
    """Config of `posttrain sft`."""

    sft: SftConfig

    @model_validator(mode="after")
    def _smooths(self) -> Sft:
        if self.sft.label_smoothing and not TOKEN_LOSSES.get(self.sft.loss).smooths:
            raise ValueError(
                f"sft.label_smoothing: {self.sft.loss} weighs each token by its own chance and has no share for the others; say "
                f"sft.loss=nll, or sft.label_smoothing=0"
            )
        return self
