"""What of a conversation is handed to the chat template, which turns are learnt, and what happens to what it does not render."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.config.schema import DataConfig
from posttrain.config.schema.data import ROLES
from posttrain.data.chat.alignment import Field, content_of
from posttrain.data.chat.calls import inlined, plain
from posttrain.data.chat.marks import is_learnt, with_content
from posttrain.data.chat.rendering import INLINE
from posttrain.data.rows import REASONING, CanonicalRow, Message
from posttrain.errors import UserError

_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class ChatOptions:
    """As `data` has them by the same names (docs/data.md). variables: `data.template_kwargs`.
    template: a prompt that is a text is a user's turn, and its answer the assistant's; None: as the model is, which only
    the stage knows."""

    reasoning: Literal["keep", "drop", "inline"] = "keep"
    tools: Literal["keep", "inline"] = "keep"
    turns: Literal["all", "each"] = "all"
    train_on: str | tuple[str, ...] = "assistant"
    on_loss: Literal["own", "stop", "warn"] = "warn"
    template: bool | None = None
    long_prompts: Literal["drop", "cut"] = "drop"
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def renders(self, row: CanonicalRow) -> bool:
        """Does the chat template render this row? Not a document, and texts only where they are a user's and the assistant's."""
        given = [row[name] for name in ("prompt", "completion", "chosen", "rejected") if name in row]
        return "messages" in row or (bool(given) and (bool(self.template) or not all(isinstance(each, str) for each in given)))

    def shaped(self, messages: Sequence[Message], tools: list[Any] | None) -> tuple[list[Message], list[Any] | None]:
        """`plain` messages and tools for the template, with reasoning and calls where they are wanted."""
        found = [plain(message) for message in messages]
        if self.reasoning != "keep":
            found = [self._reasoned(message) if message["role"] == "assistant" else message for message in found]
        return inlined(found, tools) if self.tools == "inline" else (found, tools)

    def _reasoned(self, message: Message) -> Message:
        rest = {name: value for name, value in message.items() if name not in REASONING}
        if self.reasoning == "drop":
            return with_content(rest, _THOUGHT.sub("", content_of(message), count=1)) if "content" in rest else rest
        thought = next((message[name] for name in REASONING if message.get(name)), "")
        return with_content(rest, f"<think>\n{thought.strip()}\n</think>\n\n{content_of(message)}") if thought else rest

    @property
    def roles(self) -> frozenset[str]:
        """Whose words are learnt."""
        named = {"all": ROLES, "last": ("assistant",), "assistant": ("assistant",)}
        return frozenset(named[self.train_on] if isinstance(self.train_on, str) else self.train_on)

    def examples_of(self, row: CanonicalRow) -> list[CanonicalRow]:
        """The examples that a row becomes: `first` is the message from which on turns are learnt."""
        messages = row.get("messages")
        if not isinstance(messages, list) or (self.turns == "all" and self.train_on != "last"):
            return [row]
        learnt = [i for i, message in enumerate(messages) if is_learnt(message, self.roles) and message.get("weight") != 0]
        ends = [i for i in learnt if messages[i]["role"] == "assistant"] or learnt
        if not ends:
            return [row]
        if self.train_on == "last":
            return [{**row, "first": ends[-1]}]
        ends = [*ends, *learnt[-1:]] if learnt[-1] > ends[-1] else ends
        firsts = [min(i for i in learnt if i > before) for before in (-1, *ends[:-1])]
        return [{**row, "messages": messages[: end + 1], "first": first} for first, end in zip(firsts, ends, strict=True)]

    def check(self, lost: Sequence[Field]) -> None:
        """Raises UserError where what is lost must not be."""
        stopping = [each for each in lost if self.on_loss == "stop" or (self.on_loss == "own" and each.own)]
        if stopping:
            names = " and ".join(each.name for each in stopping)
            verb = "are" if len(stopping) > 1 or names.endswith("s") else "is"
            raise UserError(f"{names} {verb} not rendered by the chat template; {_way_out(stopping)}")


def options_of(data: DataConfig) -> ChatOptions:
    """What a run's config says of it."""
    train_on = data.train_on if isinstance(data.train_on, str) else tuple(data.train_on)
    same = data.reasoning, data.tools, data.turns, train_on, data.on_loss
    template = None if data.template == "auto" else data.template == "chat"
    return ChatOptions(*same, template, data.long_prompts, data.template_kwargs or {})


def _way_out(lost: Sequence[Field]) -> str:
    names = " ".join(each.name for each in lost)
    ways = []
    if any(name in names for name in (*REASONING, "<think>")):
        ways.append(
            "data.reasoning=inline writes reasoning into the content, drop leaves it out, "
            "data.turns=each learns every turn as the last of its conversation"
        )
    if "tool" in names:
        ways.append(INLINE)
    return "; ".join([*ways, "data.on_loss=warn trains without"])
