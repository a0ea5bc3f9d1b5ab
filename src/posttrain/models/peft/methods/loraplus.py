"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Rate
from posttrain.models.peft.methods.lora import LoraFamily


class LoraPlus(LoraFamily):
    """LoRA whose B learns faster than its A."""

    several_rates = True
    method: Literal["loraplus"]
    lr_ratio: Rate  # learning rate of B over that of A

    def rate_of(self, parameter: str) -> float:
        return self.lr_ratio if ".lora_B." in parameter else 1.0


METHOD = LoraPlus
