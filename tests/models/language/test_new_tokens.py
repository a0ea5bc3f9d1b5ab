"""Tokens that a run adds: their ids, where their rows begin, and how large the embedding becomes. Worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from posttrain.config.compose import compose
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.builtin import tiny_tokenizer
from posttrain.models.language.new_tokens import NewToken, add_tokens, embedding_rows, give_rows, line_of, trained_tokens

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
TEXTS = ["<|tool|>", "zebra crossing", "<|im_end|>"]


def model_of(rows: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **SIZES))


def test_a_text_becomes_one_token_and_begins_as_its_pieces() -> None:
    tokenizer = tiny_tokenizer()
    size, end = len(tokenizer), tokenizer.get_vocab()["<|im_end|>"]
    spelt = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    assert len(spelt[0]) > 3 and len(spelt[1]) > 3
    tokens = add_tokens(tokenizer, TEXTS, size)
    assert tokens == [NewToken(TEXTS[0], size, spelt[0]), NewToken(TEXTS[1], size + 1, spelt[1]), NewToken(TEXTS[2], end, ())]
    ids = tokenizer.encode("a zebra crossing<|tool|>", add_special_tokens=False)
    assert ids[-2:] == [size + 1, size] and tokenizer.decode(ids, skip_special_tokens=True) == "a zebra crossing"
    assert line_of(tokens, size + 1) == (
        "model.add_tokens, in the embedding: 1 new rows, 1 rows that no token had, 1 rows that are trained from where they are"
    )


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_and_add_tokens_is_the_way_out() -> None:
    """A tokenizer that already has the token says how it was spelt before."""
    tokenizer, rows = tiny_tokenizer(), len(tiny_tokenizer())
    tokenizer.add_tokens(["zebra", "yak"])
    with pytest.raises(UserError, match=r"2 tokens more than the embedding's [\d,]+ rows \(zebra, yak\); .*model.add_tokens="):
        add_tokens(tokenizer, [], rows)
    with pytest.raises(UserError, match=r"1 tokens more than .*\(yak\)"):
        add_tokens(tokenizer, ["zebra"], rows)
    found = add_tokens(tokenizer, ["yak", "zebra"], rows)
    plain = tiny_tokenizer()
    assert [token.pieces for token in found] == [tuple(plain.encode(text)) for text in ("yak", "zebra")]
    assert [token.id for token in found] == [rows + 1, rows]
    with pytest.raises(UserError, match="'' is spelt with no token"):
        add_tokens(tokenizer, ["yak", "zebra", ""], rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("new", "size"), [(40, 41), (30, 40)])
def test_a_row_is_the_mean_of_its_pieces_and_the_embedding_grows_only_where_it_must(new: int, size: int, tied: bool) -> None:
    model = model_of(40, tied)
    words, head = (layer.weight.detach().clone() for layer in (model.model.embed_tokens, model.lm_head))
    give_rows(model, [NewToken("a", new, (3, 5, 5)), NewToken("b", 7, ())])
    assert trained_tokens(model) == [7, new]
    for layer, before in ((model.model.embed_tokens, words), (model.lm_head, head)):
        assert layer.weight.shape == (size, 16) and model.config.vocab_size == size
        assert torch.allclose(layer.weight[new], (before[3] + 2 * before[5]) / 3, atol=1e-7)
        others = [i for i in range(40) if i != new]
        assert torch.equal(layer.weight[others], before[others])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_rows_are_counted_before_weights_are_loaded() -> None:
    assert embedding_rows(LlamaConfig(vocab_size=40, **SIZES), 40) == 40
    assert embedding_rows(LlamaConfig(vocab_size=40, **SIZES), 41) == 40
    layers = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "head_dim": 8, "num_kv_shared_layers": 0}
    with pytest.raises(UserError, match="has an embedding for its layers too"):
        embedding_rows(Gemma4TextConfig(vocab_size=40, **layers, **SIZES), None)


def test_a_method_that_trains_no_rows_is_refused_by_the_config() -> None:
    for words, message in (
        (["peft=prompt"], "peft=prompt trains no rows of the embedding; use one of dora, lora"),
        (["peft=lora", "train.fsdp=true"], "train.fsdp does not shard rows of the embedding"),
        (["peft=lora", "model.add_tokens=[a,a]"], "each token must be a text of its own"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            typed_config(compose("sft", ["model=tiny", "model.add_tokens=[zebra]", *words]))
