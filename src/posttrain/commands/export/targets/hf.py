"""A model directory as transformers loads it: merged, in another dtype, or quantized by bitsandbytes or llm-compressor."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from posttrain.commands.export.held import FIGURES, hear
from posttrain.commands.export.plain import OF_MODEL, plain_model
from posttrain.commands.export.target import Request, Target
from posttrain.commands.export.targets._compressor import compress, require_compressor
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.checkpoints.files import INDEX
from posttrain.models.language.loading import device_here
from posttrain.models.language.pretrained import load_causal, without_values
from posttrain.models.language.tokenizer import write_ends
from posttrain.models.quantization.nf4 import nf4
from posttrain.runs.files import copy_own, scratch_beside, write_json

BY_BITSANDBYTES, BY_COMPRESSOR = ("nf4", "int8"), ("gptq", "awq")
ROWS, COLUMNS = 32, 64  # of which layers in four bits have a multiple, or else plain transformers cannot ask them on a CPU


def _write(request: Request) -> None:
    dtype = request.dtype
    if dtype in BY_BITSANDBYTES:
        nf4(True, "bfloat16", device_here())  # refuses where bitsandbytes is not to be had
        _quantized(request, dtype)
    elif dtype in BY_COMPRESSOR:
        require_compressor(dtype)
        _quantized(request, dtype)
    else:
        plain_model(request.artifact, request.made, dtype, request.max_kl)


def _quantized(request: Request, dtype: str) -> None:
    """By transformers' own saving; read back and held against the live run."""
    device = device_here()
    with scratch_beside(request.made) as scratch:
        plain = scratch / "model"
        heard = hear(request.run, scratch, calibrates=dtype in BY_COMPRESSOR)
        plain_model(request.artifact, plain, None, request.max_kl)
        config = _settings(plain, dtype) if dtype in BY_BITSANDBYTES else None
        model = load_causal(str(plain), None, "bfloat16", device, None, config)
        if config is None:
            compress(model, heard.tokenizer, dtype, heard.calibration, request.made)
        else:
            model.save_pretrained(request.made)
        del model
        made = {file.name for file in request.made.iterdir()}
        others = (f for f in plain.iterdir() if f.name not in {*made, INDEX} and f.suffix != ".safetensors")
        copy_own(others, plain, request.made)
        write_ends(request.made, heard.ends)
        back = _read_back(request.made, device, dtype)
        figures = heard.against(back, dtype, request.max_kl)
    write_json(request.made / FIGURES, {"run": str(request.run.resolve()), **figures})


def _read_back(directory: Path, device: str, dtype: str) -> Any:
    if dtype in BY_BITSANDBYTES:
        return load_causal(str(directory), None, "bfloat16", device, None, None).eval()
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # compressed-tensors' bars
        back: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map={"": device})
    return back.eval()


def _settings(directory: Path, dtype: str) -> Any:
    """transformers' of bitsandbytes. What stays as it is stands in them by name, for whoever loads the model."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    model = without_values(directory)
    if model is None:
        raise UserError("export: the layers of this model cannot be told without its weights; --dtype bf16 writes it")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    odd = [name for name, m in linears.items() if m.out_features % ROWS or m.in_features % COLUMNS] if dtype == "nf4" else []
    if odd:
        say(f"{len(odd)} layers, such as {odd[0]}, stay in 16 bits: bitsandbytes' kernel for CPUs has no such sizes")
    skip = sorted({*get_keys_to_not_convert(model), *odd})
    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )  # fmt: skip


TARGET = Target("a model directory", (*OF_MODEL, *BY_BITSANDBYTES, *BY_COMPRESSOR), _write)
