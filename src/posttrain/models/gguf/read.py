"""A GGUF file as a model of transformers, by transformers' own reader, so that what is written is held against someone else's."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType

from posttrain.errors import RunError
from posttrain.models.gguf.vocabulary import Vocabulary

SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def load_gguf(file: Path, config: Any) -> Any:
    """The model, float32, in evaluation mode. config: of transformers, of the model that was written.

    Raises RunError where the file's metadata say another shape.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    found = load_gguf_checkpoint(str(file))["config"]
    for key in SHAPE:
        if found[key] != getattr(config, key):
            raise RunError(f"{file.name} says {key} {found[key]}, and the model has {getattr(config, key)}")
    if abs(found["rms_norm_eps"] / config.rms_norm_eps - 1) > 1e-6:
        raise RunError(f"{file.name} says rms_norm_eps {found['rms_norm_eps']}, and the model has {config.rms_norm_eps}")
    with redirect_stderr(io.StringIO()):  # transformers' bar of the conversion listens to no setting
        made = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    return made.eval()


def check_vocabulary(file: Path, expected: Vocabulary) -> None:
    """Raises RunError where the file's tokens, merges, template or stops are not those that were to be written."""
    fields = GGUFReader(file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    wanted = {
        "ggml.tokens": expected.texts, "ggml.token_type": expected.kinds, "ggml.merges": expected.merges,
        "ggml.pre": expected.rule, "chat_template": expected.template or None, "ggml.eos_token_id": expected.ends[0],
        "ggml.eot_token_id": expected.ends[1] if len(expected.ends) > 1 else None, "ggml.add_bos_token": expected.begin,
    }  # fmt: skip
    for key, want in wanted.items():
        if value(key) != want:
            raise RunError(f"{file.name} does not hold what was written at tokenizer.{key}; is the disk sound?")
    if any(expected.kinds[i] == int(TokenType.UNUSED) for i in expected.ends):
        raise RunError(f"{file.name} stops at a row that no token has")
