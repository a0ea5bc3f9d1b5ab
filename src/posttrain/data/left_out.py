"""What data.dedupe and data.decontaminate leave out: the sources are gone through once before, each after those before it."""

from __future__ import annotations

from functools import partial

from posttrain.config.schema import DataConfig
from posttrain.data.overlaps import Marks, Overlaps, TestTexts, compared, marks_of, note_near
from posttrain.data.row_use import RowUse
from posttrain.data.selection import sources_of
from posttrain.data.split import Split, plain, sound_ones


class LeftOut:
    """Looks at a source when it is asked for, and at those before it: of rows that several have, the first source's stay. Those
    that are held out, which are the first source's, stay too."""

    def __init__(self, data: DataConfig, use: RowUse) -> None:
        self._data, self._use = data, use
        self._marks: dict[str, Marks] = {}
        self._held: Marks | None = None

    @property
    def any(self) -> bool:
        """May a row be left out at all?"""
        return self._data.dedupe != "none" or bool(self._data.decontaminate)

    def of(self, name: str) -> Overlaps:
        """Raises UserError for a source, or a test set, that cannot be read."""
        if not self.any:
            return Overlaps()
        names = list(sources_of(self._data))
        before = names[: names.index(name) + 1] if self._data.dedupe != "none" else [name]
        for each in before:
            if each not in self._marks:
                self._look(each, each == names[0])
        marks, found = {each: self._marks[each] for each in before}, {name: Overlaps()}
        if self._data.dedupe != "none":
            assert self._held
            found = compared({each: marks[each].rows for each in before}, self._held.rows)
        if self._data.dedupe == "near" and self._held:
            note_near(found, marks, self._held)
        for number, tests in marks[name].known:
            for test in tests:
                found[name].known.setdefault(test, []).append(number)
        return found[name]

    def _look(self, name: str, first: bool) -> None:
        source, near = sources_of(self._data)[name], self._data.dedupe == "near"
        split = Split(source, plain(self._data), self._use, first)
        sound = partial(sound_ones, source=source.path, shape=split.shape)
        self._marks[name] = marks_of(split.train, sound, near, TestTexts.read(self._data.decontaminate))
        if first and self._data.dedupe != "none":
            self._held = marks_of(iter(split.held_out()), sound, near, TestTexts.read(None))
