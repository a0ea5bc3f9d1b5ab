"""Small tokenizers by llama.cpp's rules, to hold what is written against the run's own.

That of SentencePiece vocabularies knows nothing of merges or normalizers: all that it reads are the texts, scores and kinds that
stand in the file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import GGUFReader, Keys, TokenType

SPACE = "\u2581"  # what stands for a space within a token
STRIPPING = ("phi-3", "phi3")  # in a model's name: its special tokens take the white space after them
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")  # of such a model: those that take none
_WHITE = " \t\n\v\f\r"  # C's isspace
WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found in a text before anything is merged


class Cutter:
    """Cuts a text as llama.cpp does: whole tokens first, the longest first, and what is between them by the rule of its kind."""

    texts: Sequence[str]
    kinds: Sequence[int]
    strips: bool  # special tokens take the white space after them

    def __call__(self, text: str) -> list[int]:
        """Ids, with nothing added at the ends."""
        found, after_whole = list[int](), True
        for part in self._parts(text):
            found += [part] if isinstance(part, int) else self.between(part, after_whole)
            after_whole = isinstance(part, int)
        return found

    def between(self, text: str, after_whole: bool) -> Iterable[int]:
        """Ids of what is no whole token. after_whole: is it the first of a text, or behind one?"""
        raise NotImplementedError

    @cached_property
    def _whole(self) -> list[int]:
        """Ids of the tokens that are found as they are, the longest first."""
        found = [i for i, kind in enumerate(self.kinds) if kind in WHOLE]
        return sorted(found, key=lambda i: -len(self.texts[i].encode()))

    def _parts(self, text: str) -> list[str | int]:
        parts: list[str | int] = [text]
        for token in self._whole:
            if self.texts[token] in text:
                parts = [each for part in parts for each in (self._cut(part, token) if isinstance(part, str) else [part])]
        return [part for part in parts if part != ""]

    def _cut(self, part: str, token: int) -> Iterator[str | int]:
        strips = self.strips and self.texts[token] not in NOT_STRIPPING
        first, *others = part.split(self.texts[token])
        yield first
        for other in others:
            yield token
            yield other.lstrip(_WHITE) if strips else other


@dataclass(frozen=True)
class Bytes(Cutter):
    """Of a byte-level vocabulary: what is between whole tokens goes by rule and merges of `backend`, a tokenizer of tokenizers,
    with nothing done to it before."""

    texts: Sequence[str]
    kinds: Sequence[int]
    backend: Any
    strips: bool = False

    def between(self, text: str, after_whole: bool) -> Iterator[int]:
        """By its own words."""
        for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(text):
            yield from (token.id for token in self.backend.model.tokenize(word))


@dataclass(frozen=True)
class Spm(Cutter):
    """prefix: a space goes before a text, and before one after a whole token."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    prefix: bool
    strips: bool

    def between(self, text: str, after_whole: bool) -> Iterator[int]:
        """By scores."""
        return self._merged((" " + text if self.prefix and after_whole else text).replace(" ", SPACE))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

    def _merged(self, text: str) -> Iterator[int]:
        """The neighbours that make the token of the highest score become it, of equals the first, until none make any."""
        symbols = list(text)
        before, after = list(range(-1, len(text) - 1)), [*range(1, len(text)), -1]
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (token := self._ids.get(both := symbols[left] + symbols[right])) is not None:
                heapq.heappush(queue, (-self.scores[token], left, right, both))

        for left, right in enumerate(after):
            offer(left, right)
        while queue:
            _, left, right, both = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(both):
                continue  # one of the two has become another token meanwhile
            symbols[left], symbols[right] = both, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        for symbol in filter(None, symbols):
            yield from [self._ids[symbol]] if symbol in self._ids else self._bytes(symbol)

    def _bytes(self, symbol: str) -> Iterator[int]:
        for byte in symbol.encode():
            yield self._ids[name if (name := byte_name(byte)) in self._ids else chr(byte)]


def byte_name(byte: int) -> str:
    """Of the token that stands for a byte."""
    return f"<0x{byte:02X}>"


def read_spm(file: Path) -> Spm:
    """What llama.cpp has of a file that `write_gguf` wrote."""
    fields, keys = GGUFReader(file).fields, Keys.Tokenizer
    texts, scores, kinds = (fields[key].contents() for key in (keys.LIST, keys.SCORES, keys.TOKEN_TYPE))
    name = str(fields[Keys.General.NAME].contents()).lower()
    prefix = bool(fields[keys.ADD_PREFIX].contents())
    return Spm(texts, scores, kinds, prefix, any(word in name for word in STRIPPING))
