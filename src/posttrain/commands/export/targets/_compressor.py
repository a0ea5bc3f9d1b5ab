"""GPTQ and AWQ by llm-compressor: four bits in groups, calibrated on the rows that the run was trained on."""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from posttrain.console import say
from posttrain.errors import RunError, UserError, first_line
from posttrain.models.language.loading import device_here

GROUPS = (128, 64, 32)  # columns that share a scale


def require_compressor(dtype: str) -> None:
    """Raises UserError where it is not installed, and where it needs a GPU that is not there."""
    if find_spec("llmcompressor") is None:
        raise UserError(f"--dtype: {dtype} is made by llm-compressor, which is not installed; pip install llmcompressor")
    if dtype == "awq" and device_here() == "cpu":
        raise UserError("--dtype: llm-compressor makes awq on a GPU alone; gptq is made on a CPU too")


def compress(model: Any, tokenizer: Any, dtype: str, rows: list[Tensor], out: Path) -> None:
    """Quantize a model of transformers in place and save it. rows: token ids to calibrate on. Raises RunError where it fails."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # pyright: ignore
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore

    size, odd = _group(model)
    if odd:
        say(f"{len(odd)} layers, such as {odd[0]}, stay as they are: their columns do not fill groups of {size}")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=dtype == "gptq", strategy="group", group_size=size)
    scheme = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    recipe = _modifier(dtype)(config_groups=scheme, ignore=[*_heads(model), *odd])
    texts = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows])
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars listen to no setting
            oneshot(
                model=model, dataset=texts, recipe=recipe, processor=tokenizer, num_calibration_samples=len(rows),
                max_seq_length=max(map(len, rows)),
            )  # fmt: skip
            model.save_pretrained(out, save_compressed=True)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"llm-compressor could not make {dtype} of it ({first_line(error)[:300]}); nothing was written") from error


def _modifier(dtype: str) -> Any:
    if dtype == "gptq":
        from llmcompressor.modifiers.quantization import GPTQModifier  # pyright: ignore

        return GPTQModifier
    from llmcompressor.modifiers.awq import AWQModifier  # pyright: ignore

    return AWQModifier


def _heads(model: nn.Module) -> list[str]:
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(get_keys_to_not_convert(model))


def _group(model: nn.Module) -> tuple[int, list[str]]:
    """The largest of GROUPS that fills all layers, or else the smallest; and the layers that it does not fill."""
    heads = _heads(model)
    columns = {n: m.in_features for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in heads}
    odd = {size: [name for name, count in columns.items() if count % size] for size in GROUPS}
    best = next((size for size in GROUPS if not odd[size]), GROUPS[-1])
    return best, odd[best]
