"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the principal components, which leave the base."""

from __future__ import annotations

from typing import Literal

from posttrain.models.peft.methods.lora import LoraFamily


class Pissa(LoraFamily):
    """LoRA that starts from the weights' principal components."""

    method: Literal["pissa"]
    init: Literal["pissa"]  # pyright: ignore[reportIncompatibleVariableOverride]


METHOD = Pissa
