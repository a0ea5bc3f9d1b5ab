"""Answers that are drawn with a cache, after prompts read in a pack, are what the model says in one pass."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from tests.models.kernels.test_fused import SHAPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MoshiConfig,
    MoshiForCausalLM,
    Qwen3Config,
)

from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.growing import _serves
from posttrain.models.language.packed_lm import PackedLM

FAMILIES = {
    "llama": (LlamaConfig(**SHAPE), "documents"),
    "qwen3": (Qwen3Config(**SHAPE, head_dim=16), "documents"),
    "mistral with a window": (MistralConfig(**SHAPE, sliding_window=6), "documents"),
    "gemma2: window, softcap": (Gemma2Config(**SHAPE, sliding_window=6, head_dim=16), "dense"),
    "gemma3: some layers with a window": (Gemma3TextConfig(**SHAPE, sliding_window=6, head_dim=16), "documents"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_with_the_cache_are_those_of_one_pass(family: str) -> None:
    """Prompts shorter and longer than the window, read in two groups; answers end at different steps."""
    config, attention = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 3  # far from even chances
    lm = PackedLM(model, attention)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(97, (n,), generator=generator).tolist() for n in (1, 13, 4, 9, 8)]
    ends = list(range(12))
    found = sample(lm, prompts, 3, Sampling(14, 0.7, 1.0, 0, 9), ends)
    assert [len(answers) for answers in found] == [3] * 5
    assert len({len(answer.tokens) for answers in found for answer in answers}) > 3
    for prompt, answers in zip(prompts, found, strict=True):
        for answer in answers:
            assert answer.ended == (answer.tokens[-1] in ends) and not set(answer.tokens[:-1]) & set(ends)
            assert len(answer.tokens) <= 14
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer.tokens]), use_cache=False).logits[0].float() / 0.7
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logps.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert answer.logps == pytest.approx(expected.tolist(), abs=1e-4)
            assert answer.entropy == pytest.approx(float(-(logps.exp() * logps).sum(-1).mean()), abs=1e-4)


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    """Of chances 0.5, 0.3, 0.15, 0.05: the two likeliest, or those that are needed for 0.9 of all."""
    logps = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    rest = {"max_new_tokens": 1, "temperature": 1.0, "at_once": 1}
    cut = [Sampling(**rest, top_p=1.0, top_k=2), Sampling(**rest, top_p=0.9, top_k=0), Sampling(**rest, top_p=1.0, top_k=0)]
    expected = [[0.0, 0.5, 0.0, 0.3], [0.0, 0.5, 0.15, 0.3], [0.05, 0.5, 0.15, 0.3]]
    for sampling, chances in zip(cut, expected, strict=True):
        assert sampling.allowed(logps)[0].tolist() == pytest.approx(chances)


def test_greedy_answers_are_those_of_generate() -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    lm, prompts = PackedLM(model, "documents"), [[1, 5, 9, 4], [7, 3], [8, 8, 2, 6, 5, 4, 3]]
    for prompt, (answer,) in zip(prompts, sample(lm, prompts, 1, Sampling(9, 1.0, 1.0, 1, 2), ends=[11]), strict=True):
        theirs = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=11, pad_token_id=0
        )
        assert answer.tokens == theirs[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_cache_that_is_cut_to_a_window_which_the_attention_has_not_does_not_serve() -> None:
    """Moshi's config names a window of 12 tokens, by which the cache goes, and its layers see all."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    torch.manual_seed(0)
    model: Any = MoshiForCausalLM(
        MoshiConfig(**sizes, vocab_size=50, audio_vocab_size=8, sliding_window=12, num_codebooks=1)
    ).eval()
    for parameter in model.parameters():
        parameter.data *= 3
    assert not _serves(PackedLM(model), "past_key_values")


def test_a_seed_for_each_prompt_makes_answers_that_others_do_not_change() -> None:
    """Whatever is answered beside it, in whichever order, and however many at a time."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        parameter.data *= 3
    lm, prompts, seeds, ends = PackedLM(model, "documents"), [[1, 5, 9, 4], [7, 3], [8, 8, 2, 6, 5]], [11, 12, 13], [11]
    together = sample(lm, prompts, 2, Sampling(9, 1.0, 1.0, 0, 6), ends, seeds)
    for prompt, seed, answers in zip(reversed(prompts), reversed(seeds), reversed(together), strict=True):
        torch.rand(3)  # torch's own numbers are not asked
        (alone,) = sample(lm, [prompt], 2, Sampling(9, 1.0, 1.0, 0, 1), ends, [seed])
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in answers]
        assert alone[0].tokens != alone[1].tokens


def test_a_token_of_all_answers_is_one_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is brought to the host is counted, of what the model has computed (simulated: on a CPU)."""
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    lm, own, asked = PackedLM(model, "documents"), torch.Tensor.cpu, list[torch.Size]()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: asked.append(self.shape) or own(self))
    found = sample(lm, [[1, 5, 9, 4], [7, 3]], 3, Sampling(7, 1.0, 0.9, 0, 6), [96], seeds=[1, 2])
    assert max(len(answer.tokens) for answers in found for answer in answers) == 7
    assert len(asked) == 7 and {shape[1] for shape in asked} == {3}


def test_stop_texts_end_an_answer_and_stay_in_it() -> None:
    """Tokens are letters here; an answer that a text ends is the beginning of the one without it, by the same random numbers."""
    torch.manual_seed(0)
    lm = PackedLM(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), "documents")

    def decode(tokens: list[int]) -> str:
        return "".join("abcdefgh"[token % 8] for token in tokens)

    prompts, seeds, ends = [[1, 2], [3]], [7, 8], [96]
    plain = sample(lm, prompts, 8, Sampling(20, 1.0, 1.0, 0, 32), ends, seeds)
    stopped = sample(lm, prompts, 8, Sampling(20, 1.0, 1.0, 0, 32, ("ba", "h"), decode), ends, seeds)
    cut = 0
    for whole, answer in zip(chain(*plain), chain(*stopped), strict=True):
        text = decode(whole.tokens)
        places = [text.find(stop) + len(stop) for stop in ("ba", "h") if stop in text]
        length = min([*places, len(whole.tokens)])
        assert answer.tokens == whole.tokens[:length]
        assert answer.ended == (whole.ended or bool(places))
        cut += length < len(whole.tokens)
    assert cut >= 8


def test_log_probs_are_of_what_top_p_leaves() -> None:
    """The mean of p / q over the sampler's draws is the share of the softmax that is kept."""
    sampling = Sampling(1, 1.0, 0.6, 0, 1)
    logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert sampling.cuts and sampling.allowed(logps).tolist() == [pytest.approx([0.5, 0.3, 0.0])]
    torch.manual_seed(0)
    lm = PackedLM(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)), "documents")
    free, cut = (sample(lm, [[1, 2]], 64, Sampling(1, 1.0, p, 0, 64), [96], [3])[0] for p in (1.0, 0.5))
    known = {answer.tokens[0]: answer.logps[0] for answer in free}
    shared = [answer.logps[0] - known[answer.tokens[0]] for answer in cut if answer.tokens[0] in known]
    assert shared and max(shared) - min(shared) < 1e-4 and 0.6 < max(shared) < 0.75  # -log of a half, and a little more is kept
