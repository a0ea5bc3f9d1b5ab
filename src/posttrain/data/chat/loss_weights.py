"""How much each token of an answer counts: by span, by turn, by the answer's length, by row."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config.schema import Conversational, Stage
from posttrain.data.chat.alignment import Rendered, Span, Turn, content_of
from posttrain.data.chat.tokenize import touching
from posttrain.data.rows import Message
from posttrain.errors import UserError

Factor = tuple[int, int, float]  # characters start:stop of a rendered text, by what the weights of tokens in them are multiplied


@dataclass(frozen=True)
class Weighing:
    """marker: the text that ends an answer's reasoning (`</think>`, `####`), at its last place; without it all is answer.
    earlier_turns: of the assistant's turns but the last. A turn of n tokens is multiplied by exp(-gamma max(0, n - l_max))."""

    marker: str | None
    reasoning: float
    answer: float
    tool_calls: float
    earlier_turns: float
    gamma: float
    l_max: int

    def factors(self, rendered: Rendered, messages: Sequence[Message]) -> list[Factor]:
        """messages: of the conversation, by the turns' numbers. Raises UserError where the template's spans are not the turns."""
        turns = rendered.turns
        known = [messages[turn.message] if turn.message >= 0 else {} for turn in turns]
        own = [message.get("weight", 1.0) for message in (messages if {} in known else known)]
        if self.is_plain and all(weight == 1 for weight in own):
            return []
        if {} in known:
            marked = f"the chat template marks {len(turns)} spans, which are not the assistant's turns"
            raise UserError(f"{marked}, so that none can have a weight of its own; leave cot and weights alone")
        last = max((k for k, turn in enumerate(turns) if turn.answer), default=-1)
        found: list[Factor] = []
        for k, (turn, message, weight) in enumerate(zip(turns, known, own, strict=True)):
            start, stop = turn.span
            scale = _checked(weight, "weight of a message") * (1.0 if k == last or not turn.answer else self.earlier_turns)
            parts = self._parts(rendered.text[start:stop], message) if turn.answer else [(0, stop - start, 1.0)]
            found += [(start + a, start + b, scale * factor) for a, b, factor in parts]
        return found

    def _parts(self, text: str, turn: Message) -> list[Factor]:
        """The parts of one turn."""
        if turn.get("tool_calls"):
            said = content_of(turn).strip()
            border = text.rfind(said) + len(said) if said and said in text else 0
            return [(0, border, self.answer), (border, len(text), self.tool_calls)]
        at = text.rfind(self.marker) if self.marker else -1
        border = at + len(self.marker or "") if at >= 0 else 0
        return [(0, border, self.reasoning), (border, len(text), self.answer)]

    @property
    def is_plain(self) -> bool:
        """Does every trained token count 1, whatever its place?"""
        return (self.reasoning, self.answer, self.tool_calls, self.earlier_turns, self.gamma) == (1, 1, 1, 1, 0)

    @property
    def of_answers(self) -> Weighing:
        """Only what stands behind the marker counts, so that a loss is -log p(answer | prompt, reasoning)."""
        return replace(PLAIN, marker=self.marker, reasoning=0.0)


def weighing_of(cfg: Stage) -> Weighing:
    """What a run's config says of it."""
    if not isinstance(cfg, Conversational):
        return PLAIN
    cot, other = cfg.cot, cfg.weights
    spans = (cot.reasoning_weight, cot.answer_weight, other.tool_calls, other.earlier_turns)
    return Weighing(cot.marker, *spans, other.gamma, other.l_max)


PLAIN = Weighing(None, 1.0, 1.0, 1.0, 1.0, 0.0, 1)


def row_weight(row: dict[str, Any]) -> float:
    """The row's own weight; 1 where it says none."""
    return 1.0 if row.get("weight") is None else _checked(row["weight"], "weight")


def _checked(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name} is {value!r}, not a number from 0 on")
    return float(value)


def weigh(
    weights: list[float], offsets: Sequence[Span], turns: Sequence[Turn], factors: Sequence[Factor], weighing: Weighing
) -> None:
    """Multiply the weights of tokens in place. offsets: characters of each token, in order."""
    starts = [start for start, _ in offsets]
    for turn in turns:  # a token that begins before a turn is of the turn's first part
        for k in touching(offsets, turn.span)[:1]:
            starts[k] = max(starts[k], turn.span[0])
    for start, stop, factor in factors:
        low, high = bisect_left(starts, start), bisect_left(starts, stop)
        weights[low:high] = [factor * weight for weight in weights[low:high]]
    if not weighing.gamma:
        return
    for start, stop in (turn.span for turn in turns if turn.answer):
        low, high = bisect_left(starts, start), bisect_left(starts, stop)
        scale = math.exp(-weighing.gamma * max(0, high - low - weighing.l_max))
        weights[low:high] = [scale * weight for weight in weights[low:high]]
