"""`posttrain preview`: what the model will see, through the very functions that a run uses, before any training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from posttrain.batch import PackedBatch
from posttrain.commands.preview.findings import Finding, of_rows, of_stats, of_tokens
from posttrain.config.compose import compose_run
from posttrain.config.schema import DataConfig, LanguageStage
from posttrain.config.stages import typed_config
from posttrain.data.chat.encoder import Encoder
from posttrain.data.collate import pack, pack_pairs
from posttrain.data.example_kinds import RowEncoder
from posttrain.data.left_out import LeftOut
from posttrain.data.mixture import Mixture, draw_units, shares_of
from posttrain.data.prepare import PreparedSource, note_overlaps, note_split, refusal
from posttrain.data.selection import SELF, at_most, sources_of
from posttrain.data.split import Canonical, Split, sound_ones
from posttrain.data.stats import SourceStats
from posttrain.errors import UserError
from posttrain.stages.language.prepare import lines_of_parents, open_language, rows_of, template_of
from posttrain.stages.language.summary import lines_of_data, lines_of_start
from posttrain.stages.spec import spec_of

BUCKETS = 12  # of the lengths' histogram
# kind of examples -> what one of them is called; the pairs lie in packs of their own
UNITS = {
    "documents": "pack", "conversations": "conversation", "pairs": "pair", "scored_pairs": "pair", "labelled": "answer",
    "prompts": "prompt",
}  # fmt: skip


@dataclass(frozen=True)
class Token:
    """text: what it decodes to; where a letter takes several tokens, it stands with the last. weight: of predicting it."""

    text: str
    weight: float


@dataclass(frozen=True)
class PreviewSegment:
    """A document, or one part of a pair, as it lies in the pack. row: its number in the source. weight: of the pair, if it is a
    part of one."""

    what: str
    row: int | None
    tokens: list[Token]
    weight: float = 1.0


@dataclass
class Seen:
    """One source: its stats over the rows that were looked at, the lengths of its sequences, and what is wrong."""

    name: str
    stats: SourceStats
    share: float
    lengths: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    complete: bool = True  # were these all rows?


@dataclass
class Preview:
    """What a run would read, and what is wrong with it. lines: what the run would say first, of the rows that were looked at."""

    stage: str
    unit: str  # what one of `units` is called
    model: str
    sources: list[Seen]
    units: list[list[PreviewSegment]]  # of the first step, in the order of their drawing
    max_length: int
    notes: list[str]
    lines: list[str] = field(default_factory=list[str])

    @property
    def mistakes(self) -> list[str]:
        """A line for each kind of mistake that was found."""
        return [f.line for seen in self.sources for f in seen.findings if f.is_mistake and f.count]


def make_preview(stage: str, words: list[str], rows: int | None, units: int) -> Preview:
    """rows: of each source, the first so many are looked at; None: all. units: at most so many of the first step's packs.

    Raises UserError for a config that does not fit, or a source of which no row can be used.
    """
    cfg = typed_config(compose_run(stage, words))
    if not isinstance(cfg, LanguageStage):
        raise UserError(f"{stage} reads no text; its own report shows what it trains on")
    use, own_lines = rows_of(cfg), spec_of(stage).lines_of(cfg)
    opened = open_language(cfg, weights=False)
    mixture, looked, notes = _sources(cfg, opened.encoder, opened.tokenizer, rows)
    train = cfg.train
    per_step = min(units, train.batch_size * train.grad_accum * train.processes)
    drawn = draw_units(mixture.sizes, mixture.shares, train.seed, per_step, None, cfg.data.exhausted)
    kind = UNITS.get(use.examples, "pack")
    shown = [_segments(kind == "pair", mixture, int(unit), opened.tokenizer) for unit in drawn]
    template = template_of(mixture, opened.encoder, use.examples == "documents")
    lines = lines_of_start(cfg, opened.start, opened.base) + lines_of_data(cfg, mixture, opened.tokenizer, looked[0].complete)
    lines += [*own_lines, *lines_of_parents(cfg, template.rows)]
    return Preview(stage, kind, cfg.model.name, looked, shown, cfg.example_length, notes, lines)


def _sources(cfg: LanguageStage, encoder: Encoder, tokenizer: Any, most: int | None) -> tuple[Mixture, list[Seen], list[str]]:
    """All that can be looked at, as one mixture; and what is said of those that cannot."""
    data = cfg.data.model_copy(update={"on_error": "skip"})
    data = data if most is None else at_most(data, most)  # and not a row more is read or downloaded
    left_out, found, notes = LeftOut(data, rows_of(cfg)), list[tuple[PreparedSource, Look]](), list[str]()
    for name, source in sources_of(data).items():
        if source.path == SELF:
            notes.append(f"{name}: the base model writes it when the run begins, so there is nothing to look at yet")
        else:
            found.append(_look(cfg, name, data, encoder, most, left_out))
    parts = [part for part, _ in found]
    note_overlaps(parts)
    mixture = Mixture(parts, _shares(cfg, parts))
    looked = []
    for (part, look), share in zip(found, mixture.shares, strict=True):
        findings = _findings(cfg, part, look.rows, found[0][1].held_rows, encoder, tokenizer)
        looked.append(Seen(part.name, part.stats, share, np.diff(part.train.offsets).tolist(), findings, look.complete))
    return mixture, looked, notes


def _shares(cfg: LanguageStage, parts: list[PreparedSource]) -> list[float]:
    """Of the sources that can be looked at."""
    known = shares_of(cfg.data, parts)
    names = list(sources_of(cfg.data))
    kept = [known[names.index(part.name)] for part in parts]
    return [share / sum(kept) for share in kept]


@dataclass(frozen=True)
class Look:
    """Rows of a source that can be read. complete: are these all of them?"""

    rows: list[Canonical]
    held_rows: list[Canonical]
    complete: bool


def _look(
    cfg: LanguageStage, name: str, data: DataConfig, encoder: Encoder, most: int | None, left_out: LeftOut
) -> tuple[PreparedSource, Look]:
    sources = sources_of(data)
    source, first = sources[name], name == next(iter(sources))
    split = Split(source, data, rows_of(cfg), first, left_out.of(name))
    raw = list(split.train)
    complete = most is None or len(raw) + len(split.left_out.numbers) < most
    held_raw = split.held_out() if complete else split.held_so_far
    piece = RowEncoder(source.path, split.shape, rows_of(cfg), encoder, cfg.example_length, skips=True)
    (train, stats, read), (held_out, held_stats, held_read) = piece.read(raw), piece.read(held_raw)
    if not len(train):
        raise UserError((stats.places.get("skipped") or [refusal(stats, 0.0)])[0])
    note_split(stats, split, source, 0 if first else held_stats.rows)
    rows, held_rows = (list(sound_ones(each, source.path, split.shape)) for each in (raw, held_raw))
    return PreparedSource(name, train, held_out, stats, held_stats, read, held_read), Look(rows, held_rows, complete)


def _findings(
    cfg: LanguageStage, part: PreparedSource, rows: list[Canonical], held: list[Canonical], encoder: Encoder, tokenizer: Any
) -> list[Finding]:
    def where(number: int) -> str:
        return part.stats.where(number).rsplit(", ", 1)[-1]

    reason = refusal(part.stats, cfg.data.max_untrained_share)
    found = [
        Finding(f"reason for which the run stops: {reason}", count=bool(reason)),
        *of_stats(part.stats, cfg.example_length, cfg.data.dedupe != "none"),
        *of_rows(rows, held, where),
        *of_tokens(rows, encoder, tokenizer, where, cfg.example_length),
    ]
    return [finding for finding in found if finding.count]


def _segments(paired: bool, mixture: Mixture, unit: int, tokenizer: Any) -> list[PreviewSegment]:
    batch = (pack_pairs if paired else pack)(mixture.train, [unit])
    weights = weights_of(batch)
    rows = [int(mixture.train.rows[i]) for i in batch.rows for _ in range(3 if paired else 1)]
    kinds = ("prompt", "chosen", "rejected") if paired else ("",)
    weight = float(batch.extra["pair_weight"][0]) if paired else 1.0
    found = []
    for k, segment in enumerate(batch.segments):
        span = slice(segment.start, segment.stop)
        tokens = _tokens(batch.tokens[0, span].tolist(), weights[span].tolist(), tokenizer)
        row = rows[min(k, len(rows) - 1)]  # of a unit's segments that share their beginning all are of one
        found.append(PreviewSegment(kinds[k % len(kinds)], row, tokens, weight))
    return found


def weights_of(batch: PackedBatch) -> np.ndarray:
    """float32 [T]: the weight of predicting each token of the pack, as the loss will take it."""
    weights = np.zeros(batch.tokens.shape[1], np.float32)
    starts = [segment.start for segment in batch.segments]
    begins = [starts[bisect_right(starts, end) - 1] for end in batch.eos_index.tolist()]  # of each answer
    of_pair = batch.extra.get("pair_weight")
    taken = batch.weight if of_pair is None else batch.weight * of_pair[batch.sequence_id // 2]
    for source, owner, weight in zip(batch.logit_index.tolist(), batch.sequence_id.tolist(), taken.tolist(), strict=True):
        weights[max(source + 1, begins[owner])] = weight  # an answer's first token is predicted by what it shares
    return weights


def _tokens(ids: Sequence[int], weights: Sequence[float], tokenizer: Any) -> list[Token]:
    found, waiting = [], list[int]()
    for token, weight in zip(ids, weights, strict=True):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd") or len(waiting) > 4
        found.append(Token(text if whole else "", weight))
        waiting = [] if whole else waiting
    return found


def histogram(lengths: Sequence[int], max_length: int) -> list[tuple[int, int, int]]:
    """(from, to, how many): tokens of the rows, in equal steps from the shortest to the longest."""
    low = min(max_length, min(lengths, default=1))
    top = max(low, min(max_length, max(lengths, default=1)))
    step = -(-(top - low + 1) // BUCKETS)
    counts = np.bincount([min((length - low) // step, BUCKETS - 1) for length in lengths], minlength=-(-(top - low + 1) // step))
    return [(low + i * step, low + (i + 1) * step - 1, int(n)) for i, n in enumerate(counts)]
