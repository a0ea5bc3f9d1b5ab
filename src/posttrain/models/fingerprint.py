"""What beside the weights decides what a model computes: its config, the tokens at which it stops, its tokenizer.

Left out is all that changes no number: who has written a file and with which version, the dtype of the files (`model.dtype` says
in which a model is loaded), what a call returns, names of labels. A chat template has a hash of its own, with the tokenizer's.
How a model is sampled from is the run's to say, so that of generation_config.json the tokens count alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

FORM = 1  # to be raised when `function_of` reads files otherwise
NEUTRAL = {
    "transformers_version", "_diffusers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "_commit_hash",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation",
    "_attn_implementation_autoset", "attn_implementation", "id2label", "label2id", "problem_type", "task_specific_params",
    "finetuning_task",
}  # fmt: skip
TOKENIZER = {  # of tokenizer_config.json, what makes other tokens of the same text
    "bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space", "tokenizer_class",
    "do_lower_case",
}  # fmt: skip
VOCABULARIES = ("*.model", "vocab.json", "vocab.txt", "merges.txt")  # of a tokenizer that has no tokenizer.json
CONFIGS = ("config.json", "model_index.json", "scheduler_config.json")
INDEX = "model_index.json"  # of a diffusion pipeline, whose parts have a folder each


def function_files(directory: Path) -> list[Path]:
    """The files that `function_of` reads."""
    folders = [directory, *(sorted(directory.glob("*/")) if (directory / INDEX).is_file() else [])]
    names = (*CONFIGS, "generation_config.json", "tokenizer.json", "tokenizer_config.json", *VOCABULARIES, "*.py")
    return [file for folder in folders for name in names for file in sorted(folder.glob(name))]


def function_of(directory: Path) -> str:
    """A hash of it; the same for files that mean the same."""
    parts = {str(file.relative_to(directory)): _content(file) for file in function_files(directory)}
    text = json.dumps({name: value for name, value in parts.items() if value}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(file: Path) -> Any:
    if file.name in CONFIGS:
        return _without(_read(file), NEUTRAL)
    if file.name == "generation_config.json":
        return {key: sorted(_list(value)) for key, value in _read(file).items() if key == "eos_token_id" and value is not None}
    if file.name == "tokenizer.json":
        return _without(_read(file), {"truncation", "padding"})
    if file.name == "tokenizer_config.json":
        return {key: _text_of(value) for key, value in _read(file).items() if key in TOKENIZER and value not in (None, False)}
    is_used = file.suffix == ".py" or not (file.parent / "tokenizer.json").is_file()
    return hashlib.sha256(file.read_bytes()).hexdigest() if is_used else None


def _read(file: Path) -> dict[str, Any]:
    """Empty for what is no JSON: who reads it for more says so."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _without(value: Any, names: set[str]) -> Any:
    """Without these keys and without nulls, at any depth; `architectures` in an order of its own."""
    if isinstance(value, dict):
        kept = {key: each for key, each in cast("dict[str, Any]", value).items() if key not in names and each is not None}
        return {
            key: sorted(each, key=str) if key == "architectures" and isinstance(each, list) else _without(each, names)
            for key, each in kept.items()
        }
    return [_without(each, names) for each in cast("list[Any]", value)] if isinstance(value, list) else value


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else [value]


def _text_of(token: Any) -> Any:
    """A token may stand there with how it is matched."""
    return cast("dict[str, Any]", token).get("content") if isinstance(token, dict) else token
