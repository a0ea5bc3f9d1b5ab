"""Answers sampled from a policy, with a key-value cache. Only the logits of the newest token ever exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from posttrain.batch import Segment
from posttrain.models.kernels.choice import for_inference
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.kv_cache import roomy_cache
from posttrain.models.language.packed_lm import PackedLM


class Answer(NamedTuple):
    """tokens: with the end token where `ended`. logps: of each token under the whole softmax at the temperature, before top-k
    and top-p. entropy: of that softmax, its mean over the tokens, in nats."""

    tokens: list[int]
    logps: list[float]
    ended: bool
    entropy: float


@dataclass(frozen=True)
class Sampling:
    """top_k 0 and top_p 1 cut nothing off. at_once: answers that grow together."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    at_once: int

    def allowed(self, logps: Tensor) -> Tensor:
        """float32 [n, V] -> the probabilities of the tokens that top-k and top-p keep, and 0 for the others."""
        cut: Any = LogitsProcessorList()
        if self.top_k:
            cut.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            cut.append(TopPLogitsWarper(self.top_p))
        return cut(None, logps).exp()


def draw(chances: Tensor) -> Tensor:
    """float32 [n, V], rows that need not add up to 1 -> int64 [n, 1], with one of torch's global random numbers for each row.

    The number drawn is above 0 and at most the row's sum; the token is the first one at which the cumulative sum reaches it. So a
    token of probability 0 is never drawn.
    """
    sums = chances.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, sums[:, -1:] * (1 - torch.rand_like(sums[:, :1])))


@torch.no_grad()
def sample(
    lm: PackedLM, prompts: Sequence[Sequence[int]], samples: int, sampling: Sampling, ends: Sequence[int]
) -> list[list[Answer]]:
    """`samples` answers to each prompt, by torch's global random numbers. Prompts of like length are read together, each once."""
    lm.eval()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, sampling.at_once // samples)
    found: dict[int, list[Answer]] = {}
    with for_inference(lm, lm.report.kernels):
        for start in range(0, len(prompts), size):
            chosen = by_length[start : start + size]
            answers = _together(lm, [prompts[i] for i in chosen], samples, sampling, torch.tensor(ends))
            found |= {i: answers[k * samples : (k + 1) * samples] for k, i in enumerate(chosen)}
    return [found[i] for i in range(len(prompts))]


def _together(lm: PackedLM, prompts: list[Sequence[int]], samples: int, sampling: Sampling, ends: Tensor) -> list[Answer]:
    device = lm.causal.device
    decoder: Any = lm.causal.get_decoder()
    output: Any = lm.causal.get_output_embeddings()
    head, cache = lm.head.at(sampling.temperature), roomy_cache(lm.causal.config)
    hidden = _read_prompts(lm, prompts, cache)
    cache.batch_repeat_interleave(samples)  # answers to one prompt share its keys and values up to here
    hidden = hidden.repeat_interleave(samples, 0)
    positions = torch.tensor([len(prompt) for prompt in prompts for _ in range(samples)], device=device)
    width = int(positions.max())
    mask = (torch.arange(width, device=device) >= width - positions[:, None]).long()
    growing = torch.arange(len(hidden))  # which answer each row of the batch is
    alive = torch.ones(len(hidden), dtype=torch.bool)
    drawn: list[list[tuple[int, float, float]]] = [[] for _ in range(len(hidden))]
    for step in range(sampling.max_new_tokens):
        logps = head.shaped(output(hidden).float()).log_softmax(-1)
        choice = draw(sampling.allowed(logps))
        figures = torch.cat([choice, logps.gather(1, choice), -(logps.exp() * logps).sum(-1, keepdim=True)], 1).double().cpu()
        for row in alive.nonzero()[:, 0].tolist():
            token, logp, entropy = figures[row].tolist()
            drawn[int(growing[row])].append((int(token), logp, entropy))
        alive &= ~torch.isin(choice[:, 0].cpu(), ends)
        if not alive.any() or step + 1 == sampling.max_new_tokens:
            break
        if 4 * int(alive.sum()) <= 3 * len(alive):  # the cache is copied then: not for every answer that ends
            kept = alive.nonzero()[:, 0]
            growing, alive, kept = growing[kept], alive[kept], kept.to(device)
            choice, mask, positions = choice[kept], mask[kept], positions[kept]
            cache.batch_select_indices(kept)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        read = decoder(
            input_ids=choice, attention_mask=mask, position_ids=positions[:, None], past_key_values=cache, use_cache=True
        )
        hidden, positions = read.last_hidden_state[:, -1], positions + 1
    return [_answer(steps, ends) for steps in drawn]


def _read_prompts(lm: PackedLM, prompts: Sequence[Sequence[int]], cache: Cache) -> Tensor:
    """Last hidden state of every prompt [n, H], read as one pack; their keys and values, each at the end of a row, in `cache`.

    What stands before a shorter prompt is a copy of its first token's, for a mask to leave out.
    """
    device, lengths = lm.causal.device, torch.tensor([len(prompt) for prompt in prompts])
    stops = lengths.cumsum(0)
    segments = [Segment(stop - length, stop) for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)]
    tokens = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None].to(device)
    packed = DynamicCache()
    hidden = lm.hidden(positions, DocumentMask(segments, tokens.shape[1], device), packed, input_ids=tokens)
    backwards = torch.arange(int(lengths.max()), 0, -1)
    place = (stops[:, None] - torch.minimum(backwards, lengths[:, None])).to(device)
    layer: Any
    for number, layer in enumerate(packed.layers):
        if layer.is_initialized:  # one that shares another's keys has none
            keys, values = (x[0][:, place].transpose(0, 1) for x in (layer.keys, layer.values))
            cache.update(keys, values, number)
            layer.reset()
    return hidden[(stops - 1).to(device)]


def _answer(steps: list[tuple[int, float, float]], ends: Tensor) -> Answer:
    tokens, logps, entropies = (list(column) for column in zip(*steps, strict=True))
    return Answer(tokens, logps, tokens[-1] in ends.tolist(), sum(entropies) / len(entropies))
