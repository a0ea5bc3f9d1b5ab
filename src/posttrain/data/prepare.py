"""From a data config to tokenised train and held-out examples, with an account of every row."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from posttrain.config.schema import DataConfig, Source
from posttrain.console import Meter
from posttrain.data import examples as store
from posttrain.data.builtin import builtin_rows
from posttrain.data.choice import sources_of
from posttrain.data.conversations import Encoder
from posttrain.data.examples import Examples
from posttrain.data.parallel import in_order
from posttrain.data.shapes import check_fits, recognise, to_canonical
from posttrain.data.sources import Row, fingerprint, read_rows, row_name, split_rows
from posttrain.data.weights import row_weight
from posttrain.errors import UserError, did_you_mean

Canonical = tuple[int, dict[str, Any]]  # number in the source, canonical row
PIECE = 1024  # rows that are tokenised, and for documents packed, together
NAMED = 20  # rows of each kind that an account names


@dataclass
class Account:
    """What became of a source's rows; goes into the manifest. places: the first rows that were cut, left out or skipped."""

    source: str
    shape: str
    fingerprint: str
    rows: int = 0
    tokens: int = 0
    bytes: int = 0  # of the rows' texts
    trained_tokens: int = 0
    truncated: int = 0  # rows cut to max_length (documents are split instead, and lose nothing)
    untrained: int = 0  # rows left out because no token of theirs would count
    border_tokens: int = 0  # tokens across the border of prompt and answer; they do not count
    filtered: int = 0  # rows left out for their quality
    skipped: int = 0  # rows with a mistake in them, with data.on_error=skip
    places: dict[str, list[str]] = field(default_factory=dict)

    def where(self, number: int) -> str:
        return row_name(self.source, number)

    def note(self, what: str, place: str) -> None:
        """Count a row as truncated, untrained or skipped."""
        setattr(self, what, getattr(self, what) + 1)
        self.places[what] = [*self.places.get(what, []), place][:NAMED]

    def add(self, other: Account) -> None:
        """Count another piece of the same source."""
        for name, value in asdict(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for what, found in other.places.items():
            self.places[what] = [*self.places.get(what, []), *found][:NAMED]


@dataclass(frozen=True)
class Part:
    """One source, tokenised. key names all of it: rows, split, tokenizer, options, code."""

    name: str
    train: Examples
    held_out: Examples
    account: Account
    held_out_account: Account
    key: str


@dataclass(frozen=True)
class Piece:
    """What turns rows of one source into examples; sent to other processes as it is."""

    source: str
    shape: str
    stage: str
    encoder: Encoder
    max_length: int
    skips: bool  # rows with a mistake are counted, not an end

    def examples(self, rows: list[Row]) -> tuple[Examples, Account]:
        account = Account(self.source, self.shape, "")
        sound = list(sound_rows(rows, self.shape, account, self.skips))
        try:
            found, counted = self._encoded(sound)
        except UserError:
            if not self.skips:
                raise
            found, counted = self._encoded([row for row in sound if self._encodes(row, account)])
        account.add(counted)
        return found, account

    def _encoded(self, rows: list[Canonical]) -> tuple[Examples, Account]:
        account = Account(self.source, self.shape, "")
        return encode(rows, self.stage, self.encoder, self.max_length, account), account

    def _encodes(self, row: Canonical, account: Account) -> bool:
        try:
            self._encoded([row])
        except UserError as error:
            account.note("skipped", str(error))
            return False
        return True


def prepare(data: DataConfig, stage: str, encoder: Encoder, max_length: int, cache: Path) -> list[Part]:
    """Read, check, split and tokenise every source of `data` for `stage`, or read it back from the cache.

    Raises UserError for anything wrong with the data, naming file and row.
    """
    return [
        prepare_source(name, source, data, stage, encoder, max_length, cache, first=not i)
        for i, (name, source) in enumerate(sources_of(data).items())
    ]


def held_out_of(data: DataConfig, stage: str, encoder: Encoder, max_length: int, cache: Path) -> Examples:
    """The rows that a run of `data` holds out."""
    name, source = next(iter(sources_of(data).items()))
    return prepare_source(name, source, data, stage, encoder, max_length, cache, first=True).held_out


def held_out_rows(data: DataConfig, stage: str, encoder: Encoder, max_length: int) -> Examples:
    """The same, tokenised anew: for another weighing."""
    source = next(iter(sources_of(data).values()))
    split = Split(source, data, stage, data.eval_path)
    deque(split.train, maxlen=0)  # past what is trained on, as far as that goes
    where = data.eval_path or source.path
    return Piece(where, split.shape, stage, encoder, max_length, data.on_error == "skip").examples(split.held_out())[0]


def prepare_source(
    name: str, source: Source, data: DataConfig, stage: str, encoder: Encoder, max_length: int, cache: Path, first: bool
) -> Part:
    """One source. first: the one with data.eval_path."""
    eval_path = data.eval_path if first else None
    marks = [fingerprint(p, source.subset, source.split, source.revision) for p in (source.path, eval_path) if p]
    options = source.model_dump(include=set(Source.model_fields) - {"path"})
    options |= data.model_dump(include={"eval_share", "eval_rows", "max_untrained_share", "on_error"})
    key = _key(marks, options, stage, encoder, max_length)
    path = cache / "data" / key
    if not (path / "report.json").exists():
        _tokenise(name, source, data, stage, encoder, max_length, path, marks[0], eval_path)
    parts, report = store.load(path)
    accounts = {part: Account(**fields) for part, fields in report.items()}
    return Part(name, parts["train"], parts["held_out"], accounts["train"], accounts["held_out"], key)


def _tokenise(
    name: str, source: Source, data: DataConfig, stage: str, encoder: Encoder, max_length: int, path: Path, mark: str,
    eval_path: str | None,
) -> None:  # fmt: skip
    split = Split(source, data, stage, eval_path)
    shape, skips = split.shape, data.on_error == "skip"
    account, held_account = Account(source.path, shape, mark), Account(eval_path or source.path, shape, mark)
    work = Piece(source.path, shape, stage, encoder, max_length, skips)
    with store.Store(path) as out:
        with Meter(f"reading {name}", None) as meter:
            for found, counted in in_order(work.examples, _pieces(split.train)):
                out.add("train", found)
                account.add(counted)
                meter.advance(f"{account.tokens:,} tokens", by=counted.rows)
        found, counted = Piece(held_account.source, shape, stage, encoder, max_length, skips).examples(split.held_out())
        out.add("held_out", found)
        held_account.add(counted)
        account.filtered = split.filtered
        _refuse_untrained(account, data.max_untrained_share)
        out.close({"train": asdict(account), "held_out": asdict(held_account)})


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while piece := list(islice(rows, PIECE)):
        yield piece


def prepare_set(path: str, rows: int, encoder: Encoder, max_length: int) -> tuple[Examples, str]:
    """An evaluation set by its path alone: tokenised, with its kind (text, conversation or pairs)."""
    found = builtin_rows(path.removeprefix("builtin:"), "eval") if path.startswith("builtin:") else None
    raw = enumerate(found, 1) if found is not None else read_rows(path)
    chosen = list(islice(raw, rows))
    first = chosen[0][1]
    assert isinstance(first, dict)  # read_rows has raised what is wrong with it
    kind = recognise(first)
    stage = {"text": "cpt", "pairs": "dpo"}.get(kind, "sft")
    examples, _ = Piece(path, kind, stage, encoder, max_length, skips=False).examples(chosen)
    return examples, {"cpt": "text", "dpo": "pairs"}.get(stage, "conversation")


class Split:
    """The rows of a source that are trained on, each as it is needed, those held out, and the shape of both."""

    def __init__(self, source: Source, data: DataConfig, stage: str, eval_path: str | None = None) -> None:
        """Raises UserError for a shape that `stage` does not take."""
        self._most, self._held = data.eval_rows, list[Row]()
        self.filtered = 0  # rows left out for their quality, so far
        read = partial(_read, source)
        apart = eval_path or source.path.startswith("builtin:")
        self._marked = split_rows(read(source.path, split=source.split), 0.0 if apart else data.eval_share)
        if apart:
            other = read(eval_path, split=source.split) if eval_path else read(source.path, split="eval")
            self._held = list(islice(other, self._most))
        self._last = source.max_rows and source.skip_rows + source.max_rows
        best = self._not_held() if source.quality != "filter" else self._best(_read(source, source.path, source.split), source)
        train = islice(best, source.skip_rows, self._last)
        before = list(_until_sound(train, data.on_error == "skip"))
        first = before[-1][1] if before else None
        if isinstance(first, UserError):
            raise UserError(f"data.path: none of the {len(before)} rows of {source.path} can be read; the first: {before[0][1]}")
        if first is None:
            raise UserError(f"data.path: {source.path} leaves no row to train on; lower data.eval_share (now {data.eval_share})")
        self.shape = source.shape if source.shape != "auto" else recognise(first)
        check_fits(self.shape, stage)
        self.train: Iterator[Row] = chain(before, train)

    @property
    def held_so_far(self) -> list[Row]:
        return self._held

    def held_out(self) -> list[Row]:
        """At most data.eval_rows; call it when `train` has been read as far as it will be."""
        for _ in self._not_held() if len(self._held) < self._most else ():
            if len(self._held) >= self._most:
                break
        return self._held

    def _best(self, again: Iterator[Row], source: Source) -> Iterator[Row]:
        """The share data.quality_top of the rows, by their `quality`: the file is gone through once before."""
        qualities = sorted((quality_of(row) for _, row in again if isinstance(row, dict)), reverse=True)
        least = qualities[max(1, round(source.quality_top * len(qualities))) - 1] if qualities else 0.0
        for number, row in self._not_held():
            if isinstance(row, UserError) or quality_of(row) >= least:
                yield number, row
            else:
                self.filtered += 1

    def _not_held(self) -> Iterator[Row]:
        for held, row in self._marked:
            if not held:
                yield row
            elif len(self._held) < self._most:
                self._held.append(row)


def _read(source: Source, path: str, split: str) -> Iterator[Row]:
    """Rows under the names that shapes know, with data.quality=weight as their weight; one that cannot be read is an error."""
    for number, row in read_rows(path, subset=source.subset, split=split, revision=source.revision, sound=False):
        try:
            yield number, _renamed(row, source) if isinstance(row, dict) else row
        except UserError as error:
            yield number, UserError(f"{row_name(path, number)}: {error}")


def _renamed(row: dict[str, Any], source: Source) -> dict[str, Any]:
    for name, theirs in (source.columns or {}).items():
        if theirs not in row:
            raise UserError(f"has no {theirs}, which data.columns.{name} names{did_you_mean(theirs, list(row))}")
    named = {name: row[theirs] for name, theirs in (source.columns or {}).items()}
    if named:
        row = {k: v for k, v in row.items() if k not in named.values()} | named
    if source.quality:
        quality = quality_of(row)
        row = {**row, "weight": quality * row_weight(row)} if source.quality == "weight" else row
    return row


def quality_of(row: dict[str, Any]) -> float:
    """Raises UserError where the column is not a number from 0 on."""
    value = row.get("quality")
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"quality is {value!r}, not a number from 0 on; data.columns.quality=NAME names another column")
    return float(value)


def _until_sound(rows: Iterator[Row], skips: bool) -> Iterator[Row]:
    """Up to the first row that can be read. Raises what is wrong with an earlier one, unless such rows are skipped."""
    for item in rows:
        if isinstance(item[1], UserError) and not skips:
            raise item[1]
        yield item
        if not isinstance(item[1], UserError):
            return


def canonical_rows(data: DataConfig, stage: str) -> list[Canonical]:
    """All rows to train on of the first source, as `stage` takes them. Raises UserError for rows that it does not take."""
    source = next(iter(sources_of(data).values()))
    split = Split(source, data, stage)
    return list(sound_rows(split.train, split.shape, Account(source.path, split.shape, ""), data.on_error == "skip"))


def sound_rows(rows: Iterable[Row], shape: str, account: Account, skips: bool) -> Iterator[Canonical]:
    """Canonical rows; one with a mistake in it raises UserError, or with `skips` is counted in the account."""
    for number, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            yield number, to_canonical(row, shape, where=account.where(number))
        except UserError as error:
            if not skips:
                raise
            account.note("skipped", str(error))


def encode(rows: list[Canonical], stage: str, encoder: Encoder, max_length: int, account: Account) -> Examples:
    """Canonical rows -> examples of one stage; fills in `account`."""
    account.rows = len(rows)
    account.bytes = sum(_letters(row) for _, row in rows)
    build = {"cpt": _documents, "dpo": _pairs, "rm": _scored_pairs, "ppo": _prompts}.get(stage, _conversations)
    found = build(encoder, rows, max_length, account)
    account.tokens = found.num_tokens
    account.trained_tokens = int((found.weights[:] != 0).sum())  # pyright: ignore[reportCallIssue, reportArgumentType]
    return found


def _letters(value: Any) -> int:
    """Bytes of all texts in a row; of letters beyond ASCII about so many."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_letters, values))


def _documents(encoder: Encoder, rows: list[Canonical], max_length: int, account: Account) -> Examples:
    pieces = []
    for (number, _), item in zip(rows, encoder.encode_many(rows, account.where), strict=True):
        for start in range(0, len(item.tokens), max_length):
            stop = start + max_length
            if len(item.tokens[start:stop]) > 1:  # a lone token predicts nothing and is predicted by nothing
                pieces.append((item.tokens[start:stop], item.weights[start:stop], number))
    return store.group(store.build(pieces), max_length)


def _conversations(encoder: Encoder, rows: list[Canonical], max_length: int, account: Account) -> Examples:
    kept = []
    for number, row in rows:
        if "messages" in row and all(message["role"] != "assistant" for message in row["messages"]):
            raise UserError(f"{account.where(number)}: has no assistant's turn, so there is nothing to learn; drop the row")
    for (number, _), item in zip(rows, encoder.encode_many(rows, account.where), strict=True):
        if len(item.tokens) > max_length:
            account.note("truncated", account.where(number))
        account.border_tokens += item.borders
        tokens, weights = item.tokens[:max_length], item.weights[:max_length]
        if any(weights[1:]):
            kept.append((tokens, weights, number))
        else:
            account.note("untrained", account.where(number))
    return store.build(kept)


def _scored_pairs(encoder: Encoder, rows: list[Canonical], max_length: int, account: Account) -> Examples:
    """As `_pairs`, but an answer ends with its end of turn, where it is scored: what a template puts after it is left out."""
    return _pairs(encoder, rows, max_length, account, to_the_end=True)


def _prompts(encoder: Encoder, rows: list[Canonical], max_length: int, account: Account) -> Examples:
    """Prompts, up to where the assistant begins to write, and the answers known to them; prompts of more than max_length tokens
    are left out."""
    kept, splits = [], []
    for number, row in rows:
        tokens = encoder.encode_prompt(row, where=account.where(number))
        if len(tokens) <= max_length:
            known = encoder.encode_reference(row)
            kept.append(([*tokens, *known], [0.0] * (len(tokens) + len(known)), number))
            splits.append((len(tokens), len(tokens) + len(known)))
        else:
            account.note("untrained", account.where(number))
    return store.build(kept, splits)


def _pairs(encoder: Encoder, rows: list[Canonical], max_length: int, account: Account, to_the_end: bool = False) -> Examples:
    kept, splits, margins = [], [], []
    for number, row in rows:
        pair = encoder.encode_pair(row, where=account.where(number))
        room = max_length - len(pair.prompt)
        answers = (pair.chosen, pair.rejected)
        if any(len(a.tokens) > room for a in answers):
            account.note("truncated", account.where(number))
        account.border_tokens += sum(a.borders for a in answers)
        lengths = [min(max(room, 0), a.last_trained + 1 if to_the_end else len(a.tokens)) for a in answers]
        cut = [(a.tokens[:length], a.weights[:length]) for a, length in zip(answers, lengths, strict=True)]
        if not pair.prompt or not all(any(weights) for _, weights in cut):
            account.note("untrained", account.where(number))
            continue
        (chosen, w_chosen), (rejected, w_rejected) = cut
        tokens = [*pair.prompt, *chosen, *rejected]
        kept.append((tokens, [0.0] * len(pair.prompt) + [*w_chosen, *w_rejected], number))
        splits.append((len(pair.prompt), len(pair.prompt) + len(chosen)))
        margins.append(float(row.get("margin", 0.0)))
    return store.build(kept, splits, margins)


def _refuse_untrained(account: Account, allowed: float) -> None:
    if account.untrained == account.rows or account.untrained > allowed * account.rows:
        raise UserError(
            f"data.path: {account.untrained} of {account.rows} rows of {account.source} have no token to train on "
            f"(prompts longer than train.max_length, or empty answers); raise train.max_length or data.max_untrained_share"
        )


def _key(marks: list[str], options: dict[str, Any], stage: str, encoder: Encoder, max_length: int) -> str:
    """Content, options, tokenizer, and this package's own code: whatever could change a token or a weight."""
    code = [p.read_text() for p in sorted(Path(__file__).parent.glob("*.py"))]
    parts = [marks, options, stage, encoder.identity, asdict(encoder.weighing), max_length, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
