"""What became of the rows of a source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import cast

from posttrain.data.overlaps import Overlaps
from posttrain.data.sources.source import parts_of, row_name

NAMED = 20  # rows of each kind that an account names


@dataclass
class SourceStats:
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
    no_room: int = 0  # of these, rows whose prompt leaves an answer no room in max_length
    alike: int = 0  # pairs left out, whose answers are equal where they are cut to max_length
    endless: int = 0  # pairs left out, of which an answer has no end of turn to be scored at, since it is cut to max_length
    cut_prompts: int = 0  # rows whose prompt is cut at its beginning (data.long_prompts=cut)
    templated: int = 0  # rows that the chat template has rendered
    border_tokens: int = 0  # tokens across the border of prompt and answer; they count
    filtered: int = 0  # rows left out for their quality
    disliked: int = 0  # rows left out, since they say that their answer is not to be learnt (`label: false`)
    held_again: int = 0  # rows left out because they repeat a held-out one
    held_beyond: int = 0  # rows left out beyond data.eval_rows, with data.eval_rest=drop
    repeated: int = 0  # rows that repeat an earlier one; left out with data.dedupe
    also_held: int = 0  # rows to train on that are held out as well; left out with data.dedupe
    near: int = 0  # rows left out since they are nearly an earlier or a held-out one, with data.dedupe=near
    shared: dict[str, int] = field(default_factory=dict[str, int])  # rows that an earlier source has too, by its name
    shared_near: dict[str, int] = field(
        default_factory=dict[str, int]
    )  # rows nearly one of an earlier source, with data.dedupe=near
    known: dict[str, int] = field(default_factory=dict[str, int])  # rows left out, by the test set whose words they hold
    skipped: int = 0  # rows with a mistake in them, with data.on_error=skip
    lost: dict[str, int] = field(default_factory=dict[str, int])  # rows, by the part that the chat template does not render
    unused: dict[str, int] = field(default_factory=dict[str, int])  # rows, by the column that is not read
    places: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def where(self, number: int) -> str:
        """What messages call a row of this source."""
        return row_name(self.source, number)

    def moved(self, source: str) -> SourceStats:
        """The same, of rows that lie at `source` now."""

        moves = list(zip(parts_of(self.source), parts_of(source), strict=False))

        def there(place: str) -> str:
            found = (new + place.removeprefix(old) for old, new in moves if place.startswith(old))
            return next(found, place)

        places = {what: [there(place) for place in found] for what, found in self.places.items()}
        return replace(self, source=source, places=places)

    @property
    def elsewhere(self) -> int:
        """Rows that stand elsewhere too, if no row does in two ways."""
        by_name = (self.shared, self.shared_near, self.known)
        return self.repeated + self.also_held + self.near + sum(sum(found.values()) for found in by_name)

    def note(self, what: str, place: str) -> None:
        """Count a row as truncated, untrained or skipped."""
        setattr(self, what, getattr(self, what) + 1)
        self.places[what] = [*self.places.get(what, []), place][:NAMED]

    def note_lost(self, parts: Iterable[str], place: str) -> None:
        """Count a row for each part of it that is not rendered."""
        for part in parts:
            self.lost[part] = self.lost.get(part, 0) + 1
            self.places[part] = [*self.places.get(part, []), place][:NAMED]

    def note_overlaps(self, overlaps: Overlaps) -> None:
        """Count rows that stand elsewhere too."""
        for what, numbers in (("repeated", overlaps.repeated), ("also_held", overlaps.also_held), ("near", overlaps.near)):
            setattr(self, what, getattr(self, what) + len(numbers))
            self._place(what, numbers)
        for counts, found, near in (
            (self.known, overlaps.known, None),
            (self.shared, overlaps.shared, False),
            (self.shared_near, overlaps.shared_near, True),
        ):
            for name, numbers in found.items():
                counts[name] = counts.get(name, 0) + len(numbers)
                self._place(name if near is None else place_of(name, near), numbers)

    def _place(self, what: str, numbers: list[int]) -> None:
        if numbers:
            self.places[what] = [*self.places.get(what, []), *map(self.where, numbers[:NAMED])][:NAMED]

    def add(self, other: SourceStats) -> None:
        """Count another piece of the same source."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
            elif isinstance(value, dict) and name != "places":
                counts: dict[str, int] = getattr(self, name)
                for key, count in cast("dict[str, int]", value).items():
                    counts[key] = counts.get(key, 0) + count
        for what, found in other.places.items():
            self.places[what] = [*self.places.get(what, []), *found][:NAMED]


def place_of(source: str, near: bool = False) -> str:
    """Under what `places` has the rows that an earlier source has too."""
    return f"nearly in {source}" if near else f"in {source}"
