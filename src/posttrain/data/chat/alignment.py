"""A conversation without its words: a sentinel in place of each run of words, whatever steers a template kept."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from posttrain.data.rows import Message
from posttrain.errors import UserError

Span = tuple[int, int]  # characters start:stop of a rendered text

REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message may carry its reasoning
SENTINEL = re.compile("\U0010f0a0([0-9]+)\U0010f0a1")


@dataclass(frozen=True)
class Rendered:
    """A text, the spans of it that are trained, in order, and those of the letters in them that somebody wrote: all but what
    a template puts around them, its end of turn above all."""

    text: str
    spans: list[Span]
    words: list[Span]


@dataclass(frozen=True)
class AlignedText:
    """A rendered skeleton: words between literals, span borders as (literal, offset), and what was appended."""

    literals: list[str]
    words: list[int]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]
    appended: str

    def fill(self, words: Sequence[str]) -> Rendered:
        """The text with words in place of the marks, and the spans in it."""
        parts = [self.literals[0]]
        for number, literal in zip(self.words, self.literals[1:], strict=True):
            parts += [words[number], literal]
        starts = list(accumulate(map(len, parts), initial=0))
        spans = [(starts[2 * a] + x, starts[2 * b] + y) for (a, x), (b, y) in self.spans]
        said = [(starts[k], starts[k + 1]) for k in range(1, len(parts), 2) if parts[k]]
        within = [(a, b) for start, stop in spans for a, b in said if start <= a and b <= stop]
        return Rendered("".join(parts), spans, within)


def lay_out(text: str, spans: Sequence[Span], appended: str) -> AlignedText:
    """The layout of a rendered skeleton that ends with `appended`, and of spans of it."""
    found = list(SENTINEL.finditer(text))
    starts = [0, *(match.end() for match in found)]
    stops = [*(match.start() for match in found), len(text)]

    def border(position: int) -> tuple[int, int]:
        literal = bisect_right(starts, position) - 1
        return literal, position - starts[literal]

    literals = [text[start:stop] for start, stop in zip(starts, stops, strict=True)]
    words = [int(match.group(1)) for match in found]
    return AlignedText(literals, words, [(border(start), border(stop)) for start, stop in spans], appended)


def any_of(texts: Sequence[str]) -> str:
    """A pattern that matches any of the texts, the longest first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)"


def tested_strings(template: str) -> re.Pattern[str]:
    """The strings that a template may look for within a message: they steer it, so a skeleton must keep them."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
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


def skeleton(messages: list[Message], tested: re.Pattern[str]) -> tuple[list[Message], list[tuple[str, str]]]:
    """The messages with a sentinel in place of each run of words, and the words in order, each with its role."""
    words: list[tuple[str, str]] = []

    def place(word: str, role: str) -> str:
        words.append((word, role))
        return sentinel(len(words) - 1)

    def replace(text: str, role: str) -> str:
        pieces = tested.split(text)
        for k, piece in enumerate(pieces):
            if k % 2 == 0 and (core := piece.strip()):
                lead, _, trail = piece.partition(core)
                pieces[k] = lead + place(core, role) + trail
        filled = "".join(pieces)
        return filled if sentinels(filled) else filled + place("", role)

    bones: list[Message] = []
    for message in messages:
        # Beside tool calls, a template may leave out an empty content with all that is around it; nothing to find then.
        empty_calls = message.get("tool_calls") and not content_of(message).strip()
        fields = [k for k in ("content", *REASONING) if k in message and not (k == "content" and empty_calls)]
        bones.append(message | {field: replace(message[field], message["role"]) for field in fields})
    return bones, words


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


def blank_before(text: str, position: int) -> str:
    """The white space right before a position."""
    return text[len(text[:position].rstrip()) : position]
