"""Answers on their way: prompts are read once, then every answer grows by a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache

from posttrain.batch import Segment
from posttrain.models.kernels.attention import attention_windows
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.decoder import cache_names, decoder_of, last_hidden
from posttrain.models.language.kv_cache import ROOM, FixedLayer, fixed_layer, roomy_cache
from posttrain.models.language.packed_lm import PackedLM

ALIGNED = 8  # tokens in whose multiples attention's kernels take a mask without a copy
LONGEST_TRIED = 4096  # tokens of a prompt with which a cache is tried


class Growing(Protocol):
    """hidden: last hidden states [n, H] of the prompts, one for each answer. keeps_at: `keep` is worth it where no more than this
    share of them goes on."""

    hidden: Tensor
    keeps_at: float

    def keep(self, rows: Tensor) -> None:
        """Of all answers go on with these alone: int64 [m]."""
        ...

    def grow(self, tokens: Tensor) -> Tensor:
        """Add a token to each, int64 [n, 1]; returns the last hidden states [n, H]."""
        ...


def reads_prompts_packed(lm: PackedLM) -> bool:
    """Can prompts of any lengths be read as one pack, and answered side by side?"""
    return lm.reading.way == "packed" and lm.border is None


def growing_answers(lm: PackedLM, prompts: Sequence[Sequence[int]], samples: int, fixed: bool = False) -> Growing:
    """`samples` answers to each prompt, of prompts of one length where they cannot be read packed. fixed: as FixedAnswers, which
    has to be possible (replayed.py)."""
    if reads_prompts_packed(lm):
        return (FixedAnswers if fixed else _FromPack)(lm, prompts, samples)
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=lm.causal.device)
    name = _cache_keyword(lm)
    return _WithOwnCache(lm, tokens, samples, name) if name else _WithoutCache(lm, tokens, samples)


class _FromPack:
    """Prompts of any lengths, read as one pack, whose keys and values stand at the end of a row each."""

    keeps_at = 0.75  # the cache is copied then: not for every answer that ends
    whole = False  # as roomy_cache's

    def __init__(self, lm: PackedLM, prompts: Sequence[Sequence[int]], samples: int) -> None:
        device = lm.causal.device
        self.before_head, self.decoder = lm.before_head, cast(Any, decoder_of(lm.causal))
        self.cache, self.name = roomy_cache(lm.causal.config, self.whole), cache_names(self.decoder)[0]
        hidden = _read_prompts(lm, prompts, self.cache)
        self.cache.batch_repeat_interleave(samples)  # answers to one prompt share its keys and values up to here
        self.hidden = hidden.repeat_interleave(samples, 0)
        self.positions: Tensor = torch.tensor([len(prompt) for prompt in prompts for _ in range(samples)], device=device)
        width = int(self.positions.max())
        self.mask = (torch.arange(width, device=device) >= width - self.positions[:, None]).long()

    def keep(self, rows: Tensor) -> None:
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)

    def grow(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        hidden = self._read(tokens, self.mask)
        self.positions = self.positions + 1
        return hidden

    def _read(self, tokens: Tensor, mask: Tensor | dict[str, Tensor]) -> Tensor:
        read = self.decoder(
            input_ids=tokens, attention_mask=mask, position_ids=self.positions[:, None], use_cache=True,
            **{self.name: self.cache},
        )  # fmt: skip
        return last_hidden(read, self.before_head)[:, -1]


class FixedAnswers(_FromPack):
    """As _FromPack, over tensors that stay where they are: `grow` changes nothing but their numbers, so it can be recorded and
    replayed.

    made: how often they were made anew, by `ready` or `keep`; a recording serves until then.
    """

    keeps_at = 0.5  # each time the step has to be recorded again
    whole = True
    cache: Any

    def __init__(self, lm: PackedLM, prompts: Sequence[Sequence[int]], samples: int) -> None:
        super().__init__(lm, prompts, samples)
        self.made, self.prompt = 0, self.mask.shape[1]
        self.written = self.prompt  # columns
        self.place = self.positions.new_tensor([self.written])
        self.mask = self.mask.bool()[:, None, None]  # of four dimensions it is the attention's own, and no other is made from it
        self.cache.layers = [fixed_layer(layer, self.place) for layer in self.cache.layers]
        text = lm.causal.config.get_text_config()
        windows = attention_windows(text)
        self.windows = {"": windows[0]} if len(set(windows)) == 1 else dict(zip(text.layer_types, windows, strict=True))

    def ready(self) -> None:
        """Make room for a token of each; to be called before every `grow`, also one that is replayed."""
        if self.written == self.mask.shape[-1]:
            more = max(ROOM, self.written - self.prompt)  # twice as much as the answers have
            more += -(self.written + more) % ALIGNED
            self.mask = pad(self.mask, (0, more))
            for layer in self.cache.layers:
                if isinstance(layer, FixedLayer):
                    layer.add_room(more)
            self.made += 1
        self.written += 1

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.made += 1

    def grow(self, tokens: Tensor) -> Tensor:
        self.mask.index_fill_(3, self.place, True)
        masks = {kind: self._within(window) for kind, window in self.windows.items()}
        hidden = self._read(tokens, masks.get("", masks))
        self.positions += 1
        self.place += 1
        return hidden

    def _within(self, window: int | None) -> Tensor:
        """What layers with this window attend to: bool [n, 1, 1, room]."""
        if window is None:
            return self.mask
        return self.mask & (torch.arange(self.mask.shape[-1], device=self.mask.device) > self.place - window)


class _WithOwnCache:
    """Prompts of one length, int64 [n, L], with the cache that the model makes for itself: of keys and values, or of states."""

    keeps_at = _FromPack.keeps_at

    def __init__(self, lm: PackedLM, tokens: Tensor, samples: int, name: str) -> None:
        self.before_head, self.decoder = lm.before_head, cast(Any, decoder_of(lm.causal))
        self.options: dict[str, Any] = {name: DynamicCache(config=lm.causal.config.get_text_config()), "use_cache": True}
        self.cache: Any = self.options[name]
        hidden = self.grow(tokens)
        self.keep(torch.arange(len(tokens), device=tokens.device).repeat_interleave(samples))
        self.hidden = hidden.repeat_interleave(samples, 0)

    def keep(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)

    def grow(self, tokens: Tensor) -> Tensor:
        return last_hidden(self.decoder(input_ids=tokens, **self.options), self.before_head)[:, -1]


class _WithoutCache:
    """Prompts of one length, int64 [n, L], all of which is read again for every token: for models whose cache does not serve."""

    keeps_at = _FromPack.keeps_at

    def __init__(self, lm: PackedLM, tokens: Tensor, samples: int) -> None:
        self.before_head, self.decoder = lm.before_head, cast(Any, decoder_of(lm.causal))
        self.tokens = tokens.repeat_interleave(samples, 0)
        self.hidden = self._read()

    def keep(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]

    def grow(self, tokens: Tensor) -> Tensor:
        self.tokens = torch.cat([self.tokens, tokens], 1)
        return self._read()

    def _read(self) -> Tensor:
        return last_hidden(self.decoder(input_ids=self.tokens, use_cache=False), self.before_head)[:, -1]


def _cache_keyword(lm: PackedLM) -> str:
    """Under what name the model takes a cache that gives what reading all again gives; '' where none does."""
    if lm.cache_keyword is None:
        names = cache_names(decoder_of(lm.causal))
        lm.cache_keyword = "" if lm.border else next((name for name in names if _serves(lm, name)), "")
    return lm.cache_keyword


def _serves(lm: PackedLM, name: str) -> bool:
    """Do three answers, one of which is then dropped, grow with it as without it?

    The prompts are longer than what the cache keeps: some classes cut it to a window that they do not have.
    """
    head: Any = lm.causal.get_output_embeddings()
    text = lm.causal.config.get_text_config()
    length = max([6, *(window + 2 for window in _windows(DynamicCache(config=text)) if window <= LONGEST_TRIED)])
    drawn = torch.randint(text.vocab_size, (3, length + 2), generator=torch.Generator().manual_seed(1)).to(lm.causal.device)
    prompts, first, second = drawn[:, :length], drawn[:, length:-1], drawn[1:, -1:]
    found = []
    try:
        for growing in (_WithOwnCache(lm, prompts, 1, name), _WithoutCache(lm, prompts, 1)):
            growing.grow(first)
            growing.keep(torch.tensor([1, 2], device=drawn.device))
            found.append(head(growing.grow(second)).double().log_softmax(-1))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError):
        return False
    kl = float((found[1].exp() * (found[1] - found[0])).sum(-1).mean())
    return kl <= (1e-5 if lm.causal.dtype == torch.float32 else 2e-2)


def _windows(cache: Cache) -> list[int]:
    """How many tokens the layers of a cache keep, where that is not all."""
    found = (getattr(layer, "sliding_window", None) for layer in cache.layers)
    return [window for window in found if isinstance(window, int)]


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
