"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): alpha / sqrt(r) in place of alpha / r."""

from __future__ import annotations

from typing import Literal

from posttrain.models.peft.methods.lora import LoraFamily


class RsLora(LoraFamily):
    """LoRA that is scaled by alpha / sqrt(r)."""

    options = {"use_rslora": True}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["rslora"]


METHOD = RsLora
