"""FlexAttention over a pack, for what no other kernel computes (softcap, sinks).

Compiled twice in all, with gradients and without: shapes are symbols, padded to whole blocks, and windows are tensors. The blocks
are worked out from the segments on the host, once a pack and window, so that no layer waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo import mark_static
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from posttrain.batch import Segment
from posttrain.models.kernels.masks import DocumentMask
from posttrain.tensors import upload

BLOCK = 128  # rows and columns of a block of scores
EVERYTHING = 2**31 - 1  # the window of a layer that has none
VARIANTS = 64  # that torch may compile in one process: two for each size and number of heads, format, softcap
FIELDS = tuple(f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices"))


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention as one kernel; compiled when it is first called. A process that has had many models compiles for each: where
    torch's own limit of eight ends, it would write out all scores instead, and say so in its log alone."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(flex_attention, dynamic=True)


def by_flex(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask,
    *, scaling: float | None, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """[1, heads, T, dim] -> [1, T, heads, dim]. key, value: with the memory before them. sinks: of each head a score that takes
    its share of the softmax and gives nothing."""
    blocks = block_mask(mask, window)
    rows, columns = blocks.seq_lengths
    padded = [pad(x, (0, 0, 0, n - x.shape[2])) for x, n in zip((query, key, value), (rows, columns, columns), strict=True)]
    for x in padded:  # else a number of blocks that equals a number of heads would be taken for it, and not vary
        mark_static(x, [0, 1, 3])
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if softcap is not None:
        options["score_mod"] = _capped(softcap)
    if sinks is None:
        out = compiled()(*padded, block_mask=blocks, **options)
    else:
        out, more = compiled()(*padded, block_mask=blocks, return_aux=AuxRequest(lse=True), **options)
        out = out * torch.sigmoid(more.lse.float() - sinks.float()[None, :, None])[..., None].to(out.dtype)
    return out[:, :, : query.shape[2]].transpose(1, 2).contiguous()


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def block_mask(mask: DocumentMask, window: int | None) -> BlockMask:
    """Of a pack with its rows and columns padded to whole blocks; made once. What pads sees itself alone."""

    def make() -> BlockMask:
        rows, columns = _padded(mask.num_tokens), _padded(mask.size + _padded(mask.num_tokens))
        segments = mask.segments
        if rows > mask.num_tokens:
            segments = (*segments, Segment(mask.num_tokens, rows))
        relation = mask.once(("flex relation",), lambda: _Relation(segments, mask.size, mask.device))
        some, whole = host_blocks(segments, rows, columns, window, mask.size)
        found = BlockMask.from_kv_blocks(*_lists(some), *_lists(whole), BLOCK_SIZE=BLOCK, seq_lengths=(rows, columns))
        fields: dict[str, Any] = {name: upload(getattr(found, name), mask.device) for name in FIELDS}
        mod = relation.mod(window)
        return BlockMask(seq_lengths=(rows, columns), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mod, **fields)

    return mask.once(("flex", window), make)


def _padded(size: int) -> int:
    """To whole blocks, two at least: a size of one would be compiled for by itself."""
    return max(2, -(-size // BLOCK)) * BLOCK


def _lists(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """bool [n, m] -> how many blocks each row has, and which, these first: int32 [1, 1, n] and [1, 1, n, m]."""
    numbers = blocks.sum(1, dtype=np.int32)[None, None]
    return torch.from_numpy(numbers), torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)[None, None])


class _Relation:
    """Of each token its segment, on the device, as the function that FlexAttention asks of (batch, head, query, column)."""

    def __init__(self, segments: Sequence[Segment], memory: int, device: torch.device) -> None:
        numbers = np.array([tuple(s) for s in segments], dtype=np.int32)
        each = np.repeat(numbers, numbers[:, 1] - numbers[:, 0], axis=0).T
        self.start, _, self.prefix_start, self.prefix_stop = upload(torch.from_numpy(np.ascontiguousarray(each)), device).unbind(
            0
        )
        self.memory, self.device = upload(torch.tensor(memory, dtype=torch.int32), device), device

    def mod(self, window: int | None) -> Callable[..., Tensor]:
        reach = upload(torch.tensor(EVERYTHING if window is None else window, dtype=torch.int32), self.device)
        start, prefix_start, prefix_stop, memory = self.start, self.prefix_start, self.prefix_stop, self.memory

        def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, column: Tensor) -> Tensor:
            key = column - memory
            own = (key >= start[query]) & (key <= query) & (query - key < reach)
            at = query - start[query] + prefix_stop[query] - prefix_start[query]  # place in the document, its prompt included
            shared = (key >= prefix_start[query]) & (key < prefix_stop[query]) & (at - (key - prefix_start[query]) < reach)
            return own | shared | ((key < 0) & (at - key < reach))

        return mask_mod


def flex_mask_mod(
    segments: Sequence[Segment], window: int | None, device: torch.device, memory: int = 0
) -> Callable[..., Tensor]:
    """The same relation as `dense_mask`, as FlexAttention asks for it: a function of (batch, head, query, column)."""
    return _Relation(segments, memory, device).mod(window)


def host_blocks(
    segments: Sequence[Segment], rows: int, columns: int, window: int | None, memory: int
) -> tuple[np.ndarray, np.ndarray]:
    """bool [rows / BLOCK, columns / BLOCK]: the blocks of which some scores count, not all, and those of which all do."""
    seen = np.zeros((rows // BLOCK, columns // BLOCK), dtype=bool)
    whole, reach = seen.copy(), EVERYTHING if window is None else window
    for start, stop, prefix_start, prefix_stop in segments:
        for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
            first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK) - 1
            place = memory + prefix_stop - prefix_start  # of the segment's first token in its document
            # stretches of columns, each with the place of its first one: memory, what is shared, and the segment itself
            known = ((0, memory, 0), (memory + prefix_start, memory + prefix_stop, memory))
            for begin, end, at in (*known, (memory + start, memory + last + 1, place)):
                _mark(seen[block], begin + max(0, place + first - start - at - reach + 1), end, touched=True)
            for begin, end, at in (*known, (memory + start, memory + first + 1, place)) if last - first == BLOCK - 1 else ():
                _mark(whole[block], begin + max(0, place + last - start - at - reach + 1), end, touched=False)
    return seen & ~whole, whole


def _mark(blocks: np.ndarray, begin: int, end: int, *, touched: bool) -> None:
    """Set the blocks that columns begin:end touch, or those that lie within."""
    if begin < end and touched:
        blocks[begin // BLOCK : -(-end // BLOCK)] = True
    elif begin < end:
        blocks[-(-begin // BLOCK) : end // BLOCK] = True
