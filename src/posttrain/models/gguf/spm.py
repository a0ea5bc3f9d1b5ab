"""A small tokenizer by llama.cpp's rule for SentencePiece vocabularies, to hold what is written against the run's own tokenizer.

It knows nothing of merges or normalizers: all that it reads are the texts, scores and kinds that stand in the file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf import GGUFReader, Keys, TokenType

SPACE = "\u2581"  # what stands for a space within a token
STRIPPING = ("phi-3", "phi3")  # in a model's name: its special tokens take the white space after them
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")  # of such a model: those that take none
_WHITE = " \t\n\v\f\r"  # C's isspace
WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)  # found in a text before anything is merged


@dataclass(frozen=True)
class Spm:
    """prefix: a space goes before a text, and before one after a whole token. strips: special tokens take white space."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    prefix: bool
    strips: bool

    def __call__(self, text: str) -> list[int]:
        """Ids, with nothing added at the ends."""
        found, after_whole = list[int](), True
        for part in self._parts(text):
            if isinstance(part, int):
                found.append(part)
            else:
                found += self._merged((" " + part if self.prefix and after_whole else part).replace(" ", SPACE))
            after_whole = isinstance(part, int)
        return found

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self.texts)}

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
