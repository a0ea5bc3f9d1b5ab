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
from typing import Any, cast

from posttrain.data.chat.alignment import (
    REASONING,
    SENTINEL,
    AlignedText,
    Rendered,
    Span,
    any_of,
    blank_before,
    content_of,
    first_words,
    lay_out,
    sentinel,
    sentinels,
    skeleton,
    tested_strings,
)
from posttrain.data.rows import Message
from posttrain.errors import UserError

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_END = "the chat template never ends an assistant turn, so the model would not learn to stop"
ADVICE = "give model.chat_template=chatml, or a Jinja file with {% generation %} markers"


class ChatTemplate:
    """A tokenizer's chat template, and what the assistant says in the conversations that it renders.

    stops: texts of tokens at which the model stops beside the tokenizer's eos (its generation_config may name some).
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        if not tokenizer.chat_template:
            raise UserError("this tokenizer has no chat template; give model.chat_template=chatml or a Jinja file")
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
        self._next_special = re.compile(rf"\s*({any_of(self._special)})")
        self._tested: Callable[[str], re.Pattern[str]] = lru_cache(tested_strings)
        self._layout: Callable[[str], AlignedText] = lru_cache(maxsize=1024)(self._make_layout)
        self._content_as_list = False
        if self._probe("user", "assistant") is None:  # vision templates may take contents as lists of parts only
            self._content_as_list = True
            self._content_as_list = self._probe("user", "assistant") is not None
        self._set_ends({token for token in (*stops, tokenizer.eos_token) if token})

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, first: int = 0) -> Rendered:
        """Render a conversation; the spans are the assistant turns among messages[first:], end-of-turn tokens included.

        Raises UserError if the template refuses the conversation, or if a turn cannot be located with certainty.
        """
        plain = [_plain(message) for message in messages]
        if self._is_marked(tools):
            return self._render_marked(plain, tools, first)
        real, _ = self._render(plain, tools)
        if SENTINEL.search(real):
            raise UserError("a message holds the characters U+10F0A0 and U+10F0A1, used to mark its words; remove them")
        bones, words = skeleton(plain, self._tested(self._source(tools)))
        key = json.dumps([bones, tools, first])
        escaped = [json.dumps(w, ensure_ascii=False)[1:-1] if role == "tool" else w for w, role in words]
        for layout_of in (self._layout, self._make_layout):  # made anew: a template may write today's date
            layout = layout_of(key)
            for attempt in ([w for w, _ in words], escaped):
                filled = layout.fill(attempt)
                if filled.text == real + layout.appended:
                    return filled
        raise UserError(f"the chat template rewrites a message, so that its words cannot be told from others; {ADVICE}")

    def render_prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> str:
        """A conversation up to where the assistant begins its next turn."""
        return self._render([_plain(message) for message in messages], tools, prompt=True)[0]

    @property
    def ends(self) -> frozenset[str]:
        """Texts that end an assistant turn."""
        return frozenset(self._ends)

    @property
    def answer_end(self) -> str:
        """The special token with which an answer that ends a conversation is over; empty where the template closes none."""
        probe = self._probe("user", "assistant")
        run = max(self._closings(probe[0], probe[1][-1], self._stops), key=len, default="") if probe else ""
        return next((token for token in self._special if run.endswith(token)), "")

    def _source(self, tools: list[Any] | None) -> str:
        return self._tokenizer.get_chat_template(None, tools)

    def _is_marked(self, tools: list[Any] | None) -> bool:
        return MARKERS.search(self._source(tools)) is not None

    def _render(self, messages: list[Message], tools: list[Any] | None, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text that the template gives, and the spans within its generation markers."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._content_as_list:
            messages = [_with_listed_content(message) for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self._source(tools),
                return_assistant_tokens_mask=self._is_marked(tools),
                add_generation_prompt=prompt,
                **self._variables,
            )
        except Exception as error:  # a template is a program of its author's: it may fail in any way
            raise UserError(f"the chat template refuses this conversation: {error}") from error
        return texts[0], cast("list[Span]", spans[0] if spans else [])

    def _probe(self, *roles: str) -> tuple[str, list[int]] | None:
        """A conversation of sentinels, with the end of each; None if the template does not show them all in order."""
        messages = [{"role": role, "content": sentinel(n)} for n, role in enumerate(roles)]
        try:
            text, _ = self._render(messages, None)
        except UserError:
            return None
        found = list(SENTINEL.finditer(text))
        in_order = [int(m.group(1)) for m in found] == list(range(len(roles)))
        return (text, [m.end() for m in found]) if in_order else None

    def _set_ends(self, stops: set[str]) -> None:
        """Learn what ends a turn: the tokens that close a last message, where no next header can stand, and `stops`.

        GLM closes no message: its models stop by writing the next turn's header token. Where `stops` confirm that, the
        token is an end, and it is appended to a conversation that ends with an answer.
        """
        self._stops, self._ends = stops, set(stops)
        for roles in (("user",), ("user", "assistant")):
            if probe := self._probe(*roles):
                self._ends |= self._closings(probe[0], probe[1][-1], stops)
        self._end = re.compile(any_of(tuple(self._ends)))
        self._next_end = re.compile(rf"\s*({self._end.pattern})")
        self._appended = ""
        last, middle = self._probe("user", "assistant"), self._probe("user", "assistant", "user")
        if last and middle and not self._next_special.match(last[0], last[1][-1]):
            header = self._next_special.match(middle[0], middle[1][1])
            self._appended = header.group(1) if header and header.group(1) in stops else ""

    def _closings(self, text: str, position: int, stops: set[str]) -> set[str]:
        """The run of special tokens after `position` up to one of `stops` (Cohere 2 has two), and its beginnings."""
        closings, run = set(), ""
        match = self._next_special.match(text, position)
        while match and (not run or match.start(1) == position):
            run, position = run + match.group(1), match.end(1)
            closings.add(run)
            match = None if match.group(1) in stops else self._next_special.match(text, position)
        return closings

    def _render_marked(self, messages: list[Message], tools: list[Any] | None, first: int) -> Rendered:
        text, marked = self._render(messages, tools)
        if first:
            prompt, _ = self._render(messages[:first], tools, prompt=True)
            shared = next((k for k, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
            marked = [span for span in marked if span[1] > shared]
        turns = sum(message["role"] == "assistant" for message in messages[first:])
        if len(marked) < turns:
            raise UserError(f"the chat template's generation markers cover {len(marked)} of {turns} assistant turns")
        spans = [(start, self._end_of_marked(text, start, stop)) for start, stop in marked]
        said = [(start, start + len(self._without_end(text[start:stop]))) for start, stop in spans]
        return Rendered(text, spans, [(start, stop) for start, stop in said if text[start:stop].strip()])

    def _without_end(self, turn: str) -> str:
        end = max((end for end in self._ends if turn.endswith(end)), key=len, default="")
        return turn.removesuffix(end)

    def _end_of_marked(self, text: str, start: int, stop: int) -> int:
        """The end of a marked turn, moved so that its end-of-turn token is the last thing within."""
        words = text[start:stop].rstrip()
        following = self._next_end.match(text, stop)
        if following and not words.endswith(tuple(self._ends)):
            return following.end(1)
        if words.endswith(self._special):
            return start + len(words)
        raise UserError(NO_END)

    def _make_layout(self, key: str) -> AlignedText:
        messages, tools, first = json.loads(key)
        text, _ = self._render(messages, tools)
        appended = self._appended if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1] else ""
        text += appended
        turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        spans = [self._locate(text, messages, i, tools) for i in turns]
        return lay_out(text, spans, appended)

    def _locate(self, text: str, messages: list[Message], i: int, tools: list[Any] | None) -> Span:
        """The span of the assistant turn messages[i] in the rendered skeleton."""
        message = messages[i]
        reasoning = [s for name in REASONING if name in message for s in sentinels(message[name]) if s in text]
        content = [s for s in sentinels(content_of(message)) if s in text]
        calls = bool(message.get("tool_calls"))
        if not (reasoning or content or calls):
            raise UserError(f"the chat template does not render assistant message {i + 1}; {ADVICE}")
        if any(text.count(s) > 1 for s in {*reasoning, *content}):
            raise UserError(f"the chat template renders assistant message {i + 1} more than once; {ADVICE}")
        opening = self._opening(text, messages[:i], tools)
        if (calls or reasoning) and opening is None:
            what = "tool calls" if calls else "reasoning"
            raise UserError(f"the start of assistant message {i + 1}, which has {what}, is not certain; {ADVICE}")
        start = opening if calls or reasoning else self._start_of_content(text, messages, i, tools, opening)
        assert start is not None
        if calls:
            return start, self._end_of_calls(text, start, messages, i)
        last = max((text.index(s), s) for s in {*reasoning, *content})[1]
        return start, self._end_of_content(text, content_of(message), last)

    def _opening(self, text: str, before: list[Message], tools: list[Any] | None) -> int | None:
        """Where the generation prompt ends, if what comes before it is rendered just as it is here."""
        try:
            prompt, _ = self._render(before, tools, prompt=True)
        except UserError:
            return None
        return len(prompt) if text.startswith(prompt) else None

    def _start_of_content(self, text: str, messages: list[Message], i: int, tools: list[Any] | None, opening: int | None) -> int:
        """Where the model begins to write: after the generation prompt, where that is a part of the rendering.

        What the template puts between prompt and content (an empty think block, a channel) is then the model's to write
        as well. Else the content starts the span, with white space that is the content's own: that goes when it goes.
        """
        if opening is not None:
            return opening
        content, tested = content_of(messages[i]), self._tested(self._source(tools))
        start, at = first_words(text, content, tested)
        lead = blank_before(content, at)
        if not lead:
            return start
        bare = content[: at - len(lead)] + content[at:]
        bare_text, _ = self._render([*messages[:i], {**messages[i], "content": bare}, *messages[i + 1 :]], tools)
        blank, bare_blank = blank_before(text, start), blank_before(bare_text, first_words(bare_text, bare, tested)[0])
        own = len(blank) - len(bare_blank)
        if own < 0 or not lead.endswith(blank[len(blank) - own :]):
            raise UserError(f"the white space before assistant message {i + 1} may be content or header; {ADVICE}")
        return start - own

    def _end_of_content(self, text: str, content: str, last: str) -> int:
        stop = text.index(last) + len(last)
        for tag in re.findall(r"\S+", content.partition(last)[2]):
            after = text[stop:]
            if not after.lstrip().startswith(tag):
                break
            stop += len(after) - len(after.lstrip()) + len(tag)
        end = self._next_end.match(text, stop)
        if end is None:
            raise UserError(NO_END)
        return end.end(1)

    def _end_of_calls(self, text: str, start: int, messages: list[Message], i: int) -> int:
        """Tool calls run to the first end token, which none of them may hold itself, and before the next message."""
        own = json.dumps(messages[i], ensure_ascii=False)
        later = [text.find(s) for message in messages[i + 1 :] for s in sentinels(content_of(message))]
        limit = min((place for place in later if place >= 0), default=len(text))
        names = [call.get("function", call)["name"] for call in messages[i]["tool_calls"]]
        end = self._end.search(text, start, limit)
        if end is None or self._end.search(own):
            raise UserError(f"the end of the tool calls of assistant message {i + 1} is not certain; {ADVICE}")
        if any(name not in text[start : end.start()] for name in names):
            raise UserError(f"the chat template does not render the tool calls of assistant message {i + 1}; {ADVICE}")
        return end.end()


def _plain(message: Message) -> Message:
    """Without absent fields, and with its content as one string."""
    plain = {name: value for name, value in message.items() if value is not None}
    if "content" in plain and not isinstance(plain["content"], str):
        parts = plain["content"]
        if not isinstance(parts, list) or any(not isinstance(p, dict) or p.get("type") != "text" for p in parts):
            raise UserError(f"the content of a '{message['role']}' message is neither a text nor a list of texts")
        plain["content"] = "".join(part["text"] for part in parts)
    return plain


def _with_listed_content(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": content_of(message)}]}
