"""Prompt methods in packs: every document gives what plain peft gives for it alone, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from posttrain.batch import PackedBatch, Segment
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.soft_prompts import insert_virtual

V = 61
SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
DOCUMENTS = [[5, 6, 7, 8, 9, 10], [13, 14, 15]]
PROMPT, ANSWERS = [20, 21, 22], [[30, 31, 32, 33], [40, 41]]


def make(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        small: dict[str, Any] = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**small, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if family == "mistral":  # a window shorter than prefix and document together
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6))
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def batch() -> PackedBatch:
    tokens = [*DOCUMENTS[0], *DOCUMENTS[1], *PROMPT, *ANSWERS[0], *ANSWERS[1]]
    segments = (Segment(0, 6), Segment(6, 9), Segment(9, 12), Segment(12, 16, 9, 12), Segment(16, 18, 9, 12))
    positions = [*range(6), *range(3), *range(7), *range(3, 5)]
    source = [*range(5), 6, 7, 11, 12, 13, 14, 11, 16]
    target = [tokens[i + 1] for i in [*range(5), 6, 7]] + ANSWERS[0] + ANSWERS[1]
    owner = [0] * 5 + [1] * 2 + [2] * 4 + [3] * 2
    n = len(source)
    return PackedBatch(
        torch.tensor([tokens]), torch.tensor([positions]), segments, torch.tensor(source), torch.tensor(target),
        torch.ones(n), torch.tensor(owner), torch.zeros(0, dtype=torch.int64), 4, (0, 1, 2, 3), float(n),
    )  # fmt: skip


ALONE = [(DOCUMENTS[0], 5), (DOCUMENTS[1], 2), ([*PROMPT, *ANSWERS[0]], 4), ([*PROMPT, *ANSWERS[1]], 2)]


@pytest.mark.parametrize("attention", ["documents", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("name", ["prefix", "prompt", "ptuning"])
def test_a_pack_equals_plain_peft(name: str, family: str, attention: str) -> None:
    words = [f"peft={name}", "peft.length=4", *(["peft.hidden=16"] if name == "ptuning" else [])]
    model: Any = add_method(make(family), typed_config(compose_run("sft", words)).peft)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.5)
    chooses = torch.randn(13, generator=torch.Generator().manual_seed(2))
    wanted = []
    for sequence, count in ALONE:
        logps = model(input_ids=torch.tensor([sequence])).logits[0].float().log_softmax(-1)
        wanted.append(logps[-count - 1 : -1].gather(1, torch.tensor(sequence[-count:])[:, None])[:, 0])
    (torch.cat(wanted) * chooses).sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got = PackedLM(model, attention).train()(batch())
    torch.testing.assert_close(got, torch.cat(wanted), rtol=0, atol=2e-5)
    (got * chooses).sum().backward()
    have = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert have.keys() == want.keys() and have
    for n, gradient in want.items():
        torch.testing.assert_close(have[n], gradient, rtol=1e-4, atol=2e-5 * max(1.0, float(gradient.abs().max())))


def test_without_its_prompt_the_model_is_the_base() -> None:
    words = ["peft=prompt", "peft.length=4"]
    lm = PackedLM(add_method(make("llama"), typed_config(compose_run("sft", words)).peft), "documents")
    bare = PackedLM(make("llama"), "documents")
    with torch.no_grad(), lm.without_prompt():
        assert torch.equal(lm(batch()), bare(batch()))
        inside = lm(batch())
    with torch.no_grad():
        assert not torch.equal(lm(batch()), inside)


def test_where_virtual_tokens_go() -> None:
    """Two before each document; the answers move with their prompt and see its virtual tokens."""
    layout = insert_virtual((Segment(0, 2), Segment(2, 4), Segment(4, 5, 2, 4)), torch.tensor([[0, 1, 0, 1, 2]]), 2)
    assert layout.segments == (Segment(0, 4), Segment(4, 8), Segment(8, 9, 4, 8))
    assert layout.token.tolist() == [2, 3, 6, 7, 8] and layout.virtual.tolist() == [0, 1, 4, 5]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
