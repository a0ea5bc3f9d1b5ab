"""A conversation without its words: a sentinel in place of each run of words, whatever steers a template kept."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from posttrain.data.chat.calls import leaves_replaced
from posttrain.data.chat.marks import MARKED, Span
from posttrain.data.rows import REASONING, Message
from posttrain.errors import UserError

_KNOWN = {"role", "content", *REASONING, "tool_calls", "tool_call_id", "name", "id", "type", "weight", "train", "by"}
SENTINEL = re.compile("\U0010f0a0([0-9]+)\U0010f0a1")


class Field(NamedTuple):
    """A part of a row that somebody wrote, as messages call it. own: is it the assistant's, and so what is to be learnt?"""

    name: str
    own: bool


ARGUMENTS = Field("arguments of tool calls", True)
CALLS, TOOLS = Field("tool calls", True), Field("tools", False)


class Word(NamedTuple):
    """A run of words, and the part of the row that it is of; None where a template may leave it out. at: number of its message,
    and its place in that one's content; None of what is no content."""

    text: str
    field: Field | None
    at: tuple[int, int] | None = None


class Turn(NamedTuple):
    """A message that is learnt: its number, and its span in the rendered text with its end. answer: is it the assistant's?"""

    message: int
    span: Span
    answer: bool = True


class Said(NamedTuple):
    """A run of words where it is rendered: number of its message, or -1; place and length in the content; place in the text."""

    message: int
    at: int
    length: int
    place: Span


@dataclass(frozen=True)
class Rendered:
    """A text, the spans of it that are trained, and those of the letters in them that somebody wrote: all but what a template
    puts around them, its end of turn above all. turns: the messages that are learnt, of which the spans are all or a part.
    lost: parts of the row that are not in the text."""

    text: str
    spans: list[Span]
    words: list[Span]
    turns: list[Turn]
    lost: tuple[Field, ...] = ()


class Filled(NamedTuple):
    """A layout with words in it: where the messages that are learnt stand, and where all words do."""

    turns: list[Turn]
    said: list[Said]
    lost: tuple[Field, ...]


@dataclass(frozen=True)
class AlignedText:
    """A rendered skeleton: words between literals, the turns with their borders as (literal, offset), and what was appended.
    absent: numbers of the words that are not in it. lost: other parts of the row that are not."""

    literals: list[str]
    words: list[int]
    turns: list[tuple[int, bool, tuple[int, int], tuple[int, int]]]
    appended: str
    absent: list[int]
    lost: list[Field]

    def fill(self, words: Sequence[Word], text: str) -> Filled | None:
        """Where all stands in `text`, if that is the skeleton with words in place of the marks: as they are, or as in JSON."""
        parts, position = [self.literals[0]], len(self.literals[0])
        for number, literal in zip(self.words, self.literals[1:], strict=True):
            said = next((w for w in _written(words[number].text) if text.startswith(w + literal, position)), None)
            if said is None:
                return None
            parts += [said, literal]
            position += len(said) + len(literal)
        if "".join(parts) != text:
            return None
        starts = list(accumulate(map(len, parts), initial=0))
        turns = [Turn(i, (starts[2 * a] + x, starts[2 * b] + y), own) for i, own, (a, x), (b, y) in self.turns]
        said = list[Said]()
        for k, number in enumerate(self.words):
            at, place = words[number].at or (-1, 0), (starts[2 * k + 1], starts[2 * k + 2])
            said += [Said(*at, len(words[number].text), place)] if parts[2 * k + 1] else []
        return Filled(turns, said, self.lost_of(words))

    def lost_of(self, words: Sequence[Word]) -> tuple[Field, ...]:
        """What of a row with these words is not in the text."""
        absent = [words[k].field for k in self.absent if words[k].text.strip()]
        return tuple(dict.fromkeys([*self.lost, *(part for part in absent if part)]))


def _written(word: str) -> Iterator[str]:
    yield word
    for ascii_only in (False, True):
        yield json.dumps(word, ensure_ascii=ascii_only)[1:-1]


def lay_out(text: str, turns: Sequence[Turn], appended: str, words: int, lost: list[Field]) -> AlignedText:
    """The layout of a rendered skeleton of so many words that ends with `appended`, and of turns in it."""
    found = list(SENTINEL.finditer(text))
    starts = [0, *(match.end() for match in found)]
    stops = [*(match.start() for match in found), len(text)]

    def border(position: int) -> tuple[int, int]:
        literal = bisect_right(starts, position) - 1
        return literal, position - starts[literal]

    literals = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    numbers = [int(match.group(1)) for match in found]
    absent = sorted(set(range(words)) - set(numbers))
    borders = [(turn.message, turn.answer, border(turn.span[0]), border(turn.span[1])) for turn in turns]
    return AlignedText(literals, numbers, borders, appended, absent, lost)


def any_of(texts: Sequence[str]) -> str:
    """A pattern that matches any of the texts, the longest first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"


def tested_strings(template: str) -> re.Pattern[str]:
    """The strings that a template may look for within a message: they steer it, so a skeleton must keep them."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    holders = [*tree.find_all(nodes.Compare), *tree.find_all(nodes.Call), *tree.find_all(nodes.Filter)]
    consts = {c.value for holder in holders for c in holder.find_all(nodes.Const) if isinstance(c.value, str)}
    # Shorter ones, and bare words, are names of roles and fields or stand in any text.
    steering = {s.strip() for s in consts if len(s.strip()) > 2 and re.fullmatch(r"(?!\w+$)\S+", s.strip())}
    return re.compile(f"({any_of(tuple(steering | {'<think>', '</think>'}))})")


def content_of(message: Message) -> str:
    """A message's text; empty where it has none."""
    return message.get("content", "")


def sentinel(number: int) -> str:
    """The mark that stands for the words of this number."""
    return f"\U0010f0a0{number}\U0010f0a1"


def sentinels(text: str) -> list[str]:
    """All marks in a text, in order."""
    return [match.group() for match in SENTINEL.finditer(text)]


def skeleton(
    messages: list[Message], tested: re.Pattern[str], first: int = 0, learnt: Sequence[int] = ()
) -> tuple[list[Message], list[Word]]:
    """The `plain` messages with a sentinel in place of each run of words, also of calls' arguments; and the words in order.
    learnt: numbers of the messages that are to be learnt, so that none of their words may be missing. Thoughts before
    messages[first], and in messages of weight 0, may be left out, as they are when the model writes."""
    words: list[Word] = []

    def place(text: str, field: Field | None, at: tuple[int, int] | None = None) -> str:
        words.append(Word(text, field, at))
        return sentinel(len(words) - 1)

    def replace(text: str, field: Field | None, thoughts: Field | None, message: int = -1) -> str:
        pieces, start = tested.split(text), 0
        for k, piece in enumerate(pieces):
            if k % 2 == 0 and (core := piece.strip()):
                lead, _, trail = piece.partition(core)
                thought = k and pieces[k - 1] == "<think>" and "</think>" in pieces[k + 1 :]
                at = (message, start + len(lead))
                pieces[k] = lead + place(core, thoughts if thought else field, at if message >= 0 else None) + trail
            start += len(piece)
        filled = "".join(pieces)
        return filled if sentinels(filled) else filled + place("", field)

    bones: list[Message] = []
    for i, message in enumerate(messages):
        role, bone = message["role"], dict(message)
        for mark in MARKED:  # which rows of one shape have at other places
            bone.pop(mark, None)
        counts = i >= first and message.get("weight") != 0
        own = i in learnt and counts
        # Beside tool calls, a template may leave out an empty content with all that is around it; nothing to find then.
        empty_calls = message.get("tool_calls") and not content_of(message).strip()
        for name, value in message.items():
            if name == "content" and not empty_calls:
                thoughts = Field("<think>", own) if counts else None
                bone[name] = replace(value, Field(f"content of {role} messages", own), thoughts, i)
            elif name in REASONING:
                thoughts = Field(name, own) if counts else None
                bone[name] = replace(value, thoughts, thoughts)
            elif name == "tool_calls":
                bone[name] = [_boned(call, lambda text: place(text, ARGUMENTS)) for call in value]
        bones.append(bone)
    return bones, words


def other_fields(messages: list[Message], text: str) -> tuple[Field, ...]:
    """Texts that messages have under names of their own, and that are not in the rendered text."""
    found = [
        Field(f"{name} of {message['role']} messages", False)
        for message in messages
        for name, value in message.items()
        if name not in _KNOWN and isinstance(value, str) and value.strip() and value.strip() not in text
    ]
    return tuple(dict.fromkeys(found))


def _boned(call: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": leaves_replaced(function["arguments"], place)}}


def first_words(text: str, content: str, tested: re.Pattern[str]) -> tuple[int, int]:
    """Where the first rendered part of a content's skeleton starts: in the rendered text, and in the content.

    Strings that the template looks for count as parts, unless words between them and the first sentinel are left out.
    """
    first = next(s for s in sentinels(content) if s in text)
    start, at = text.index(first), content.index(first)
    if SENTINEL.search(content, 0, at):
        return start, at
    for tag in reversed(tested.findall(content[:at])):
        before = text[:start].rstrip()
        if not before.endswith(tag):
            break
        start, at = len(before) - len(tag), content.rindex(tag, 0, at)
    return start, at


def joined(text: str, spans: Sequence[Span], ends: tuple[str, ...]) -> list[Span]:
    """Spans that hold a letter, those that touch as one unless an end is between: a template may mark a turn in pieces."""
    found: list[Span] = []
    for start, stop in spans:
        if found and start <= found[-1][1] and not text[slice(*found[-1])].rstrip().endswith(ends):
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        elif text[start:stop].strip():
            found.append((start, stop))
    return found


def blank_before(text: str, position: int) -> str:
    """The white space right before a position."""
    return text[len(text[:position].rstrip()) : position]
