"""No quantization: the base as it was given, in `model.dtype`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from posttrain.config.interfaces import Quantizer


class NoQuantization(Quantizer):
    """The base as it is."""

    is_quantized = False
    is_readable = True
    comes_and_goes = True
    for_images = True
    method: Literal["none"]

    def loading(self, device: str) -> None:
        return None

    def weight_bytes(self, shape: Collection[int]) -> None:
        return None


QUANTIZER = NoQuantization
