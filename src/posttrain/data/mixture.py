"""Several sources as one: whose units a run draws when, by shares of tokens, and what came of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import DataConfig, TrainConfig
from posttrain.data.chat.encoder import Encoder
from posttrain.data.collate import BatchSampler
from posttrain.data.examples import Examples, join
from posttrain.data.prepare import PreparedSource, prepare
from posttrain.data.queues import Curriculum, queues_of
from posttrain.data.row_use import RowUse
from posttrain.data.selection import sources_of
from posttrain.data.stats import SourceStats
from posttrain.runs.earlier import OF_CONTENT

# data.alpha=auto by the bytes of domain text, straight lines over the logarithm between these (SPEC: below 1 GB 0.1 to 0.3, to
# 10 GB 0.3 to 0.5, above 0.5 to 0.8)
_AUTO_ALPHA = ((1e7, 0.1), (1e9, 0.3), (1e10, 0.5), (1e11, 0.8))


@dataclass(frozen=True)
class Mixture:
    """Tokenised sources and the share of tokens that each is to have. Units are numbered through, source after source."""

    parts: list[PreparedSource]
    shares: list[float]

    @cached_property
    def train(self) -> Examples:
        """The examples of all sources, one source after another."""
        return join([part.train for part in self.parts])

    @property
    def held_out(self) -> Examples:
        """Of the first source."""
        return self.parts[0].held_out

    @property
    def stats(self) -> SourceStats:
        """Counts of the first source."""
        return self.parts[0].stats

    @property
    def held_out_stats(self) -> SourceStats:
        """Counts of the first source's held-out rows."""
        return self.parts[0].held_out_stats

    @property
    def key(self) -> str:
        """Names all rows and shares, and the code that reads them."""
        if len(self.parts) == 1:
            return self.parts[0].key
        parts = [[part.key for part in self.parts], self.shares]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def content(self) -> str:
        """Names what was read of all sources, whatever code has read it, and their shares."""
        if len(self.parts) == 1:
            return self.parts[0].content
        parts = [[part.content for part in self.parts], self.shares]
        return OF_CONTENT + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    @property
    def sizes(self) -> list[NDArray[np.int64]]:
        """Tokens of each unit, by source."""
        return [part.train.unit_tokens() for part in self.parts]

    def others(self, seed: int, total: int) -> list[int]:
        """So many units beside the order of a run, by the same shares."""
        return draw_units(self.sizes, self.shares, seed, total, None, "repeat").tolist()

    def where(self, sequence: int) -> str:
        """The row that a sequence of `train` is from, as messages say it, with its source where there are several."""
        starts = np.cumsum([0, *(len(part.train.rows) for part in self.parts)])
        part = self.parts[int(np.searchsorted(starts, sequence, side="right")) - 1]
        place = part.stats.where(int(self.train.rows[sequence]))
        return place if len(self.parts) == 1 else f"{part.name}: {place}"

    def record(self, order: BatchSampler) -> list[dict[str, Any]]:
        """For the manifest: each source with the share asked and seen, how often it was gone through, and its share in each
        epoch, which is one pass over the first source."""
        found = seen(order.drawn, self.sizes)
        asked = zip(self.parts, self.shares, found, strict=True)
        return [{"name": p.name, **vars(p.stats), "share": share, **figures} for p, share, figures in asked]


def read_mixture(data: DataConfig, use: RowUse, encoder: Encoder, max_length: int, cache: Path) -> Mixture:
    """Raises UserError for anything wrong with the data, naming file and row."""
    parts = prepare(data, use, encoder, max_length, cache)
    return Mixture(parts, shares_of(data, parts))


def shares_of(data: DataConfig, parts: list[PreparedSource]) -> list[float]:
    """What is asked of each source. parts: the first of them, by whose size data.alpha=auto goes."""
    if data.sources:
        return [source.share for source in data.sources.values()]
    if len(sources_of(data)) == 1:
        return [1.0]
    alpha = data.alpha if isinstance(data.alpha, float) else auto_alpha(parts[0].stats.bytes)
    return [alpha, 1 - alpha]


def auto_alpha(size: float) -> float:
    """Share of the domain's tokens, from the bytes of its text (Gururangan et al. 2020 and after; SPEC's guide)."""
    sizes, alphas = zip(*_AUTO_ALPHA, strict=True)
    return round(float(np.interp(math.log10(max(size, 1)), np.log10(sizes), alphas)), 3)


def make_sampler(
    mixture: Mixture, data: DataConfig, train: TrainConfig, world_size: int, curriculum: Curriculum | None = None
) -> BatchSampler:  # fmt: skip
    """The units of the whole run. train.epochs are passes over the first source; train.max_steps wins over them."""
    per_step = train.batch_size * train.grad_accum * world_size
    sizes = mixture.sizes
    total = train.max_steps * per_step if train.max_steps else None
    passes = None if total else math.ceil(train.epochs * len(sizes[0]))
    drawn = draw_units(sizes, mixture.shares, train.seed, total, passes, data.exhausted, curriculum)
    return BatchSampler(drawn, train.batch_size, train.grad_accum, world_size)


def draw_units(
    sizes: Sequence[NDArray[np.int64]],
    shares: Sequence[float],
    seed: int,
    total: int | None,
    of_first: int | None,
    exhausted: Literal["repeat", "stop"],
    curriculum: Curriculum | None = None,
) -> NDArray[np.int64]:
    """int64: `total` units, or as many as there are up to draw `of_first` of the first source; fewer where a source ends.

    Each time the source is next that is furthest behind its share of the tokens so far, so that no share is ever off by more
    than a unit or two; within a source every pass is a fresh permutation, or as the curriculum has it.
    """
    starts = np.cumsum([0, *map(len, sizes)])
    queues = queues_of([len(size) for size in sizes], seed, curriculum, _draws(sizes, shares, total, of_first))
    drawn: list[int] = []
    behind = [0.0] * len(sizes)  # tokens that a source lacks
    while len(drawn) != total and queues[0].taken != of_first:
        which = max(range(len(sizes)), key=lambda s: (behind[s], shares[s]))
        if exhausted == "stop" and queues[which].taken == len(sizes[which]):
            break
        progress = len(drawn) / total if total else queues[0].taken / (of_first or 1)
        unit = queues[which].next(progress)
        size = int(sizes[which][unit])
        behind = [b + share * size for b, share in zip(behind, shares, strict=True)]
        behind[which] -= size
        drawn.append(int(starts[which]) + unit)
    return np.asarray(drawn, dtype=np.int64)


def _draws(sizes: Sequence[NDArray[np.int64]], shares: Sequence[float], total: int | None, of_first: int | None) -> list[float]:
    """How many units of each source the run will take, by their mean sizes."""
    often = np.array([share / max(float(size.mean()), 1.0) for size, share in zip(sizes, shares, strict=True)])
    return (often * (total / often.sum() if total else (of_first or 1) / often[0])).tolist()


def seen(drawn: NDArray[np.int64], sizes: Sequence[NDArray[np.int64]]) -> list[dict[str, Any]]:
    """By source: tokens_seen, share_seen, passes (units drawn over units there are), coverage (the share of its units
    that is drawn at all), and share_by_epoch."""
    starts = np.cumsum([0, *map(len, sizes)])
    source = np.searchsorted(starts, drawn, side="right") - 1
    tokens = np.concatenate(sizes)[drawn]
    before = np.concatenate([[0], np.cumsum(source == 0)[:-1]]) if len(drawn) else np.zeros(0)
    epoch = np.where(source == 0, before, np.maximum(before - 1, 0)) // len(sizes[0])
    whole = np.bincount(epoch, tokens) if len(drawn) else np.zeros(0)
    found: list[dict[str, Any]] = []
    for s in range(len(sizes)):
        own = np.where(source == s, tokens, 0)
        by_epoch = np.bincount(epoch, own, len(whole)) / np.maximum(whole, 1) if len(drawn) else np.zeros(0)
        found.append(
            {
                "tokens_seen": int(own.sum()),
                "share_seen": round(float(own.sum() / max(tokens.sum(), 1)), 6),
                "passes": round(int((source == s).sum()) / max(len(sizes[s]), 1), 4),
                "coverage": round(len(np.unique(drawn[source == s])) / max(len(sizes[s]), 1), 4),
                "share_by_epoch": [round(float(share), 6) for share in by_epoch],
            }
        )
    return found
