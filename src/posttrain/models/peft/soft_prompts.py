"""Prompt methods in packs: soft tokens at the head of every document, or keys and values that every token attends to.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) and P-tuning (Liu et al. 2021, arXiv 2103.10385) learn embeddings of virtual
tokens; prefix tuning (Li & Liang 2021, arXiv 2101.00190; P-tuning v2, arXiv 2110.07602) learns k keys and values in every layer.
peft trains and stores them; here is only what a pack asks for: each document has them, and none sees another's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.batch import Segment
from posttrain.models.peft.kinds import require_kind


class PromptLayout(NamedTuple):
    """A pack with k virtual tokens at the head of every document.

    token: int64 [T], where each token of the pack now stands; virtual: int64 [documents * k], where the virtual ones do.
    positions: int64 [1, T + documents * k].
    """

    segments: tuple[Segment, ...]
    token: Tensor
    virtual: Tensor
    positions: Tensor


def insert_virtual(segments: tuple[Segment, ...], positions: Tensor, k: int) -> PromptLayout:
    """Lay k virtual tokens before every document; an answer sees those of its prompt.

    A document is a segment without a prefix. positions: int64 [1, T] of the pack as it was.
    """
    shift, shifts, virtual, laid = 0, [], [], []
    began: dict[int, int] = {}  # first token of a document -> where its virtual tokens begin now
    for start, stop, prefix_start, prefix_stop in segments:
        if prefix_start == prefix_stop:
            began[start] = start + shift
            virtual += range(start + shift, start + shift + k)
            shift += k
            laid.append(Segment(began[start], stop + shift))
        else:
            head = began[prefix_start]
            laid.append(Segment(start + shift, stop + shift, head, head + k + prefix_stop - prefix_start))
        shifts += [shift] * (stop - start)
    device = positions.device
    token = torch.arange(len(shifts), device=device) + torch.tensor(shifts, device=device)
    slots = torch.tensor(virtual, device=device)
    moved = torch.empty(1, len(shifts) + len(virtual), dtype=torch.int64, device=device)
    moved[0, token] = positions[0] + k
    moved[0, slots] = torch.arange(k, device=device).repeat(len(virtual) // k)
    return PromptLayout(tuple(laid), token, slots, moved)


def embed(layout: PromptLayout, tokens: Tensor, virtual: Tensor) -> Tensor:
    """Input embeddings [1, T + documents * k, H] of tokens [T, H] and virtual [k, H]."""
    whole = tokens.new_zeros(len(layout.token) + len(layout.virtual), tokens.shape[1])
    copies = virtual.to(tokens.dtype).repeat(len(layout.virtual) // len(virtual), 1)
    return whole.index_copy(0, layout.token, tokens).index_copy(0, layout.virtual, copies)[None]


def soft_prompt(model: Any) -> Tensor:
    """[k, H] of prompt tuning or P-tuning."""
    return model.get_prompt(batch_size=1)[0]


def layer_prefixes(model: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of prefix tuning, one pair [1, key heads, k, head size] a layer."""
    cache: Any = model.get_prompt(batch_size=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def virtual_of(model: Any) -> str:
    """'' for a model without virtual tokens, else 'prompt' or 'prefix'. Raises UserError for virtual tokens of no known kind."""
    config = model.active_peft_config if hasattr(model, "active_peft_config") else None
    if config is None or not config.is_prompt_learning:
        return ""
    return require_kind({"peft_type": str(config.peft_type.value)}, "peft").virtual
