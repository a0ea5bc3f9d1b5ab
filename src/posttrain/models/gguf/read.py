"""A GGUF file as a model of transformers, to hold what was written against the model that it was written of."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType, dequantize, get_tensor_name_map
from torch import Tensor

from posttrain.errors import RunError
from posttrain.models.gguf.changes import change_of
from posttrain.models.gguf.families import FAMILIES, figures_of
from posttrain.models.gguf.vocabulary import Vocabulary

OTHERS = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text", "phi3")  # that transformers' reader has


def load_gguf(file: Path, config: Any) -> Any:
    """The model, float32, in evaluation mode: by transformers' own reader where it knows the family, so that what is written is
    held against someone else's; else by ours. config: of transformers, of the model that was written.

    Raises RunError where the file's figures are not the model's, or a tensor is not there.
    """
    check_figures(file, config)
    if config.model_type not in OTHERS:
        return read_gguf(file, config)
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # transformers' bar of the conversion listens to no setting
        made = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype=torch.float32)
    return made.eval()


def check_figures(file: Path, config: Any) -> None:
    """Raises RunError where the file says another shape than the model has."""
    fields = GGUFReader(file).fields
    for key, want in figures_of(config).items():
        found: Any = fields[key].contents() if key in fields else None
        if found is None or abs(found - want) > 1e-6 * abs(want):
            raise RunError(f"{file.name} says {key} {found}, and the model has {want}")


def read_gguf(file: Path, config: Any) -> Any:
    """As `load_gguf`, by the gguf package's names of tensors, its dequantizers, and the inverse of what the family needs."""
    from transformers import AutoModelForCausalLM

    family = FAMILIES[config.model_type]
    changes = family.changes(config)
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    there = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set[str]()

    def tensor(name: str) -> Tensor:
        place = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        if place not in there:
            raise RunError(f"{file.name} has no {name}")
        found = torch.from_numpy(dequantize(there[place].data, there[place].tensor_type).copy())
        return change_of(name, changes).back(found)

    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name in tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            both = [tensor(name.replace("gate_up_proj", part)) for part in ("gate_proj.weight", "up_proj.weight")]
            state[name] = torch.cat(both, dim=1)
        else:
            state[name] = tensor(f"{name}.weight" if name.endswith("experts.down_proj") else name)
    model.load_state_dict(state, strict=False)
    return model.eval()


def check_vocabulary(file: Path, expected: Vocabulary) -> None:
    """Raises RunError where the file's tokens, merges, template or stops are not those that were to be written."""
    fields = GGUFReader(file).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else None

    pieces = expected.pieces
    wanted = {
        "ggml.model": "llama" if pieces else "gpt2", "ggml.scores": pieces.scores if pieces else None,
        "ggml.add_space_prefix": expected.prefix if pieces else None, "ggml.unknown_token_id": expected.unk if pieces else None,
        "ggml.add_eos_token": expected.close,
        "ggml.tokens": expected.texts, "ggml.token_type": expected.kinds, "ggml.merges": expected.merges or None,
        "ggml.pre": expected.rule, "chat_template": expected.template or None, "ggml.eos_token_id": expected.ends[0],
        "ggml.add_bos_token": expected.begin, **{key.removeprefix("tokenizer."): end for key, end in expected.others.items()},
    }  # fmt: skip
    for key, want in wanted.items():
        if value(key) != want:
            raise RunError(f"{file.name} does not hold what was written at tokenizer.{key}; is the disk sound?")
    if any(expected.kinds[i] == int(TokenType.UNUSED) for i in expected.ends):
        raise RunError(f"{file.name} stops at a row that no token has")
