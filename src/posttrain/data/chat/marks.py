"""What a message says of itself: whether it is learnt, and which characters of it.

`train`: it is learnt, whatever its role. `trained`: characters start:stop of its content are, and no others. `prefill`: so many
characters of its content are given, and the answer goes on behind them.
"""

from __future__ import annotations

from posttrain.data.rows import Message
from posttrain.errors import UserError

Span = tuple[int, int]  # characters start:stop of a text

MARKED = ("trained", "prefill")


def is_learnt(message: Message, roles: frozenset[str]) -> bool:
    """Is it one of those that `data.train_on` names? by: whose words it holds, where its role is another's."""
    return message.get("by", message["role"]) in roles or bool(message.get("train"))


def marked_spans(message: Message) -> list[Span] | None:
    """The characters of its content that a message says are trained, in order; None where it says nothing."""
    if not any(name in message for name in MARKED):
        return None
    content, first = message.get("content", ""), message.get("prefill", 0)
    given = [(0, len(content))] if message.get("trained") is None else message["trained"]
    return [(max(start, first), stop) for start, stop in given if stop > first]


def with_content(message: Message, content: str) -> Message:
    """The message with another content that holds its own. What is new before that goes with its first character, and what is new
    behind it with its last."""
    changed = message | {"content": content}
    spans, old = marked_spans(message), message.get("content", "")
    if spans is None or content == old:
        return changed
    at = content.find(old)
    if at < 0:
        raise UserError(
            f"the content {old[:40]!r} is marked in parts (train_detail, or a prefill); data.reasoning=drop takes one away; "
            "say data.reasoning=keep, or take out the marks"
        )
    moved = [(start + at if start else 0, len(content) if stop == len(old) else stop + at) for start, stop in spans]
    return {name: value for name, value in changed.items() if name != "prefill"} | {"trained": moved}
