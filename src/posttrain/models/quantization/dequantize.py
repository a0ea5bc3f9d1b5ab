"""A base that is kept in fewer bits by its checkpoint, dequantized once at load, to `model.dtype`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from posttrain.config.interfaces import Quantizer


class Dequantized(Quantizer):
    """The base in 16 or 32 bit, whatever format its checkpoint is in."""

    is_quantized = False
    is_readable = True
    comes_and_goes = True
    method: Literal["dequantize"]

    def loading(self, device: str) -> Literal["dequantize"]:
        return "dequantize"

    def weight_bytes(self, shape: Collection[int]) -> None:
        return None


QUANTIZER = Dequantized
