"""What two texts have in common is tokenised once; nobody may see a difference, whatever the tokenizer."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.chat.tokenize import Tokeniser, shared_length

WORDS = ["the dog", " ", "\n", "fox", "<|a|>", "<|b|>", "<|b|", "x", "日本", "é", "ＡＢ", "  two", "word", "<|a|><|b|>"]


def tokenizer_of(kind: str, special: list[AddedToken]) -> Any:
    """Three ways in which a text's beginning is treated apart: byte-level, a space put before all, or before the first."""
    if kind == "byte-level":
        backend, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    else:
        backend, alphabet = Tokenizer(models.BPE(unk_token="?")), ["?", *set("".join(WORDS))]
        backend.normalizer = normalizers.NFKC()  # type: ignore[assignment]
        scheme = kind.removeprefix("metaspace-")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["?"], show_progress=False)
    backend.train_from_iterator(["the dog and the fox", "two words, one word, the dog"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": special})  # pyright: ignore[reportArgumentType]
    return tokenizer


def special(text: str, **how: bool) -> AddedToken:
    return AddedToken(text, **({"normalized": False, "special": True} | how))


SPECIAL = {
    "plain": [special("<|a|>"), special("<|b|>")],
    "stripping": [special("<|a|>", lstrip=True), special("<|b|>", rstrip=True)],
    "one within another": [special("<|a|>"), special("<|b|>"), special("<|a|><|b|>")],
    "of words, normalised": [special("word", single_word=True), special("<|a|>", normalized=True), special("<|b|>")],
}


@pytest.mark.parametrize("kind", ["byte-level", "metaspace-first", "metaspace-always", "metaspace-never"])
@pytest.mark.parametrize("name", SPECIAL)
def test_pairs_are_what_each_text_is_alone(kind, name):
    tokeniser = Tokeniser(tokenizer_of(kind, SPECIAL[name]))
    drawn = random.Random(7)
    texts = []
    for _ in range(400):
        same, *ends = ("".join(drawn.choices(WORDS, k=drawn.randint(0, 8))) for _ in range(3))
        texts.append((same + ends[0], same + ends[1]))
    alone = list(zip(*(list(tokeniser.tokens([pair[i] for pair in texts])) for i in range(2)), strict=True))
    assert list(tokeniser.pairs(texts)) == alone
    assert tokeniser.ids([first for first, _ in texts]) == [first.ids for first, _ in alone]


def test_a_shared_prompt_is_tokenised_once(monkeypatch):
    tokeniser = Tokeniser(tokenizer_of("byte-level", SPECIAL["plain"]))
    seen, encoded = [], tokeniser._encoded
    monkeypatch.setattr(tokeniser, "_encoded", lambda texts: seen.extend(texts) or encoded(texts))
    list(tokeniser.pairs([("<|a|>the dog<|b|>the fox", "<|a|>the dog<|b|>x"), ("the dog", "the fox")]))
    assert seen == ["<|a|>the dog<|b|>the fox", "the dog", "<|b|>x", "the fox"]


@pytest.mark.parametrize(("first", "second", "length"), [("", "x", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("abc", "ab", 2)])
def test_shared_length(first, second, length):
    assert shared_length(first, second) == length
