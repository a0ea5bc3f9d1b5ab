"""Canonical rows -> examples of a kind: tokens, what each counts, and where answers begin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.chat.encoded import parted
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import row_weight
from posttrain.data.chat.marks import is_learnt
from posttrain.data.examples import Examples, build, by_row, group, with_columns
from posttrain.data.likeness import key_of
from posttrain.data.overlaps import rows_of
from posttrain.data.row_use import RowUse
from posttrain.data.rows import labelled_answers
from posttrain.data.sources.source import NumberedRow
from posttrain.data.split import Canonical, sound_rows
from posttrain.data.stats import SourceStats
from posttrain.errors import UserError


@dataclass(frozen=True)
class RowEncoder:
    """What turns rows of one source into examples; sent to other processes as it is."""

    source: str
    shape: str
    use: RowUse
    encoder: Encoder
    max_length: int
    skips: bool  # rows with a mistake are counted, not an end

    def __post_init__(self) -> None:
        if self.use.examples not in EXAMPLE_KINDS:
            known = ", ".join(EXAMPLE_KINDS)
            raise UserError(f"{self.use.name}: there is no kind of examples '{self.use.examples}' (there are: {known})")

    def examples(self, rows: list[NumberedRow]) -> tuple[Examples, SourceStats]:
        """Rows as examples, with counts of what was read, cut and left out."""
        found, stats, _ = self.read(rows)
        return found, stats

    def read(self, rows: list[NumberedRow]) -> tuple[Examples, SourceStats, NDArray[np.int64]]:
        """The same, with the number and the key of each row (see `key_of`): int64 [n, 2]."""
        stats = SourceStats(self.source, self.shape, "")
        sound = list(sound_rows(rows, self.shape, stats, self.skips))
        try:
            found, counted = self._encoded(sound)
        except UserError:
            if not self.skips:
                raise
            found, counted = self._encoded([row for row in sound if self._encodes(row, stats)])
        stats.add(counted)
        if self.use.examples == "prompts":
            found = with_columns(found, {number: row for number, row in rows if isinstance(row, dict)})
        return found, stats, rows_of([(number, key_of(row)) for number, row in sound])

    def _encoded(self, rows: list[Canonical]) -> tuple[Examples, SourceStats]:
        stats = SourceStats(self.source, self.shape, "")
        return encode(rows, self.use.examples, self.encoder, self.max_length, stats), stats

    def _encodes(self, row: Canonical, stats: SourceStats) -> bool:
        try:
            self._encoded([row])
        except UserError as error:
            stats.note("skipped", str(error))
            return False
        return True


def encode(rows: list[Canonical], kind: str, encoder: Encoder, max_length: int, stats: SourceStats) -> Examples:
    """Canonical rows -> examples of one of EXAMPLE_KINDS; fills in `stats`."""
    stats.rows = len(rows)
    stats.bytes = sum(_text_bytes({name: value for name, value in row.items() if name != "columns"}) for _, row in rows)
    stats.unused = dict(Counter(name for _, row in rows for name in row.get("columns", ())))
    stats.templated = sum(encoder.options.renders(row) for _, row in rows)
    found = EXAMPLE_KINDS[kind](encoder, rows, max_length, stats)
    stats.tokens = found.num_tokens
    stats.trained_tokens = int((found.weights[:] != 0).sum())  # pyright: ignore[reportCallIssue, reportArgumentType]
    return found


def _text_bytes(value: Any) -> int:
    """Bytes of all texts in a row; of letters beyond ASCII about so many."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_text_bytes, values))


def _documents(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats) -> Examples:
    pieces = []
    for (number, _), item in zip(rows, encoder.encode_many(rows, stats.where), strict=True):
        for start in range(0, len(item.tokens), max_length):
            stop = start + max_length
            if len(item.tokens[start:stop]) > 1:  # a lone token predicts nothing and is predicted by nothing
                pieces.append((item.tokens[start:stop], item.weights[start:stop], number))
    return group(build(pieces), max_length)


def _conversations(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats) -> Examples:
    kept = []
    for number, _ in (unwanted := [row for row in rows if row[1].get("label") is False]):
        stats.note("disliked", stats.where(number))
    rows = [row for row in rows if row not in unwanted] if unwanted else rows
    roles = encoder.options.roles
    for number, row in rows:
        if "messages" in row and not any(is_learnt(message, roles) for message in row["messages"]):
            whose = "assistant's turn" if roles == {"assistant"} else f"message of {', '.join(sorted(roles))} (data.train_on)"
            raise UserError(f"{stats.where(number)}: has no {whose}, so there is nothing to learn; drop the row")
    rows = [(number, each) for number, row in rows for each in encoder.options.examples_of(row)]
    for (number, _), item in zip(rows, encoder.encode_many(rows, stats.where), strict=True):
        stats.note_lost([part.name for part in item.lost], stats.where(number))
        first, answer = item.first_word, len(item.tokens) - max(item.first_word, 0)
        prompt = _fitting(item.tokens[: max(first, 0)], answer, max_length, encoder, stats, number)
        cut = max(first, 0) - len(prompt)
        whole, counts = [*prompt, *item.tokens[max(first, 0) :]], item.weights[cut:]
        if len(whole) > max_length:
            stats.note("truncated", stats.where(number))
        stats.border_tokens += item.borders
        if 0 < first - cut < max_length:
            kept.append((whole[:max_length], counts[:max_length], number))
        else:
            stats.no_room += first - cut >= max_length
            stats.note("untrained", stats.where(number))
    found = build(kept)
    return by_row(found, max_length) if encoder.options.turns == "each" else found


def _fitting(prompt: list[int], answer: int, most: int, encoder: Encoder, stats: SourceStats, number: int) -> list[int]:
    """A prompt that leaves an answer no room, without its beginning, if that is asked for: then the answer's tokens fit, or
    the prompt fills half of what there is. Any other as it is."""
    if encoder.options.long_prompts == "drop" or len(prompt) < (most if answer else most + 1):
        return prompt
    stats.note("cut_prompts", stats.where(number))
    start = encoder.start if prompt[:1] == encoder.start else []
    left = max(most - answer, most // 2) - len(start)
    return [*start, *prompt[len(prompt) - left :]]


def _scored_pairs(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats) -> Examples:
    """As `_pairs`, but an answer ends with its end of turn, where it is scored: what a template puts after it is left out."""
    return _pairs(encoder, rows, max_length, stats, to_the_end=True)


def _prompts(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats) -> Examples:
    """Prompts, up to where the assistant begins to write, and the answers known to them; prompts of more than max_length tokens
    are left out, or cut."""
    kept, splits = [], []
    for (number, _), (tokens, known, lost) in zip(rows, encoder.encode_prompts(rows, stats.where), strict=True):
        stats.note_lost([part.name for part in lost], stats.where(number))
        tokens = _fitting(tokens, 0, max_length, encoder, stats, number)
        if len(tokens) <= max_length:
            kept.append(([*tokens, *known], [0.0] * (len(tokens) + len(known)), number))
            splits.append((len(tokens), len(tokens) + len(known)))
        else:
            stats.no_room += 1
            stats.note("untrained", stats.where(number))
    return build(kept, splits)


def _pairs(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats, to_the_end: bool = False) -> Examples:
    kept, splits, margins, pair_weights = [], [], [], []
    for (number, row), pair in zip(rows, encoder.encode_pairs(rows, stats.where), strict=True):
        answers = (pair.chosen, pair.rejected)
        prompt = _fitting(pair.prompt, max(len(a.tokens) for a in answers), max_length, encoder, stats, number)
        room = max_length - len(prompt)
        stats.note_lost(dict.fromkeys(part.name for a in answers for part in a.lost), stats.where(number))
        if any(len(a.tokens) > room for a in answers):
            stats.note("truncated", stats.where(number))
        stats.border_tokens += sum(a.borders for a in answers)
        lengths = [min(max(room, 0), a.last_trained + 1 if to_the_end else len(a.tokens)) for a in answers]
        cut = [(a.tokens[:length], a.weights[:length]) for a, length in zip(answers, lengths, strict=True)]
        worded = any(0 <= a.first_word < length for a, length in zip(answers, lengths, strict=True))
        (chosen, w_chosen), (rejected, w_rejected) = cut
        if not prompt or not pair.weight or not worded or not any(w_chosen) or not any(w_rejected):
            stats.no_room += room <= 0
            stats.note("untrained", stats.where(number))
            continue
        if to_the_end and any(a.last_trained >= room for a in answers):
            stats.note("endless", stats.where(number))
            continue
        if chosen == rejected:
            stats.note("alike", stats.where(number))
            continue
        kept.append(([*prompt, *chosen, *rejected], [0.0] * len(prompt) + [*w_chosen, *w_rejected], number))
        splits.append((len(prompt), len(prompt) + len(chosen)))
        margins.append(float(row.get("margin", 0.0)))
        pair_weights.append(pair.weight)
    return build(kept, splits, margins, pair_weights)


def _labelled(encoder: Encoder, rows: list[Canonical], max_length: int, stats: SourceStats) -> Examples:
    """Answers that are each good or not: of rows with a label, and both of a pair."""
    kept, splits, labels, weights = [], [], [], []
    asked = [(number, each) for number, row in rows for each in labelled_answers(row, stats.where(number))]
    plain = [(number, row | {"weight": 1.0}) for number, row in asked]  # a row's weight is of the answer, not of its tokens
    for (number, row), whole in zip(asked, encoder.encode_many(plain, stats.where), strict=True):
        prompt, answer = parted(whole)
        prompt = _fitting(prompt, len(answer.tokens), max_length, encoder, stats, number)
        room = max(max_length - len(prompt), 0)
        stats.note_lost([part.name for part in answer.lost], stats.where(number))
        stats.border_tokens += answer.borders
        if len(answer.tokens) > room:
            stats.note("truncated", stats.where(number))
        if not prompt or not row_weight(row) or not 0 <= answer.first_word < room:
            stats.no_room += not room
            stats.note("untrained", stats.where(number))
            continue
        tokens = [*prompt, *answer.tokens[:room]]
        kept.append((tokens, [0.0] * len(prompt) + answer.weights[:room], number))
        splits.append((len(prompt), len(tokens)))
        labels.append(1.0 if row["label"] else -1.0)
        weights.append(row_weight(row))
    return build(kept, splits, labels, weights)


EXAMPLE_KINDS: dict[str, Callable[[Encoder, list[Canonical], int, SourceStats], Examples]] = {
    "documents": _documents,
    "conversations": _conversations,
    "pairs": _pairs,
    "scored_pairs": _scored_pairs,
    "labelled": _labelled,
    "prompts": _prompts,
}
