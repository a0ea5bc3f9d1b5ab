"""Byte-level vocabularies: how llama.cpp cuts texts, and what of a tokenizer it has no place for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tests.models.gguf.test_gguf import made
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.errors import UserError
from posttrain.models.builtin import tiny_tokenizer
from posttrain.models.gguf.read import check_vocabulary
from posttrain.models.gguf.texts import check_texts, cutter_of
from posttrain.models.gguf.vocabulary import RULES, vocabulary_of
from posttrain.models.gguf.write import write_gguf


def built(parts: tuple[tuple[str, Any], ...]) -> list[Any]:
    kinds = {
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "Digits": lambda alone: pre_tokenizers.Digits(individual_digits=alone),
        "Split": lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated"),
        "Punctuation": lambda behavior: pre_tokenizers.Punctuation(behavior.lower()),
    }
    return [kinds[kind](value) for kind, value in parts]


def cut_by(parts: list[Any], ignore_merges: bool = False) -> Any:
    """The built-in tokenizer with other rules."""
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


@pytest.mark.parametrize(("key", "name"), RULES.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_rule_is_known_by_what_it_does(key: Any, name: str) -> None:
    tokenizer = cut_by(built(key[0]), key[1])
    vocabulary = vocabulary_of(tokenizer, [2], 896)
    assert vocabulary.rule == name
    assert check_texts(cutter_of(vocabulary, tokenizer), tokenizer, vocabulary) == ""


@pytest.mark.parametrize(
    ("parts", "ignore_merges"),
    [
        (built((("ByteLevel", True),)), True),
        (built((("Punctuation", "Isolated"), ("ByteLevel", True), ("Digits", False), ("Split", "[0-9][0-9][0-9]"))), False),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], False),
    ],
)
def test_a_rule_that_is_nearly_one_is_refused(parts: list[Any], ignore_merges: bool) -> None:
    with pytest.raises(UserError, match=r"\(gpt-2, smollm, qwen2, llama-bpe, dbrx, tekken, gpt-4o, falcon are\)"):
        vocabulary_of(cut_by(parts, ignore_merges), [2], 896)


@pytest.mark.parametrize("how", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_a_token_that_takes_white_space_is_seen(how: dict[str, bool]) -> None:
    """llama.cpp takes none in such a vocabulary."""
    tokenizer = tiny_tokenizer()
    tokens: Any = [AddedToken("<tool>", normalized=False, special=True, **how)]
    tokenizer.add_tokens(tokens)
    vocabulary = vocabulary_of(tokenizer, [2], 896)
    with pytest.raises(UserError, match=r"llama\.cpp would cut '.*<tool>.*' as .*--to hf writes any"):
        check_texts(cutter_of(vocabulary, tokenizer), tokenizer, vocabulary)


def test_nfc_is_said_with_a_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    vocabulary = vocabulary_of(tokenizer, [2], 896)
    told = check_texts(cutter_of(vocabulary, tokenizer), tokenizer, vocabulary)
    assert told.startswith("GGUF has no place for this tokenizer's NFC") and "in two" in told and "\n" not in told
    assert vocabulary.composes and not vocabulary_of(tiny_tokenizer(), [2], 896).composes


def test_added_tokens_without_a_row_are_left_out_and_others_refused(tmp_path: Path) -> None:
    """As Gemma 3's token for pictures in its models of text alone."""
    tokenizer, model = tiny_tokenizer(), made(tmp_path, "llama", vocab_size=len(tiny_tokenizer()))
    tokens: Any = [AddedToken("<image>", special=True)]
    tokenizer.add_tokens(tokens)
    vocabulary = vocabulary_of(tokenizer, [2], model.config.vocab_size)
    assert vocabulary.beyond == ["<image>"] and len(vocabulary.texts) == model.config.vocab_size
    write_gguf(tmp_path, model.config, vocabulary, "f32", tmp_path / "m.gguf", "m")
    check_vocabulary(tmp_path / "m.gguf", vocabulary)
    with pytest.raises(UserError, match=r"token '.*' has id 700, and the model has 700 rows for tokens"):
        vocabulary_of(tokenizer, [2], 700)


def test_three_stop_tokens_have_a_place(tmp_path: Path) -> None:
    """Llama 3.1 and GLM-4 have three: eos, end of turn and end of message."""
    model = made(tmp_path, "llama")
    vocabulary = vocabulary_of(tiny_tokenizer(), [2, 0, 1, 5], 896)
    write_gguf(tmp_path, model.config, vocabulary, "f32", tmp_path / "m.gguf", "m")
    check_vocabulary(tmp_path / "m.gguf", vocabulary)
    fields = GGUFReader(tmp_path / "m.gguf").fields
    assert [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot", "eom")] == [2, 0, 1]
    assert len(vocabulary.ends) - 1 - len(vocabulary.others) == 1


def test_of_several_templates_the_default_is_written() -> None:
    tokenizer = tiny_tokenizer()
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": "{{ 'tools' }}"}
    assert vocabulary_of(tokenizer, [2], 896).template == plain


def test_a_template_that_takes_no_such_conversation_is_no_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    vocabulary = vocabulary_of(tokenizer, [2], 896)
    assert check_texts(cutter_of(vocabulary, tokenizer), tokenizer, vocabulary) == ""
