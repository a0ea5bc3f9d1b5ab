"""Where the assistant's words lie in the text that a tokenizer's own chat template renders.

A template without {% generation %} markers renders a conversation twice: as it is, and as a skeleton in which each run
of words is a sentinel, while white space and the strings that the template looks for (`</think>`) stay. Putting the
words back into the rendered skeleton must give the real rendering, letter by letter; only then is a place believed.
A skeleton's layout is cached, so rows of the same shape cost one rendering each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from posttrain.data.chat.alignment import (
    SENTINEL,
    AlignedText,
    Filled,
    Rendered,
    Said,
    Span,
    Turn,
    Word,
    blank_before,
    content_of,
    first_words,
    joined,
    lay_out,
    other_fields,
    sentinels,
    skeleton,
)
from posttrain.data.chat.calls import listed, plain
from posttrain.data.chat.ends import Ends
from posttrain.data.chat.markers import NO_END, marked_turns
from posttrain.data.chat.marks import is_learnt, marked_spans
from posttrain.data.chat.rendering import INLINE, Given, Renderer, Variables, unsaid
from posttrain.data.chat.trained import trained_of
from posttrain.data.rows import REASONING, Message
from posttrain.errors import UserError

ASSISTANT = frozenset({"assistant"})
ADVICE = "give model.chat_template=chatml, or a Jinja file with {% generation %} markers"


class ChatTemplate:
    """A tokenizer's chat template, and what the assistant says in the conversations that it renders.

    stops: texts of tokens at which the model stops beside the tokenizer's eos (its generation_config may name some).
    variables: of the template, beside those of a row.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), variables: Variables | None = None) -> None:
        self._variables = dict(variables or {})
        self._renderer = Renderer(tokenizer)
        self._layout: Callable[[str], AlignedText] = lru_cache(maxsize=1024)(self._make_layout)
        self._prompt_layout: Callable[[str], AlignedText] = lru_cache(maxsize=1024)(self._make_prompt_layout)
        self._ends = Ends(self._renderer, {token for token in (*stops, tokenizer.eos_token) if token})

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        first: int = 0,
        variables: Variables | None = None,
        roles: frozenset[str] = ASSISTANT,
    ) -> Rendered:
        """Render a conversation; its turns are the messages of `roles` among messages[first:], with the tokens that end them.

        Raises UserError if the template refuses the conversation, or if a turn cannot be located with certainty.
        """
        known, given = [plain(message) for message in messages], self._given(tools, variables)
        learnt = [i for i in range(first, len(known)) if is_learnt(known[i], roles)]
        real, marked = self._renderer.render(known, given)
        if SENTINEL.search(real):
            raise UserError("a message holds the characters U+10F0A0 and U+10F0A1, used to mark its words; remove them")
        bones, words = skeleton(known, self._renderer.tested(given), first, learnt)
        key = json.dumps([bones, given.tools, learnt, given.variables, len(words)])
        text, filled = real, self._filled(key, words, real)
        turns, said, lost = filled or Filled([], [], self._layout(key).lost_of(words))
        needed = [i for i in learnt if known[i]["role"] != "assistant" or marked_spans(known[i]) is not None]
        if self._renderer.is_marked(given):
            spans = joined(real, marked, tuple(self._ends.texts))
            own = marked_turns(self._renderer, self._ends, known, given, first, learnt, real, spans)
            turns, said = [*turns, *own], [*said, *(self._marked_words(real, turn) for turn in own)]
        else:
            text += self._layout(key).appended
        if filled is None and (needed or not self._renderer.is_marked(given)):
            raise UserError(f"the chat template rewrites a message, so that its words cannot be told from others; {ADVICE}")
        return trained_of(text, turns, known, said, (*lost, *other_fields(known, real)))

    def _marked_words(self, text: str, turn: Turn) -> Said:
        return Said(-1, 0, 0, (turn.span[0], turn.span[0] + len(self._ends.without(text[slice(*turn.span)]))))

    def _filled(self, key: str, words: list[Word], real: str) -> Filled | None:
        """The skeleton's layout with its words, if that is what is rendered."""
        for layout_of in (self._layout, self._make_layout):  # made anew: a template may write today's date
            layout = layout_of(key)
            if filled := layout.fill(words, real + layout.appended):
                return filled
        return None

    def render_prompt(
        self, messages: Sequence[Message], tools: list[Any] | None = None, variables: Variables | None = None
    ) -> Rendered:  # fmt: skip
        """A conversation up to where the assistant begins its next turn, of which nothing is trained."""
        known, given = [plain(message) for message in messages], self._given(tools, variables)
        text = self._renderer.render(known, given, prompt=True)[0]
        bones, words = skeleton(known, self._renderer.tested(given), len(known))
        layout = self._prompt_layout(json.dumps([bones, given.tools, given.variables, len(words)]))
        return Rendered(text, [], [], [], (*layout.lost_of(words), *other_fields(known, text)))

    def _given(self, tools: list[Any] | None, variables: Variables | None) -> Given:
        return Given(listed(tools), self._variables | dict(variables or {}))

    @property
    def answer_end(self) -> str:
        """See `Ends.of_answer`."""
        return self._ends.of_answer

    def _make_layout(self, key: str) -> AlignedText:
        messages, tools, learnt, variables, words = json.loads(key)
        given = Given(tools, variables)
        text, _ = self._renderer.render(messages, given)
        lost = unsaid(self._renderer, text, messages, given)
        marked, ends_open = (
            self._renderer.is_marked(given),
            messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1],
        )
        appended = self._ends.appended if ends_open and not marked else ""
        text += appended
        turns = list[Turn]()
        for i in learnt:
            if messages[i]["role"] != "assistant":
                turns += self._others_turn(text, messages, i, given)
            elif not marked:
                turns.append(Turn(i, self._locate(text, messages, i, given)))
        return lay_out(text, turns, appended, words, lost)

    def _make_prompt_layout(self, key: str) -> AlignedText:
        messages, tools, variables, words = json.loads(key)
        given = Given(tools, variables)
        text, _ = self._renderer.render(messages, given, prompt=True)
        return lay_out(text, [], "", words, unsaid(self._renderer, text, messages, given, prompt=True))

    def _locate(self, text: str, messages: list[Message], i: int, given: Given) -> Span:
        """The span of the assistant turn messages[i] in the rendered skeleton."""
        message = messages[i]
        reasoning = [s for name in REASONING if name in message for s in sentinels(message[name]) if s in text]
        content = [s for s in sentinels(content_of(message)) if s in text]
        calls = bool(message.get("tool_calls"))
        if not (reasoning or content or calls):
            raise UserError(f"the chat template does not render assistant message {i + 1}; {ADVICE}")
        if any(text.count(s) > 1 for s in {*reasoning, *content}):
            raise UserError(f"the chat template renders assistant message {i + 1} more than once; {ADVICE}")
        opening = self._opening(text, messages, i, given)
        if calls or reasoning:
            opening = self._after_header(text, messages, i, given) if opening is None else opening
            if opening is None:
                what = "tool calls" if calls else "reasoning"
                raise UserError(f"the start of assistant message {i + 1}, which has {what}, is not certain; {ADVICE}")
        start = opening if calls or reasoning else self._start_of_content(text, messages, i, given, opening)
        assert start is not None
        if calls:
            return start, self._end_of_calls(text, start, messages, i, given)
        last = max((text.index(s), s) for s in {*reasoning, *content})[1]
        return start, self._end_of_content(text, content_of(message), last)

    def _others_turn(self, text: str, messages: list[Message], i: int, given: Given) -> list[Turn]:
        """The words of messages[i], which is not the assistant's, with the token that closes it, if one follows; nothing where
        the template does not render it. What a template writes around them, its header and tools above all, is not theirs."""
        content = [s for s in sentinels(content_of(messages[i])) if s in text]
        if not content:
            return []
        if any(text.count(s) > 1 for s in content):
            raise UserError(f"the chat template renders message {i + 1}, the {messages[i]['role']}'s, more than once; {ADVICE}")
        start = self._start_of_content(text, messages, i, given, None)
        last = max((text.index(s), s) for s in content)[1]
        stop = self._after_tags(text, content_of(messages[i]), last)
        end = self._ends.closing.match(text, stop)
        return [Turn(i, (start, end.end(1) if end else stop), False)]

    def _prompt(self, before: list[Message], given: Given) -> str | None:
        try:
            return self._renderer.render(before, given, prompt=True)[0]
        except UserError:
            return None

    def _opening(self, text: str, messages: list[Message], i: int, given: Given) -> int | None:
        """Where the generation prompt ends, if what comes before it is rendered just as it is here."""
        prompt = self._prompt(messages[:i], given)
        return len(prompt) if prompt is not None and text.startswith(prompt) else None

    def _after_header(self, text: str, messages: list[Message], i: int, given: Given) -> int | None:
        """Where the header of messages[i] ends, as the generation prompt writes it: all of it, or up to the first tag in it that
        steers the template (`<think>`), where this turn has no such tag. What earlier turns are like does not matter."""
        prompt, marks = self._prompt(messages[:i], given), sentinels(json.dumps(messages[i - 1], ensure_ascii=False))
        last = max((s for s in marks if text.count(s) == 1 and prompt and s in prompt), key=text.index, default=None)
        if prompt is None or last is None:
            return None
        tail, after = prompt[prompt.rindex(last) + len(last) :], text.index(last) + len(last)
        bare, _ = self._renderer.render(messages[:i], given)
        written = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        tag = re.search(r"<think>|<.channel", written)
        headers = [tail, tail.removesuffix(written) + written[: tag.start()]] if tag and tag.start() else [tail]
        return next((after + len(header) for header in headers if text.startswith(header, after)), None)

    def _start_of_content(self, text: str, messages: list[Message], i: int, given: Given, opening: int | None) -> int:
        """Where the model begins to write: after the generation prompt, where that is a part of the rendering.

        What the template puts between prompt and content (an empty think block, a channel) is then the model's to write
        as well. Else the content starts the span, with white space that is the content's own: that goes when it goes.
        """
        if opening is not None:
            return opening
        content, tested = content_of(messages[i]), self._renderer.tested(given)
        start, at = first_words(text, content, tested)
        lead = blank_before(content, at)
        if not lead:
            return start
        bare = content[: at - len(lead)] + content[at:]
        bare_text, _ = self._renderer.render([*messages[:i], {**messages[i], "content": bare}, *messages[i + 1 :]], given)
        blank, bare_blank = blank_before(text, start), blank_before(bare_text, first_words(bare_text, bare, tested)[0])
        own = len(blank) - len(bare_blank)
        if own < 0 or not lead.endswith(blank[len(blank) - own :]):
            raise UserError(f"the white space before assistant message {i + 1} may be content or header; {ADVICE}")
        return start - own

    def _after_tags(self, text: str, content: str, last: str) -> int:
        """Where a content ends: behind its last words, and what of it follows them."""
        stop = text.index(last) + len(last)
        for tag in re.findall(r"\S+", content.partition(last)[2]):
            after = text[stop:]
            if not after.lstrip().startswith(tag):
                break
            stop += len(after) - len(after.lstrip()) + len(tag)
        return stop

    def _end_of_content(self, text: str, content: str, last: str) -> int:
        end = self._ends.next.match(text, self._after_tags(text, content, last))
        if end is None:
            raise UserError(NO_END)
        return end.end(1)

    def _end_of_calls(self, text: str, start: int, messages: list[Message], i: int, given: Given) -> int:
        """Tool calls run to what ends them where nothing follows; else to the first end token before the next message, which
        none of them may hold itself."""
        calls = [call["function"] for call in messages[i]["tool_calls"]]
        end = self._end_as_last(text, start, messages, i, given)
        if end is None:
            own = json.dumps(messages[i], ensure_ascii=False)
            later = [text.find(s) for message in messages[i + 1 :] for s in sentinels(content_of(message))]
            limit = min((place for place in later if place >= 0), default=len(text))
            found = self._ends.any.search(text, start, limit)
            if found is None or self._ends.any.search(own):
                raise UserError(f"the end of the tool calls of assistant message {i + 1} is not certain; {ADVICE}")
            end = found.end()
        if any(call["name"] not in text[start:end] for call in calls):
            raise UserError(f"the chat template does not render the tool calls of assistant message {i + 1}; {INLINE}")
        if any(s not in text[start:end] for call in calls for s in sentinels(json.dumps(call, ensure_ascii=False))):
            raise UserError(f"the chat template does not render all arguments of assistant message {i + 1}'s calls; {INLINE}")
        return end

    def _end_as_last(self, text: str, start: int, messages: list[Message], i: int, given: Given) -> int | None:
        """Where the turn ends as it does if the conversation ends with it."""
        marks = [s for s in sentinels(json.dumps(messages[i], ensure_ascii=False)) if text.count(s) == 1]
        if not marks:
            return None
        last = max(marks, key=text.index)
        alone, _ = self._renderer.render(messages[: i + 1], given)
        closing = alone[alone.index(last) + len(last) :].rstrip() if alone.count(last) == 1 else ""
        after = text.index(last) + len(last)
        ended = closing.endswith(tuple(self._ends.texts)) and text.startswith(closing, after) and after > start
        return after + len(closing) if ended else None
