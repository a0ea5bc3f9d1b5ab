"""Which characters of a rendered text are trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from posttrain.data.chat.alignment import Field, Rendered, Said, Turn, content_of
from posttrain.data.chat.marks import Span, marked_spans
from posttrain.data.rows import Message
from posttrain.errors import UserError


def trained_of(
    text: str, turns: Sequence[Turn], messages: Sequence[Message], said: Sequence[Said], lost: tuple[Field, ...]
) -> Rendered:
    """A rendered text with what is trained of it: of each turn all, or the parts that its message marks. said: the words."""
    spans, written = list[Span](), [each.place for each in said]
    for turn in sorted(turns, key=lambda turn: turn.span):
        message = messages[turn.message] if turn.message >= 0 else {}
        spans += _parts(turn, message, said, text)
        names = [
            call["function"]["name"] for call in message.get("tool_calls", [])
        ]  # of calls without arguments all that is said
        places = [(text.find(name, *turn.span), len(name)) for name in names]
        written += [(place, place + length) for place, length in places if place >= 0]
    words = sorted((max(a, start), min(b, stop)) for start, stop in spans for a, b in written if a < stop and start < b)
    return Rendered(text, spans, words, list(turns), lost)


def _parts(turn: Turn, message: Message, said: Sequence[Said], text: str) -> list[Span]:
    """The spans of a turn that are trained. What stands before its content (a thought, a header's rest) goes with the content's
    first character, and what stands behind it (calls, the end of turn) with the last."""
    spans = marked_spans(message)
    if spans is None:
        return [turn.span]
    places = _places(content_of(message), turn.span, [each for each in said if each.message == turn.message], text)
    if any(a[1] >= b[1] for a, b in pairwise(places)):
        raise UserError(f"the chat template moves parts of message {turn.message + 1}, so that marks in it have no place")
    chosen = [any(start <= k < stop for start, stop in spans) for k, _ in places]
    found: list[Span] = []
    for n, (_, place) in enumerate(places):
        if not chosen[n]:
            continue
        if n and chosen[n - 1]:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place if n else turn.span[0], place + 1))
    if found and chosen[-1]:
        found[-1] = (found[-1][0], turn.span[1])
    return found


def _places(content: str, turn: Span, said: Sequence[Said], text: str) -> list[tuple[int, int]]:
    """The characters of a content that are in its turn, each with its place in the text: the words, and between and around them
    what is rendered as it is written."""
    places: dict[int, int] = {}
    for each in said:
        if each.place[1] - each.place[0] != each.length:
            raise UserError("the chat template writes a content otherwise than it is, so that marks in it have no place")
        places |= {each.at + k: each.place[0] + k for k in range(each.length)}
    used = set(places.values())
    ways = ((range(1, len(content)), -1), (range(len(content) - 2, -1, -1), 1))
    for order, beside in ways:  # on behind the words, and back from those that follow, as long as both have the same
        for k in order:
            place = places.get(k + beside, -2) - beside
            if k not in places and turn[0] <= place < turn[1] and place not in used and text[place] == content[k]:
                places[k] = place
                used.add(place)
    return sorted(places.items())
