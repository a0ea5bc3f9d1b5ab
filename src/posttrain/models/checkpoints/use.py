"""What becomes of a checkpoint's own format in a run: used as it is, dequantized, or quantized again; checked, and in words."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from posttrain.config.interfaces import Method, Quantizer
from posttrain.errors import UserError
from posttrain.models.checkpoints.files import Checkpoint
from posttrain.models.quantization import quantizer_of

GB = 1e9


class HeldBytes(NamedTuple):
    """Weights in a format of a checkpoint. codes, constants: in bytes."""

    numbers: int = 0
    codes: int = 0
    constants: int = 0


NONE_HELD = HeldBytes()


class Use(NamedTuple):
    """quant: what the run asks for. dtype: of the base in memory."""

    checkpoint: Checkpoint
    quant: Quantizer
    dtype: str

    @property
    def kept(self) -> bool:
        """Is the base used in the checkpoint's own format?"""
        found = self.checkpoint.format
        return found is not None and found.keeps(self.quant.name)

    @property
    def layers(self) -> Quantizer:
        """The quantizer whose layers the base then has."""
        found = self.checkpoint.format
        return quantizer_of(found.layers()) if self.kept and found else self.quant

    def record(self) -> dict[str, str]:
        """For the manifest; empty for plain weights."""
        found = self.checkpoint.format
        return {"format": found.name, "held": self._held} if found else {}

    def lines(self) -> list[str]:
        """What is to be said of it before anything is loaded."""
        found = self.checkpoint.format
        if found:
            return [f"the checkpoint is in {found.name}: {self._held}{self._size}"]
        if self.quant.name == "dequantize":
            return ["the checkpoint is in no format to dequantize: quant=dequantize changes nothing"]
        return []

    @property
    def _by_numbers(self) -> bool:
        return self.kept and self.checkpoint.format is not None and self.checkpoint.format.by_numbers

    def held_bytes(self) -> HeldBytes:
        """Of weights that are kept as codes and scales, by the headers of the files; all 0 where there are none."""
        entries = [entry for entry in self.checkpoint.entries if entry.is_quantized] if self._by_numbers else []
        sizes = [entry.sizes() for entry in entries]
        numbers = sum(torch.Size(entry.shape).numel() for entry in entries)
        return HeldBytes(numbers, sum(size["main"] for size in sizes), sum(sum(size.values()) - size["main"] for size in sizes))

    @property
    def _held(self) -> str:
        if self.kept:
            return "used as it is" + (", dequantized for each product" if self._by_numbers else "")
        return f"dequantized to {self.dtype} at load" + (f", and kept in {self.quant.name}" if self.quant.is_quantized else "")

    @property
    def _size(self) -> str:
        """Empty where the weights are not at hand, or are not dequantized to stay so."""
        if self.kept or self.quant.is_quantized or not self.checkpoint.files:
            return ""
        return f", {self.checkpoint.numbers * getattr(torch, self.dtype).itemsize / GB:.3g} GB"

    def check(self, method: Method, fsdp: bool) -> None:
        """Raises UserError where `method` cannot be trained on it."""
        found = self.checkpoint.format
        if found is None:
            return
        start = f"model.name: the checkpoint is in {found.name}"
        if method.writes_base and self.quant.name == "none":
            raise UserError(f"{start}, and is trained {method.in_words}: say quant=dequantize, or use another peft=")
        if not self.kept:
            return
        if method.reads == "quantized":
            raise UserError(f"{start}, and nothing more is lost that peft.init could make up for; say peft.init=default")
        try:
            method.check_base(self.layers)
        except ValueError:
            raise UserError(
                f"{start}, which cannot be trained {method.in_words}; say quant=dequantize, or use peft=lora"
            ) from None
        if fsdp:
            raise UserError(f"{start}, which train.fsdp does not shard; say quant=dequantize, or train.fsdp=false")


def use_of(directory: Path, quant: Quantizer, dtype: str) -> Use:
    """Of the model in `directory`. Raises UserError for a format that cannot be read."""
    return Use(Checkpoint(directory), quant, dtype)
