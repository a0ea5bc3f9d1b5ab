"""LLM.int8() by bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339): linear layers of the blocks in 8 bits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field

from posttrain.config.interfaces import Quantizer


class Int8(Quantizer):
    """Eight bits, with large inputs multiplied in 16."""

    method: Literal["int8"]
    threshold: Annotated[float, Field(ge=0)]  # inputs with a larger magnitude are multiplied in 16 bit

    def loading(self, device: str) -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=self.threshold)

    def weight_bytes(self, shape: Collection[int]) -> tuple[float, float]:
        """A byte a parameter; a float32 a row."""
        rows, columns = shape
        return float(rows * columns), 4.0 * rows

    def made(self, layer: Any) -> bool:
        return type(layer).__name__ == "Linear8bitLt"

    def dequantized(self, layer: Any) -> Any:
        from bitsandbytes.functional import int8_vectorwise_dequant

        # peft's function would leave a layer on a CPU without its scales
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, scales.to(layer.weight.device))


QUANTIZER = Int8
