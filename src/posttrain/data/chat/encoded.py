"""What comes of texts: tokens, what each of them counts, and what two answers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from posttrain.data.chat.alignment import Field, Span
from posttrain.data.chat.tokenize import shared_length, touching
from posttrain.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """weights[i] is the weight of the loss on predicting tokens[i].

    borders: how many tokens reach across the border of trained text; they count. first_word: index of the first token that
    is predicted, counts, and holds a letter of an answer; -1 where there is none, so that nothing but ends would be learnt.
    lost: parts of the row that are not among the tokens, as the chat template does not render them.
    """

    tokens: list[int]
    weights: list[float]
    borders: int
    first_word: int
    lost: tuple[Field, ...] = ()

    @property
    def last_trained(self) -> int:
        """Index of the last token that counts, -1 where none does."""
        return max((k for k, weight in enumerate(self.weights) if weight), default=-1)


@dataclass(frozen=True)
class EncodedPair:
    """Two answers, and the tokens that come before both; the answers' own tokens start where they differ or count.
    weight: of the row, which is in none of the tokens' own."""

    prompt: list[int]
    chosen: Encoded
    rejected: Encoded
    weight: float


class EncodedPrompt(NamedTuple):
    """A prompt, the answer known to it, and parts of the row that are not in the prompt."""

    tokens: list[int]
    known: list[int]
    lost: tuple[Field, ...]


def pair_of(chosen: Encoded, rejected: Encoded, weight: float) -> EncodedPair:
    """Both answers behind what both begin with. Raises UserError if they are the same."""
    if chosen.tokens == rejected.tokens:
        raise UserError("chosen and rejected are the same; leave the row out")
    shared = min(_first_trained(chosen), _first_trained(rejected), shared_length(chosen.tokens, rejected.tokens))
    return EncodedPair(chosen.tokens[:shared], _after(chosen, shared), _after(rejected, shared), weight)


def parted(whole: Encoded) -> tuple[list[int], Encoded]:
    """The tokens before the first that counts, and what is from there on."""
    start = _first_trained(whole)
    return whole.tokens[:start], _after(whole, start)


def first_word_of(offsets: Sequence[Span], words: Sequence[Span], weights: Sequence[float], least: int) -> int:
    """Index, from `least` on, of the first token of some weight that holds a letter of the words; -1 without one."""
    for span in words:
        for k in touching(offsets, span):
            if k >= least and weights[k]:
                return k
    return -1


def weights_of(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[list[float], int]:
    """1 for each token that holds any letter of a span; and the number of tokens that hold others as well."""
    weights, borders = [0.0] * len(offsets), set[int]()
    for start, stop in spans:
        inner = touching(offsets, (start, stop))
        weights[inner.start : inner.stop] = [1.0] * len(inner)
        borders.update(k for k in (*inner[:1], *inner[-1:]) if offsets[k][0] < start or offsets[k][1] > stop)
    return weights, len(borders)


def _first_trained(encoded: Encoded) -> int:
    return next((k for k, weight in enumerate(encoded.weights) if weight), len(encoded.tokens))


def _after(encoded: Encoded, start: int) -> Encoded:
    first_word = max(encoded.first_word - start, -1)
    return Encoded(encoded.tokens[start:], encoded.weights[start:], encoded.borders, first_word, encoded.lost)
