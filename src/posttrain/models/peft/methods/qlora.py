"""QLoRA (Dettmers et al. 2023, arXiv 2305.14314): LoRA on a base in 4 bits, which `quant=nf4` makes of it."""

from __future__ import annotations

from typing import Literal

from posttrain.models.peft.methods.lora import LoraFamily


class QLora(LoraFamily):
    """LoRA on a quantized base."""

    method: Literal["qlora"]


METHOD = QLora
