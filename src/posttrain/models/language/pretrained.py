"""Causal language models of transformers, from files to memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from posttrain.console import say
from posttrain.errors import UserError, reading
from posttrain.models.checkpoints.files import Checkpoint
from posttrain.models.checkpoints.held import load_as_held, settle_held
from posttrain.models.checkpoints.part import Wanted, in_part, names_in_model
from posttrain.models.checkpoints.stored import as_stored, settle_stored
from posttrain.models.hub import resolve
from posttrain.models.language.architecture import config_of, model_class
from posttrain.models.language.completeness import Gaps
from posttrain.models.quantization import keep_as_quantized
from posttrain.runs.artifact import is_classifier

Loading = (
    BitsAndBytesConfig | Literal["dequantize"] | None
)  # how a base is held; None: as its checkpoint has it, where that can be
Unexpected = Literal["refuse", "say"]


def load_causal(
    name: str, revision: str | None, dtype: str, device: str, code: str | None, quantization: Loading,
    unexpected: Unexpected = "refuse", wanted: Wanted | None = None, stored: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """Model on `device`, all weights trainable unless quantized; UserError naming the field for what cannot be loaded, and where
    not all weights are in the files.

    dtype: float32 | bfloat16 | float16. code: as `may_run_code` takes it. unexpected: what becomes of tensors that the
    model has no place for. wanted: of weights by their names in the model; the others stay on the meta device. stored: weights
    that lie plain in their files keep the format that they have there, and are mapped (checkpoints/stored.py).
    """
    source = resolve(name, revision)
    model, info = _load(source.directory, name, getattr(torch, dtype), device, code, quantization, wanted, stored)
    Gaps.of(model, info, is_classifier(source.directory)).check(name, unexpected)
    keep_as_quantized(model)
    # a pad token that is also an end token would otherwise get no gradient in the embedding
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "padding_idx"):
        embedding.padding_idx = None
    return model


def check_whole(directory: Path, name: str, code: str | None, unexpected: Unexpected) -> None:
    """As `load_causal`, where weights are missing or have another shape, without reading one: by the files' headers alone."""
    try:
        model, info = _load(directory, name, torch.float32, "meta", code, None)
    except NotImplementedError:  # a class of others may compute at its making, which needs numbers: it is told at the load
        return
    Gaps.of(model, info, is_classifier(directory)).check(name, unexpected)


def without_values(directory: Path) -> PreTrainedModel | None:
    """The model on the meta device, which knows by what names its weights lie in its files; None where it cannot be had so."""
    try:
        return _load(directory, str(directory), torch.float32, "meta", None, None)[0]
    except (NotImplementedError, UserError):
        return None


def _load(
    directory: Path, name: str, dtype: torch.dtype, device: str, code: str | None, quantization: Loading,
    wanted: Wanted | None = None, stored: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:  # fmt: skip
    """The model, and what transformers says of keys. Raises UserError."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what is not as it should be is an error of ours
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        what = f"model.name: '{name}' cannot be loaded as a causal language model"
        with reading(what, "give the whole checkpoint, as save_pretrained writes it", (NotImplementedError,)):
            checkpoint = Checkpoint(directory)
            config = config_of(directory, code)
            kept = device != "meta" and checkpoint.format is not None and checkpoint.format.keeps(_quant(quantization))
            if kept and checkpoint.format and checkpoint.format.by_numbers:
                return _held(directory, config, code, options | {"state_dict": checkpoint.state(None)})
            if kept and checkpoint.format:
                compute = getattr(quantization, "bnb_4bit_compute_dtype", dtype)
                settings = {**checkpoint.format.settings, "bnb_4bit_compute_dtype": str(compute).removeprefix("torch.")}
                config.quantization_config = settings
                return _of_files(directory, config, code, options)
            if isinstance(quantization, BitsAndBytesConfig):
                options["quantization_config"] = quantization
            if wanted is not None:
                _forget_format(config)
                state = in_part(checkpoint.state(dtype), _targets(directory), wanted)
                return _of_state(directory, config, code, options | {"state_dict": state})
            if stored and checkpoint.format is None:
                found = _of_state(directory, config, code, options | {"state_dict": as_stored(checkpoint.state(None))})
                settle_stored(found[0])
                return found
            if checkpoint.format is None and device != "meta":
                return _of_files(directory, config, code, options)
            _forget_format(config)
            state = checkpoint.shapes() if device == "meta" else checkpoint.state(dtype)
            return _of_state(directory, config, code, options | {"state_dict": state})
    finally:
        logging.set_verbosity(before)


@lru_cache
def _targets(directory: Path) -> dict[str, str]:
    """By a weight's name in the files, that in the model. Raises UserError where it cannot be told."""
    model = without_values(directory)
    if model is None:
        raise UserError("train.offload: which of the model's weights belong to a layer cannot be told; say train.offload=none")
    return names_in_model(model, Checkpoint(directory).state(None))


def _quant(quantization: Loading) -> str:
    """The `quant.method` that it comes from."""
    if quantization is None or isinstance(quantization, str):
        return quantization or "none"
    return quantization.bnb_4bit_quant_type if quantization.load_in_4bit else "int8"


def _of_files(directory: Path, config: Any, code: str | None, options: dict[str, Any]) -> Any:
    return model_class(config).from_pretrained(
        directory, config=config, trust_remote_code=code is not None, use_safetensors=True, **options
    )


def _of_state(directory: Path, config: Any, code: str | None, options: dict[str, Any]) -> Any:
    """From tensors in place of files, of the class that transformers would take for the directory."""
    with torch.device("meta"):
        kind = type(model_class(config).from_config(config, trust_remote_code=code is not None))
    found: Any = kind.from_pretrained(None, config=config, **options)
    model, info = found
    model.name_or_path = str(directory)
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, info


def _held(directory: Path, config: Any, code: str | None, options: dict[str, Any]) -> Any:
    """With its quantized weights as they are."""
    _forget_format(config)
    load_as_held(config)
    model, info = _of_state(directory, config, code, options)
    if dequantized := settle_held(model, info):
        some = ", ".join(dequantized[:2]) + (", ..." if len(dequantized) > 2 else "")
        say(f"{len(dequantized)} quantized weights are dequantized at load, for they cannot be held as they are: {some}")
    return model, info


def _forget_format(config: Any) -> None:
    """What is loaded is dequantized on the way."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
