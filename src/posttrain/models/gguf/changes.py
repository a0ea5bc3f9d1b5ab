"""What becomes of single tensors between transformers and llama.cpp, there and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.models.gguf.shapes import kv_heads


@dataclass(frozen=True)
class Change:
    """there: as llama.cpp has it. back: the inverse."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


Changes = dict[str, Change]  # pattern that is found in a name -> what is done to such tensors
SAME = Change(lambda tensor: tensor, lambda tensor: tensor)
PLUS_ONE = Change(lambda tensor: tensor + 1, lambda tensor: tensor - 1)
ROW = Change(lambda tensor: tensor[0], lambda tensor: tensor[None])  # a matrix of one row, which is a vector there
TRANSPOSED = Change(lambda tensor: tensor.T, lambda tensor: tensor.T)


def change_of(name: str, changes: Changes) -> Change:
    """The first whose pattern is found in the name."""
    return next((change for pattern, change in changes.items() if re.search(pattern, name)), SAME)


def turned(heads: int) -> Change:
    """Rope turns neighbours in llama.cpp, and the halves of a head in transformers."""

    def there(tensor: Tensor) -> Tensor:
        return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    def back(tensor: Tensor) -> Tensor:
        return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    return Change(there, back)


def ungrouped(groups: int, queries: int) -> Change:
    """Queries, keys and values in one tensor: by `groups` of so many `queries`, one key and one value; there all queries come
    first, then all keys, then all values."""

    def there(tensor: Tensor) -> Tensor:
        grouped = tensor.view(groups, queries + 2, -1, *tensor.shape[1:])
        parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        return torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts])

    def back(tensor: Tensor) -> Tensor:
        head = tensor.shape[0] // (groups * (queries + 2))
        sizes = [groups * queries * head, groups * head, groups * head]
        parts = [part.reshape(groups, -1, head, *tensor.shape[1:]) for part in tensor.split(sizes)]
        return torch.cat(parts, dim=1).reshape(tensor.shape)

    return Change(there, back)


def none(config: Any) -> Changes:
    """Tensors are as they are."""
    return {}


def by_rope(config: Any) -> Changes:
    """Queries and keys turn."""
    return {r"\.q_proj\.": turned(config.num_attention_heads), r"\.k_proj\.": turned(config.num_key_value_heads)}


def norms_by_one(config: Any) -> Changes:
    """Norms multiply by 1 + w in transformers, by w in llama.cpp."""
    return {r"norm\.weight$": PLUS_ONE}


def shared_gate(config: Any) -> Changes:
    """The gate of a shared expert is a vector."""
    return {r"shared_expert_gate\.weight$": ROW}


def convolved(config: Any) -> Changes:
    """GPT-2's layers, which are convolutions of width 1, lie the other way round."""
    return {r"\.c_(attn|proj|fc)\.weight$": TRANSPOSED}


def of_neox(config: Any) -> Changes:
    """Each head's query, key and value lie together."""
    return {r"\.query_key_value\.": ungrouped(config.num_attention_heads, 1)}


def of_falcon(config: Any) -> Changes:
    """Queries that share a key and a value lie together with them."""
    groups = kv_heads(config)
    return {r"\.query_key_value\.": ungrouped(groups, config.num_attention_heads // groups)}
