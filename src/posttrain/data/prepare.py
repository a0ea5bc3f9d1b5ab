"""From a data config to tokenised train and held-out examples, with an stats of every row."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posttrain.config.schema import DataConfig, SourceConfig
from posttrain.console import Meter
from posttrain.data import example_store as store
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import options_of
from posttrain.data.example_kinds import RowEncoder
from posttrain.data.examples import Examples
from posttrain.data.formats import FORMATS, guest_files, recognise
from posttrain.data.left_out import LeftOut
from posttrain.data.overlaps import compared, pieces
from posttrain.data.parallel import in_order
from posttrain.data.row_use import RowUse
from posttrain.data.selection import sources_of
from posttrain.data.sources.source import fingerprint
from posttrain.data.split import Canonical, Split, plain, read_source, sound_rows
from posttrain.data.stats import SourceStats
from posttrain.errors import UserError
from posttrain.runs.cache import cached_directory
from posttrain.runs.cache_place import release

# what an evaluation makes of rows; the names are the kinds of evaluation sets
EVAL_USES = (
    RowUse("text", ("text",), "documents", "a text column"),
    RowUse("conversation", ("messages", "prompt_completion"), "conversations", "messages, or prompt and completion"),
    RowUse("pairs", ("pairs",), "pairs", "prompt, chosen and rejected"),
)


@dataclass(frozen=True)
class PreparedSource:
    """One source, tokenised. key names what it was made from: rows, split, tokenizer, options, code. content names what came of
    it: tokens, weights and their order. read, held_read: number and key of each row, int64 [n, 2]."""

    name: str
    train: Examples
    held_out: Examples
    stats: SourceStats
    held_out_stats: SourceStats
    read: NDArray[np.int64]
    held_read: NDArray[np.int64]
    key: str = ""
    content: str = ""


def prepare(data: DataConfig, use: RowUse, encoder: Encoder, max_length: int, cache: Path) -> list[PreparedSource]:
    """Read, check, split and tokenise every source of `data` for `use`, or read it back from the cache.

    Raises UserError for anything wrong with the data, naming file and row.
    """
    left_out, parts = LeftOut(data, use), list[PreparedSource]()
    for name in sources_of(data):
        before = [part.key for part in parts] if data.dedupe != "none" else []
        parts.append(_prepare_source(name, data, use, encoder, max_length, cache, left_out, before))
    note_overlaps(parts)
    return parts


def note_overlaps(parts: list[PreparedSource]) -> None:
    """Count in each source's stats the rows that repeat others, of any source, and those that are held out as well."""
    found = compared({part.name: part.read for part in parts}, parts[0].held_read)
    for part in parts:
        part.stats.note_overlaps(found[part.name])


def held_out_of(data: DataConfig, use: RowUse, encoder: Encoder, max_length: int, cache: Path) -> Examples:
    """The rows that a run of `data` holds out."""
    first = next(iter(sources_of(data)))
    return _prepare_source(first, data, use, encoder, max_length, cache, LeftOut(data, use), []).held_out


def held_out_rows(data: DataConfig, use: RowUse, encoder: Encoder, max_length: int) -> Examples:
    """The same, tokenised anew: for another weighing."""
    source = next(iter(sources_of(data).values()))
    split = Split(source, plain(data), use)  # the same are held out
    deque(split.train, maxlen=0)  # past what is trained on, as far as that goes
    where, encoder = data.eval_path or source.path, encoder.reading_as(options_of(data))
    return RowEncoder(where, split.shape, use, encoder, max_length, data.on_error == "skip").examples(split.held_out())[0]


def _prepare_source(
    name: str, data: DataConfig, use: RowUse, encoder: Encoder, max_length: int, cache: Path, left_out: LeftOut, before: list[str]
) -> PreparedSource:  # fmt: skip
    """One source. before: keys of the sources that decide what is left out of it."""
    sources = sources_of(data)
    source, first = sources[name], name == next(iter(sources))
    eval_path = data.eval_path if first else None
    if use.examples != "conversations" and (data.turns, data.train_on) != ("all", "assistant"):
        raise UserError(f"data.train_on and data.turns say which turns sft learns; {use.name} learns answers, so leave both out")
    encoder = encoder.reading_as(options_of(data))
    marks = [fingerprint(p, source.subset, source.split, source.revision) for p in (source.path, eval_path) if p]
    marks += [fingerprint(data.decontaminate, split="test")] if data.decontaminate else []
    options = source.model_dump(include=set(SourceConfig.model_fields) - {"path"}) | {"first": first, "before": before}
    options |= data.model_dump(include={"eval_share", "eval_rows", "eval_rest", "dedupe", "max_untrained_share", "on_error"})
    key = _key(marks, options, use, encoder, max_length)
    make = partial(_tokenise, name, source, data, use, encoder, max_length, marks[0], left_out, first)
    place, _ = cached_directory(cache / "data" / key, make, whole=True)
    parts, read, report, content = store.load(place)
    release(place)  # its tokens are in reach now, whoever cleans the cache
    places = {"train": source.path, "held_out": eval_path or source.path}  # the cache may be of the same content elsewhere
    stats_of = {part: SourceStats(**fields).moved(places[part]) for part, fields in report.items()}
    told = stats_of["train"], stats_of["held_out"], read["train"], read["held_out"]
    return PreparedSource(name, parts["train"], parts["held_out"], *told, key, content)


def _tokenise(
    name: str, source: SourceConfig, data: DataConfig, use: RowUse, encoder: Encoder, max_length: int, mark: str,
    left_out: LeftOut, first: bool, path: Path,
) -> str:  # fmt: skip
    """Into the new directory `path`; what it is made from."""
    split = Split(source, data, use, first, left_out.of(name))
    shape, skips = split.shape, data.on_error == "skip"
    where = data.eval_path if first and data.eval_path else source.path
    stats, held_stats = SourceStats(source.path, shape, mark), SourceStats(where, shape, mark)
    work = RowEncoder(source.path, shape, use, encoder, max_length, skips)
    out = store.Store(path)
    with Meter(f"reading {name}", None) as meter:
        for found, counted, read in in_order(work.read, pieces(split.train)):
            out.add("train", found, read)
            stats.add(counted)
            meter.advance(f"{stats.tokens:,} tokens", by=counted.rows)
    found, counted, read = RowEncoder(where, shape, use, encoder, max_length, skips).read(split.held_out())
    out.add("held_out", found, read)
    held_stats.add(counted)
    note_split(stats, split, source, 0 if first else held_stats.rows)
    if reason := refusal(stats, data.max_untrained_share):
        raise UserError(reason)
    out.close({"train": asdict(stats), "held_out": asdict(held_stats)})
    return f"{source.path}, for {use.name}"


def note_split(stats: SourceStats, split: Split, source: SourceConfig, dropped: int) -> None:
    """Count what the split has left out. dropped: rows that it has held out, though nothing is measured on them."""
    stats.note_overlaps(split.left_out)
    stats.filtered, stats.held_again, stats.held_beyond = split.filtered, split.held.repeats, split.held.dropped + dropped
    if source.quality:
        stats.unused.pop("quality", None)  # by which rows were chosen or weighted


class PreparedSet(NamedTuple):
    """Rows to measure on. kind: text, conversation or pairs."""

    examples: Examples
    kind: str
    stats: SourceStats


def prepare_set(source: str | SourceConfig, rows: int, encoder: Encoder, max_length: int, skips: bool = False) -> PreparedSet:
    """An evaluation set, tokenised: of a path alone, or of a source with its format and the names of its columns.

    skips: rows with a mistake are counted, not an end."""
    found = SourceConfig.model_validate({"path": source}) if isinstance(source, str) else source
    builtin = found.path.startswith("builtin:")
    chosen = list(islice(read_source(found, found.path, "eval" if builtin else found.split, few=True), rows))
    first = next((row for _, row in chosen if isinstance(row, dict)), chosen[0][1])
    if isinstance(first, UserError):
        raise first
    shape = found.shape if found.shape != "auto" else recognise(first)
    kind = FORMATS.get(shape).kind
    use = next((each for each in EVAL_USES if kind in each.takes), None)
    if use is None:
        takes = ", ".join(k for e in EVAL_USES for k in e.takes)
        raise UserError(f"{found.path}: no evaluation takes {shape}; give one of {takes}")
    examples, stats = RowEncoder(found.path, shape, use, encoder, max_length, skips).examples(chosen)
    if not len(examples):
        raise UserError(
            (stats.places.get("skipped") or [f"{found.path}: no row has a token that would count within {max_length}"])[0]
        )
    return PreparedSet(examples, use.name, stats)


def canonical_rows(data: DataConfig, use: RowUse) -> list[Canonical]:
    """All rows to train on of the first source, as `use` takes them. Raises UserError for rows that it does not take."""
    source = next(iter(sources_of(data).values()))
    data = data.model_copy(update={"eval_path": None})
    split = Split(source, data, use, left_out=LeftOut(data, use).of(next(iter(sources_of(data)))))
    return list(sound_rows(split.train, split.shape, SourceStats(source.path, split.shape, ""), data.on_error == "skip"))


def refusal(stats: SourceStats, allowed: float) -> str:
    """Why a run refuses these rows, empty where it does not. allowed: share of rows without a token to train on."""
    if stats.rows and stats.disliked == stats.rows:
        return f"data.path: the label of all {stats.rows} rows of {stats.source} is false, so there is nothing to learn"
    if not stats.rows and stats.elsewhere:
        which = f"all {stats.elsewhere} rows of {stats.source} are left out by data.dedupe or data.decontaminate"
        return f"data.path: {which}, for they stand elsewhere; leave the source out"
    gone = stats.untrained + stats.alike + stats.endless
    if gone < stats.rows - stats.disliked and gone <= allowed * stats.rows:
        return ""
    return (
        f"data.path: {gone} of {stats.rows} rows of {stats.source} have no token to train on (prompts longer than "
        f"train.max_length, empty answers, weights of 0{_cut_pairs(stats)}); raise train.max_length or data.max_untrained_share"
        + ("; data.long_prompts=cut cuts prompts at their beginning" if stats.no_room else "")
    )


def _cut_pairs(stats: SourceStats) -> str:
    found = ((stats.alike, "whose answers are equal when cut"), (stats.endless, "whose end of turn is cut off"))
    return "".join(f", {count} pairs {what}" for count, what in found if count)


def _key(marks: list[str], options: dict[str, Any], use: RowUse, encoder: Encoder, max_length: int) -> str:
    """Content, options, tokenizer, and the code of this room and of formats from elsewhere: whatever could change a token or a
    weight."""
    code = [p.read_text(encoding="utf-8") for p in [*sorted(Path(__file__).parent.rglob("*.py")), *guest_files()]]
    parts = [marks, options, asdict(use), encoder.identity, asdict(encoder.weighing), asdict(encoder.options), max_length, code]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
