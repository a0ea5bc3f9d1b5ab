"""The assistant's turns in a template that marks them itself, by {% generation %}."""

from __future__ import annotations

from posttrain.data.chat.alignment import Span, Turn
from posttrain.data.chat.ends import Ends
from posttrain.data.chat.marks import marked_spans
from posttrain.data.chat.rendering import Given, Renderer
from posttrain.data.rows import Message
from posttrain.errors import UserError

NO_END = "the chat template never ends an assistant turn, so the model would not learn to stop"


def marked_turns(
    renderer: Renderer, ends: Ends, messages: list[Message], given: Given, first: int, learnt: list[int], text: str,
    marked: list[Span],
) -> list[Turn]:  # fmt: skip
    """What is marked, of the messages that are learnt. Raises UserError where a turn is not marked, or cannot be told from
    others."""
    if first:
        prompt, _ = renderer.render(messages[:first], given, prompt=True)
        shared = next((k for k, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
        marked = [span for span in marked if span[1] > shared]
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if len(marked) < len(turns):
        raise UserError(f"the chat template's generation markers cover {len(marked)} of {len(turns)} assistant turns")
    spans = [(start, _end(renderer, ends, text, start, stop)) for start, stop in marked]
    if len(spans) == len(turns):
        return [Turn(i, span) for i, span in zip(turns, spans, strict=True) if i in learnt]
    if any(i not in learnt or marked_spans(messages[i]) is not None for i in turns):
        raise UserError(
            f"the chat template marks {len(spans)} spans in {len(turns)} turns, so that none can be told from another"
        )
    return [Turn(-1, span) for span in spans]


def _end(renderer: Renderer, ends: Ends, text: str, start: int, stop: int) -> int:
    """The end of a marked turn, moved so that its end-of-turn token is the last thing within."""
    words = text[start:stop].rstrip()
    following = ends.next.match(text, stop)
    if following and not words.endswith(tuple(ends.texts)):
        return following.end(1)
    if words.endswith(renderer.special):
        return start + len(words)
    raise UserError(NO_END)
