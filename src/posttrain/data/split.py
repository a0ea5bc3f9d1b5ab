"""Which rows of a source are trained on and which are held out, each read as it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, islice

from posttrain.config.schema import DataConfig, SourceConfig
from posttrain.data.chat.loss_weights import row_weight
from posttrain.data.formats import check_fits, recognise, to_canonical
from posttrain.data.held_out import HeldOut
from posttrain.data.overlaps import Overlaps
from posttrain.data.row_use import RowUse
from posttrain.data.rows import CanonicalRow, Row
from posttrain.data.sources.source import NumberedRow, place, read_rows, row_name
from posttrain.data.stats import SourceStats
from posttrain.errors import UserError, did_you_mean

Canonical = tuple[int, CanonicalRow]  # with its number in the source


class Split:
    """The rows of a source that are trained on, each as it is needed, those held out, and the format of both.

    held: what became of rows on the way to that. left_out: rows that are not among them (see data/left_out.py).
    """

    def __init__(
        self, source: SourceConfig, data: DataConfig, use: RowUse, first: bool = True, left_out: Overlaps | None = None
    ) -> None:
        """first: of the sources; from others nothing is held out. Raises UserError for a format that `use` does not take."""
        self.filtered = 0  # rows left out for their quality, so far
        self.left_out = left_out or Overlaps()
        self._apart: list[NumberedRow] | None = None
        builtin = source.path.startswith("builtin:")
        if first and (data.eval_path or builtin):
            other = (data.eval_path, source.split) if data.eval_path else (source.path, "eval")
            self._apart = list(islice(read_source(source, *other, few=True), data.eval_rows))
        drops = data.eval_rest == "drop"  # as version 0.1 did, in every source
        share = 0.0 if builtin or self._apart is not None or not (first or drops) else data.eval_share
        self._holds = partial(HeldOut, share, data.eval_rows, drops)
        self.held, self._rest = self._sifted(source)
        best = self._rest if source.quality != "filter" else self._best(source)
        train = islice(best, source.skip_rows, source.max_rows and source.skip_rows + source.max_rows)
        before = list(_until_sound(train, data.on_error == "skip"))
        first_row = before[-1][1] if before else None
        if isinstance(first_row, UserError):
            raise UserError(f"data.path: none of the {len(before)} rows of {source.path} can be read; the first: {before[0][1]}")
        if first_row is None:
            raise UserError(f"data.path: {source.path} leaves no row to train on; lower data.eval_share (now {data.eval_share})")
        self.shape = source.shape if source.shape != "auto" else recognise(first_row)
        check_fits(self.shape, use, source.path)
        gone = self.left_out.numbers
        self.train: Iterator[NumberedRow] = (row for row in chain(before, train) if row[0] not in gone)

    @property
    def held_so_far(self) -> list[NumberedRow]:
        """The rows that were held out up to here."""
        return self.held.rows if self._apart is None else self._apart

    def held_out(self) -> list[NumberedRow]:
        """At most data.eval_rows; call it when `train` has been read as far as it will be."""
        while self._apart is None and not self.held.full and next(self._rest, None):
            pass
        return self.held_so_far

    def _sifted(self, source: SourceConfig) -> tuple[HeldOut, Iterator[NumberedRow]]:
        """What will be held out, and the other rows."""
        few = source.max_rows is not None and source.quality != "filter"
        held = self._holds()
        return held, held.sift(read_source(source, source.path, source.split, few))

    def _best(self, source: SourceConfig) -> Iterator[NumberedRow]:
        """The share data.quality_top of the rows to train on, by their `quality`, and of equal ones by a hash: the file is gone
        through once before."""
        _, before = self._sifted(source)
        worth = sorted((_worth(row) for _, row in before if isinstance(row, dict)), reverse=True)
        kept = worth[: max(1, round(source.quality_top * len(worth)))]
        least = kept[-1] if kept else (0.0, 0.0)
        left = kept.count(least)  # of rows that are the same in all
        for number, row in self._rest:
            worthy = isinstance(row, UserError) or _worth(row)
            if worthy is True or worthy > least or (worthy == least and left):
                left -= worthy == least
                yield number, row
            else:
                self.filtered += 1


def plain(data: DataConfig) -> DataConfig:
    """The same, with all rows in it that repeat others or are known from test sets."""
    return data.model_copy(update={"dedupe": "none", "decontaminate": None})


def sound_ones(rows: Iterable[NumberedRow], source: str, shape: str) -> Iterator[Canonical]:
    """Canonical rows without those with a mistake, which are spoken of where they are tokenised."""
    return sound_rows(rows, shape, SourceStats(source, shape, ""), skips=True)


def _worth(row: Row) -> tuple[float, float]:
    return quality_of(row), place(row)


def sound_rows(rows: Iterable[NumberedRow], shape: str, stats: SourceStats, skips: bool) -> Iterator[Canonical]:
    """Canonical rows; one with a mistake in it raises UserError, or with `skips` is counted in the stats."""
    for number, row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            yield number, to_canonical(row, shape, where=stats.where(number))
        except UserError as error:
            said = f"{error}{_other_shape(row, shape)}"
            if not skips:
                raise UserError(said) from error
            stats.note("skipped", said)


def _other_shape(row: Row | UserError, shape: str) -> str:
    """What to say of a row that could be read if it were not among rows of another format."""
    try:
        other = shape if isinstance(row, UserError) else recognise(row)
    except UserError:
        return ""
    return (
        "" if other == shape else f"; it is of shape {other} among rows of shape {shape}: mix them by data=mix, a source for each"
    )


def _until_sound(rows: Iterator[NumberedRow], skips: bool) -> Iterator[NumberedRow]:
    """Up to the first row that can be read. Raises what is wrong with an earlier one, unless such rows are skipped."""
    for item in rows:
        if isinstance(item[1], UserError) and not skips:
            raise item[1]
        yield item
        if not isinstance(item[1], UserError):
            return


def read_source(source: SourceConfig, path: str, split: str, few: bool) -> Iterator[NumberedRow]:
    """Rows of `path`, read as those of `source`: under the names that formats know, with data.quality=weight as their weight. One
    that cannot be read is an error."""
    for number, row in read_rows(path, subset=source.subset, split=split, revision=source.revision, few=few, sound=False):
        try:
            yield number, _renamed(row, source) if isinstance(row, dict) else row
        except UserError as error:
            yield number, UserError(f"{row_name(path, number)}: {error}")


def _renamed(row: Row, source: SourceConfig) -> Row:
    for name, theirs in (source.columns or {}).items():
        if theirs not in row:
            raise UserError(f"has no {theirs}, which data.columns.{name} names{did_you_mean(theirs, list(row))}")
    named = {name: row[theirs] for name, theirs in (source.columns or {}).items()}
    if named:
        theirs = set((source.columns or {}).values())
        row = {k: v for k, v in row.items() if k not in theirs} | named
    if source.quality:
        quality = quality_of(row)
        row = {**row, "weight": quality * row_weight(row)} if source.quality == "weight" else row
    return row


def quality_of(row: Row) -> float:
    """Raises UserError where the column is not a number from 0 on."""
    value = row.get("quality")
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"quality is {value!r}, not a number from 0 on; data.columns.quality=NAME names another column")
    return float(value)
