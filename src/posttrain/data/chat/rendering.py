"""What a tokenizer's own chat template writes, whatever form it wants contents and tool calls in."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from posttrain.data.chat.alignment import (
    ARGUMENTS,
    CALLS,
    SENTINEL,
    TOOLS,
    Field,
    Span,
    any_of,
    content_of,
    sentinel,
    tested_strings,
)
from posttrain.data.chat.calls import CALL_FORMS, CallForm, in_form, numbers_in
from posttrain.data.chat.sandbox import TooMuch, limit_templates
from posttrain.data.rows import Message
from posttrain.errors import UserError

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
INLINE = "data.tools=inline writes tools, calls and results into the contents"
_TOOL = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"k": {"type": "string", "description": "e"}}},
}


Variables = Mapping[str, Any]  # of a template: enable_thinking, reasoning_effort, ...


class Given(NamedTuple):
    """What a template gets beside the messages."""

    tools: list[Any] | None = None
    variables: Variables = MappingProxyType({})


class Renderer:
    """A tokenizer's chat template, and how it wants messages. All messages are `plain` ones."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError("this tokenizer has no chat template; give model.chat_template=chatml or a Jinja file")
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
        self.next_special = re.compile(rf"\s*({any_of(self.special)})")
        self._tested: Callable[[str], re.Pattern[str]] = lru_cache(tested_strings)
        self._forms: dict[bool, CallForm | None] = {}
        self._content_as_list = False
        if self.probe("user", "assistant") is None:  # vision templates may take contents as lists of parts only
            self._content_as_list = True
            self._content_as_list = self.probe("user", "assistant") is not None

    def tested(self, given: Given) -> re.Pattern[str]:
        """Strings within messages that steer the template (see `tested_strings`)."""
        return self._tested(self._source(given))

    def is_marked(self, given: Given) -> bool:
        """Has the template {% generation %} markers?"""
        return MARKERS.search(self._source(given)) is not None

    def render(self, messages: list[Message], given: Given, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text that the template gives, and the spans within its generation markers. Raises UserError if it refuses."""
        if any("tool_calls" in message for message in messages):
            form = self._form(given)
            if form is None:
                return self._write(messages, given, prompt, CALL_FORMS[0])
            return self._write(messages, given, prompt, form)
        return self._write(messages, given, prompt, CALL_FORMS[0])

    def probe(self, *roles: str) -> tuple[str, list[int]] | None:
        """A conversation of sentinels, with the end of each; None if the template does not show them all in order."""
        messages = [{"role": role, "content": sentinel(n)} for n, role in enumerate(roles)]
        try:
            text, _ = self.render(messages, Given())
        except TooMuch:
            raise
        except UserError:
            return None
        found = list(SENTINEL.finditer(text))
        in_order = [int(m.group(1)) for m in found] == list(range(len(roles)))
        return (text, [m.end() for m in found]) if in_order else None

    def _source(self, given: Given) -> str:
        return self._tokenizer.get_chat_template(None, given.tools)

    def _form(self, given: Given) -> CallForm | None:
        """The first form of calls in which a text among the arguments stands in the rendering as it is."""
        with_tools = bool(given.tools)
        if with_tools not in self._forms:
            tools = Given([{"type": "function", "function": _TOOL}] if with_tools else None, given.variables)
            self._forms[with_tools] = next((form for form in CALL_FORMS if self._shows(form, tools)), None)
        return self._forms[with_tools]

    def _shows(self, form: CallForm, given: Given) -> bool:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"k": sentinel(1)}}}
        messages: list[Message] = [
            {"role": "user", "content": sentinel(0)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": sentinel(2), "name": "f", "tool_call_id": "call00001"},
        ]
        for several in (messages, messages[:2]):
            try:
                text, _ = self._write(several, given, False, form)
            except TooMuch:
                raise
            except UserError:
                continue
            before, found, _ = text.partition(sentinel(1))
            return bool(found) and not before.endswith('\\"')  # else the object in JSON became a text in JSON
        return False

    def _write(self, messages: list[Message], given: Given, prompt: bool, form: CallForm) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        limit_templates()
        messages = [in_form(message, form) for message in messages]
        if self._content_as_list:
            messages = [message | {"content": [{"type": "text", "text": content_of(message)}]} for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=given.tools,
                chat_template=self._source(given),
                return_assistant_tokens_mask=self.is_marked(given),
                add_generation_prompt=prompt,
                **(self._variables | dict(given.variables)),
            )
        except TooMuch:
            raise
        except Exception as error:  # a template is a program of its author's: it may fail in any way
            has_calls = any(message["role"] == "tool" or "tool_calls" in message for message in messages)
            hint = f" ({INLINE})" if has_calls else ""
            raise UserError(f"the chat template refuses this conversation: {error}{hint}") from error
        return texts[0], cast("list[Span]", spans[0] if spans else [])


def unsaid(renderer: Renderer, text: str, messages: list[Message], given: Given, prompt: bool = False) -> list[Field]:
    """What is not in the text of what no sentinel stands for."""
    lost = []
    if given.tools and text == renderer.render(messages, given._replace(tools=None), prompt)[0]:
        lost.append(TOOLS)
    calls = [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]
    if any(not any(way in text for way in ways) for ways in numbers_in(calls)):
        lost.append(ARGUMENTS)
    bare = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
    if calls and renderer.is_marked(given) and text == renderer.render(bare, given, prompt)[0]:
        lost.append(CALLS)  # without markers the span of each call has been looked at
    return lost
