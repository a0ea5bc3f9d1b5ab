"""What is wrong with data that tokenises well: what a loss curve would not show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.chat.encoder import Encoder
from posttrain.data.likeness import key_of
from posttrain.data.split import Canonical
from posttrain.data.stats import SourceStats, place_of
from posttrain.errors import UserError

SHOWN = 8  # places that a finding names
_LIKE_SPECIAL = re.compile(r"<\|[\w-]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")


@dataclass
class Finding:
    """what: in words, to stand after a number. is_mistake: what --strict refuses."""

    what: str
    is_mistake: bool = True
    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one more, and keep its place if there is room."""
        self.count += 1
        if len(self.places) < SHOWN:
            self.places.append(place)

    @property
    def line(self) -> str:
        """Count, what it is, and the first places."""
        more = ", ..." if self.count > len(self.places) else ""
        where = f": {', '.join(self.places)}{more}" if self.places else ""
        return f"{self.count:,} {self.what}{where}"


def of_stats(stats: SourceStats, max_length: int, dedupes: bool) -> list[Finding]:
    """What became of rows on the way to tokens. dedupes: rows that stand elsewhere are left out."""
    out = "rows left out, they" if dedupes else "rows that"
    skipped = stats.places.get("skipped", [])
    counted = (
        ("skipped", "rows with a mistake", True, stats.skipped),
        ("untrained", "rows dropped, as no token of theirs would count", True, stats.untrained),
        ("truncated", f"rows cut to {max_length} tokens", True, stats.truncated),
        ("", "tokens across the border of prompt and answer, which count as the answer's", False, stats.border_tokens),
        ("", "rows left out, of less quality", False, stats.filtered),
        ("cut_prompts", "prompts cut at their beginning", False, stats.cut_prompts),
        ("alike", "pairs dropped, as their answers are equal when cut", True, stats.alike),
        ("endless", "pairs dropped, as their end of turn is cut off", True, stats.endless),
        ("disliked", "rows left out, whose label is false", False, stats.disliked),
        ("", "rows left out, they repeat a held-out row", False, stats.held_again),
        ("repeated", f"{out} repeat an earlier one", False, dedupes and stats.repeated),
        ("also_held", f"{out} are also held out", False, dedupes and stats.also_held),
        ("near", "rows left out, they are nearly an earlier or a held-out one", False, stats.near),
        *((place_of(name), f"{out} are in {name} as well", not dedupes, n) for name, n in stats.shared.items()),
        *((place_of(name, True), f"{out} are nearly one of {name}", False, n) for name, n in stats.shared_near.items()),
        *((name, f"rows left out, they hold words of {name}", False, count) for name, count in stats.known.items()),
        ("", "rows left out, beyond data.eval_rows (data.eval_rest=drop)", False, stats.held_beyond),
    )
    found = []
    for name, what, is_mistake, count in counted:
        places = skipped if name == "skipped" else [place.rsplit(", ", 1)[-1] for place in stats.places.get(name, [])]
        found.append(Finding(what, is_mistake, count, places[:SHOWN]))
    for part, count in stats.lost.items():
        places = [place.rsplit(", ", 1)[-1] for place in stats.places.get(part, [])]
        found.append(Finding(f"rows whose {part} the chat template does not render", True, count, places[:SHOWN]))
    return found


def of_rows(rows: Iterable[Canonical], held_out: Iterable[Canonical], where: Callable[[int], str]) -> list[Finding]:
    """Empty and repeated rows, and rows that are held out as well. held_out: of the first source."""
    empty, twice, both = Finding("empty rows"), Finding("rows that repeat an earlier one"), Finding("rows that are also held out")
    apart = {key_of(row) for _, row in held_out}
    seen: dict[int, int] = {}
    for number, row in rows:
        if not "".join(_words(row)).strip():
            empty.add(where(number))
        name = key_of(row)
        if name in apart:
            both.add(where(number))
        elif name in seen:
            twice.add(f"{where(number)} (as {seen[name]})")
        seen.setdefault(name, number)
    return [empty, twice, both]


def of_tokens(
    rows: Iterable[Canonical], encoder: Encoder, tokenizer: Any, where: Callable[[int], str], max_length: int
) -> list[Finding]:
    """What training reads against what inference would: beginnings, ends, special tokens, templates."""
    doubled = Finding("rows that begin with the beginning-of-text token twice")
    endless = Finding("answers that are trained without an end of turn")
    unknown = Finding("rows with a token that the tokenizer does not know")
    plain = Finding("rows with what looks like a special token, but is plain text to this tokenizer")
    special = Finding("rows whose own words hold a special token of this tokenizer")
    other = Finding("conversations whose prompt is rendered otherwise in training than for inference")
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = set(encoder.end_tokens())
    rows = [(number, each) for number, row in rows for each in encoder.options.examples_of(row)]
    encoded = _encoded(encoder, rows)
    for number, row in rows:
        place = where(number)
        marks = {mark for text in _words(row) for mark in _LIKE_SPECIAL.findall(text)}
        if marks - added:
            plain.add(f"{place} ({min(marks - added)})")
        if marks & added:
            special.add(f"{place} ({min(marks & added)})")
        if number not in encoded:
            continue  # it stands among the mistakes
        for tokens, weights in encoded[number]:
            if tokenizer.bos_token_id is not None and tokens[:2] == [tokenizer.bos_token_id] * 2:
                doubled.add(place)
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
                unknown.add(place)
            last = max((k for k, weight in enumerate(weights) if weight), default=None)
            if last is not None and tokens[last] not in ends and len(tokens) <= max_length and _should_end(row, encoder):
                endless.add(place)
        if difference := _prompt_difference(encoder, tokenizer, row):
            other.add(f"{place} ({difference})")
    return [doubled, endless, unknown, plain, special, other]


def _should_end(row: dict[str, Any], encoder: Encoder) -> bool:
    """Is it an answer that is learnt to its end, or only a part that somebody has marked, or what others say?"""
    messages = [
        message for name in ("messages", "chosen", "rejected") if isinstance(row.get(name), list) for message in row[name]
    ]
    whole = "assistant" in encoder.options.roles and not any("trained" in message for message in messages)
    return whole and "text" not in row


def _encoded(encoder: Encoder, rows: list[Canonical]) -> dict[int, list[tuple[list[int], list[float]]]]:
    """The sequences of each row that can be encoded: all at once where none has a mistake."""
    try:
        return _sequences(encoder, rows)
    except UserError:
        each = {}
        for row in rows:
            with suppress(UserError):
                each |= _sequences(encoder, [row])
        return each


def _sequences(encoder: Encoder, rows: list[Canonical]) -> dict[int, list[tuple[list[int], list[float]]]]:
    numbers = [number for number, _ in rows]
    if rows and rows[0][1].keys() & {"prompt", "completion", "chosen"} == {"prompt"}:
        prompts = [found.tokens for found in encoder.encode_prompts(rows, str)]
        return {number: [(tokens, [0.0] * len(tokens))] for number, tokens in zip(numbers, prompts, strict=True)}
    if not rows or "chosen" not in rows[0][1]:
        return {n: [(one.tokens, one.weights)] for n, one in zip(numbers, encoder.encode_many(rows, str), strict=True)}
    return {
        number: [([*pair.prompt, *a.tokens], [0.0] * len(pair.prompt) + a.weights) for a in (pair.chosen, pair.rejected)]
        for number, pair in zip(numbers, encoder.encode_pairs(rows, str), strict=True)
    }


def _prompt_difference(encoder: Encoder, tokenizer: Any, row: dict[str, Any]) -> str:
    """Where a conversation up to its last answer leaves what inference would put before that answer; empty where nowhere."""
    messages = row.get("messages")
    if not messages or messages[-1]["role"] != "assistant" or len(messages) < 2:
        return ""
    trained = encoder.encode_many([(0, row)], str)[0].tokens
    asked = encoder.encode_prompt({**row, "messages": messages[:-1]})
    at = next((k for k, (a, b) in enumerate(zip(asked, trained, strict=False)) if a != b), None)
    if at is None or at >= len(asked) - 1:  # the last token may grow together with the answer's first letters
        return ""
    shown = [tokenizer.decode(tokens[at : at + 6]) for tokens in (trained, asked)]
    return f"token {at + 1}: {shown[0]!r} in training, {shown[1]!r} for inference"


def _words(row: dict[str, Any]) -> Sequence[str]:
    """All texts of a row but those of other columns, which are not rendered."""
    return _texts({name: value for name, value in row.items() if name != "columns"})


def _texts(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict) and "role" in value:
        values = [v for k, v in value.items() if k != "role"]
    return [text for each in values for text in _texts(each)]
