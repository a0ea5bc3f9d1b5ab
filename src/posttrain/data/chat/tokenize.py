"""Texts -> token ids and the characters that each stands for, many texts at once and none of them twice."""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from posttrain.data.chat.alignment import Span


class Tokens(NamedTuple):
    """ids[i] stands for the characters offsets[i] of the text; tokens that share one character have the same."""

    ids: list[int]
    offsets: list[Span]


class Tokeniser:
    """A tokenizer's own splitting, with nothing put before or behind a text."""

    def __init__(self, tokenizer: Any) -> None:
        # Of the same tokens, but the offsets cover all of the text: a post-processor may trim white space off them.
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._borders = _borders(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._greedy = {i: len(token.content) for i, token in added if token.lstrip or token.rstrip}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids alone, which takes less time."""
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def tokens(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """The tokens of each text, with their places in it."""
        return map(self._tokens, self._encoded(texts), texts)

    def pairs(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[Tokens, Tokens]]:
        """Both texts of each, as `tokens` has them. What they begin with in common is tokenised once, up to its last border."""
        firsts = self._encoded([first for first, _ in texts])
        kept = [self._last_border(found, *both) for found, both in zip(firsts, texts, strict=True)]
        starts = [found.token_to_chars(k)[0] if k else 0 for found, k in zip(firsts, kept, strict=True)]
        rests = self._encoded([second[start:] for (_, second), start in zip(texts, starts, strict=True)])
        for found, both, k, start, rest in zip(firsts, texts, kept, starts, rests, strict=True):
            first, (ids, offsets) = self._tokens(found, both[0]), self._tokens(rest, both[1][start:])
            moved = [(a + start, b + start) for a, b in offsets] if start else offsets
            yield first, Tokens(first.ids[:k] + ids, first.offsets[:k] + moved)

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _tokens(self, found: Any, text: str) -> Tokens:
        """An added token that takes the blanks around it along stands for its own letters all the same."""
        ids, offsets = found.ids, found.offsets
        if not self._greedy:
            return Tokens(ids, offsets)
        for k, i in enumerate(ids):
            if i in self._greedy:
                start, stop = offsets[k]
                start += len(text[start:stop]) - len(text[start:stop].lstrip())
                offsets[k] = (start, start + self._greedy[i])
        return Tokens(ids, offsets)

    def _last_border(self, found: Any, first: str, second: str) -> int:
        """Index of the last special token that both texts have at the same place, with all before it the same; 0 without one."""
        ids, shared = found.ids, shared_length(first, second)
        for k in range(len(ids) - 1, 0, -1):
            if ids[k] in self._borders:
                start, stop = found.token_to_chars(k)
                if stop <= shared and first[start:stop] == self._borders[ids[k]]:
                    return k
        return 0


def touching(offsets: Sequence[Span], span: Span) -> range:
    """Indices of the tokens that hold any letter of a span; of no letter (a word's mark before it), those at its start too."""
    start, stop = span
    low = bisect_right(offsets, start, key=lambda offset: offset[1])
    while low and offsets[low - 1] == (start, start):
        low -= 1
    return range(low, max(low, bisect_left(offsets, stop, key=lambda offset: offset[0])))


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items both begin with."""
    shorter = range(min(len(first), len(second)))
    return bisect_left(shorter, True, key=lambda k: first[: k + 1] != second[: k + 1])


def _borders(tokenizer: Any) -> dict[int, str]:
    """Special tokens, by id, at which any text falls into two that are tokenised apart, wherever it is cut.

    Those are found before all else in a text, whatever stands around them: unless a token is of a whole word, is looked for
    in the normalised text, or may be a part of another.
    """
    added = tokenizer.added_tokens_decoder
    texts = [token.content for token in added.values()]
    return {
        i: token.content
        for i, token in added.items()
        if token.special and not token.normalized and not token.single_word and sum(token.content in text for text in texts) == 1
    }
