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
from posttrain.data.rows import Message
from posttrain.errors import UserError

Span = tuple[int, int]  # characters start:stop of a rendered text

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message may carry its reasoning
_KNOWN = {"role", "content", *REASONING, "tool_calls", "tool_call_id", "name", "id", "type", "weight"}
SENTINEL = re.compile("\U0010f0a0([0-9]+)\U0010f0a1")


class Field(NamedTuple):
    """A part of a row that somebody wrote, as messages call it. own: is it the assistant's, and so what is to be learnt?"""

    name: str
    own: bool


ARGUMENTS = Field("arguments of tool calls", True)
CALLS, TOOLS = Field("tool calls", True), Field("tools", False)


class Word(NamedTuple):
    """A run of words, and the part of the row that it is of; None where a template may leave it out."""

    text: str
    field: Field | None


@dataclass(frozen=True)
class Rendered:
    """A text, the spans of it that are trained, in order, and those of the letters in them that somebody wrote: all but what
    a template puts around them, its end of turn above all. lost: parts of the row that are not in the text."""

    text: str
    spans: list[Span]
    words: list[Span]
    lost: tuple[Field, ...] = ()


@dataclass(frozen=True)
class AlignedText:
    """A rendered skeleton: words between literals, span borders as (literal, offset), and what was appended. absent: numbers of
    the words that are not in it. lost: other parts of the row that are not."""

    literals: list[str]
    words: list[int]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    appended: str
    absent: list[int]
    lost: list[Field]

    def fill(self, words: Sequence[Word], text: str) -> Rendered | None:
        """`text` with its spans, if it is the skeleton with words in place of the marks: as they are or as JSON has them."""
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
        spans = [(starts[2 * a] + x, starts[2 * b] + y) for (a, x), (b, y) in self.spans]
        said = [(starts[k], starts[k + 1]) for k in range(1, len(parts), 2) if parts[k]]
        within = [(a, b) for start, stop in spans for a, b in said if start <= a and b <= stop]
        return Rendered(text, spans, within, self.lost_of(words))

    def lost_of(self, words: Sequence[Word]) -> tuple[Field, ...]:
        """What of a row with these words is not in the text."""
        absent = [words[k].field for k in self.absent if words[k].text.strip()]
        return tuple(dict.fromkeys([*self.lost, *(part for part in absent if part)]))


def _written(word: str) -> Iterator[str]:
    yield word
    for ascii_only in (False, True):
        yield json.dumps(word, ensure_ascii=ascii_only)[1:-1]


def lay_out(text: str, spans: Sequence[Span], appended: str, words: int, lost: list[Field]) -> AlignedText:
    """The layout of a rendered skeleton of so many words that ends with `appended`, and of spans of it."""
    found = list(SENTINEL.finditer(text))
    starts = [0, *(match.end() for match in found)]
    stops = [*(match.start() for match in found), len(text)]

    def border(position: int) -> tuple[int, int]:
        literal = bisect_right(starts, position) - 1
        return literal, position - starts[literal]

    literals = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    numbers = [int(match.group(1)) for match in found]
    absent = sorted(set(range(words)) - set(numbers))
    return AlignedText(literals, numbers, [(border(start), border(stop)) for start, stop in spans], appended, absent, lost)


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


def skeleton(messages: list[Message], tested: re.Pattern[str], first: int = 0) -> tuple[list[Message], list[Word]]:
    """The `plain` messages with a sentinel in place of each run of words, also of calls' arguments; and the words in order.
    Thoughts before messages[first], and in messages of weight 0, may be left out, as they are when the model writes."""
    words: list[Word] = []

    def place(text: str, field: Field | None) -> str:
        words.append(Word(text, field))
        return sentinel(len(words) - 1)

    def replace(text: str, field: Field | None, thoughts: Field | None) -> str:
        pieces = tested.split(text)
        for k, piece in enumerate(pieces):
            if k % 2 == 0 and (core := piece.strip()):
                lead, _, trail = piece.partition(core)
                thought = k and pieces[k - 1] == "<think>" and "</think>" in pieces[k + 1 :]
                pieces[k] = lead + place(core, thoughts if thought else field) + trail
        filled = "".join(pieces)
        return filled if sentinels(filled) else filled + place("", field)

    bones: list[Message] = []
    for i, message in enumerate(messages):
        role, bone = message["role"], dict(message)
        learnt = i >= first and message.get("weight") != 0
        own = role == "assistant" and learnt
        # Beside tool calls, a template may leave out an empty content with all that is around it; nothing to find then.
        empty_calls = message.get("tool_calls") and not content_of(message).strip()
        for name, value in message.items():
            if name == "content" and not empty_calls:
                bone[name] = replace(value, Field(f"content of {role} messages", own), Field("<think>", own) if learnt else None)
            elif name in REASONING:
                bone[name] = replace(value, *[Field(name, own) if learnt else None] * 2)
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
