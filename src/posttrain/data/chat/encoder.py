"""Canonical rows -> tokens and loss weights, by the tokenizer's own chat template."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from posttrain.data.chat.alignment import Rendered, Turn
from posttrain.data.chat.encoded import Encoded, EncodedPair, EncodedPrompt, first_word_of, pair_of, weights_of
from posttrain.data.chat.loss_weights import PLAIN, Factor, Weighing, row_weight, weigh
from posttrain.data.chat.options import ChatOptions
from posttrain.data.chat.rendering import Variables
from posttrain.data.chat.template import ASSISTANT, ChatTemplate
from posttrain.data.chat.template_text import chat_template, template_hash
from posttrain.data.chat.tokenize import Tokeniser, Tokens
from posttrain.data.rows import CanonicalRow, Message, prompt_of, reference_of
from posttrain.errors import UserError

__all__ = ["Encoded", "EncodedPair", "Encoder", "chat_template", "template_hash"]


@dataclass(frozen=True)
class _Text:
    """A text to tokenise; `document`: with the beginning and the end of a document that a chat template would write."""

    rendered: Rendered
    document: bool
    factors: list[Factor]
    weight: float  # of the row

    @property
    def is_whole(self) -> bool:
        """Does all of the text count alike?"""
        return self.document and not self.factors and self.rendered.spans == [(0, len(self.rendered.text))]


class Encoder:
    """Builds examples with one tokenizer. Make a new one after a change to the tokenizer or its chat template.

    stops: texts of tokens at which the model stops beside the tokenizer's eos (see ChatTemplate). weighing: how much which
    trained tokens count. options: what of a conversation the chat template gets. identity: a hash of all else that decides which
    tokens and weights come out.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), weighing: Weighing = PLAIN, options: ChatOptions | None = None
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError("model.name: its tokenizer has no tokenizer.json, which exact loss masks need (offsets)")
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self.weighing = weighing
        self.options = options or ChatOptions()
        self._template: ChatTemplate | None = None
        self._tokeniser = Tokeniser(tokenizer)
        # a model that a run has saved stops at its template's end of turn and at eos, as its base does that names them not
        others = [stop for stop in self._stops if stop != tokenizer.eos_token]
        own = (tokenizer.eos_token, *(stop for stop in others if stop != self._answer_end))
        self.identity = _identity(tokenizer, own)
        added = tokenizer("x")["input_ids"]
        self.start: list[int] = added[:1] if added and added[0] == tokenizer.bos_token_id else []  # of every text

    def weighing_as(self, weighing: Weighing) -> Encoder:
        """The same tokens, weighed otherwise."""
        other = copy.copy(self)
        other.weighing = weighing
        return other

    def reading_as(self, options: ChatOptions) -> Encoder:
        """The same tokenizer, with other parts of a conversation handed to the chat template."""
        other = copy.copy(self)
        other.options = options if options.template is not None else replace(options, template=self.options.template)
        other._template = self._template if options.variables == self.options.variables else None
        return other

    def templated(self, template: bool) -> Encoder:
        """The same with texts as prompts rendered by the chat template, or not."""
        return self.reading_as(replace(self.options, template=template))

    @property
    def of_chat_model(self) -> bool:
        """Has the model a chat template at whose end of turn it stops?"""
        return bool(self._answer_end) and self._answer_end in (self._tokenizer.eos_token, *self._stops)

    def encode(self, row: CanonicalRow) -> Encoded | EncodedPair:
        """Encode a canonical row of any kind."""
        return self.encode_pair(row) if "chosen" in row else self._encode([self._text(row)])[0]

    def encode_many(self, rows: Iterable[tuple[int, CanonicalRow]], where: Callable[[int], str]) -> list[Encoded]:
        """Encode rows other than pairs, each with its number, all at once; errors start with `where` of the number."""
        texts = []
        for number, row in rows:
            with _naming(where, number):
                texts.append(self._text(row))
        return self._encode(texts)

    def encode_text(self, row: CanonicalRow) -> Encoded:
        """A document: every token counts, the end of the document too."""
        return self._encode([self._text({"text": row["text"]})])[0]

    def encode_conversation(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Encoded:
        """Count the words of each turn that is learnt, the assistant's if nothing else is said, and its end-of-turn token."""
        return self._encode([self._conversation(messages, tools, roles=self.options.roles)])[0]

    def encode_completion(self, prompt: str, completion: str) -> Encoded:
        """Plain text without template; the completion and the end of the document count."""
        return self._encode([self._continuation(prompt, completion, 1.0)])[0]

    def encode_pair(self, row: CanonicalRow) -> EncodedPair:
        """Encode prompt, chosen and rejected: all three texts, or a list of messages and two answers.

        Each answer is tokenised together with the prompt; the prompt is what both begin with, up to the first token
        that counts in either. Raises UserError if the answers are the same.
        """
        return pair_of(*self._encode_both([self._answers(row)])[0], row_weight(row))

    def encode_pairs(self, rows: Sequence[tuple[int, CanonicalRow]], where: Callable[[int], str]) -> list[EncodedPair]:
        """Encode pairs, each with its number, all at once; errors start with `where` of the number."""
        texts, pairs = [], []
        for number, row in rows:
            with _naming(where, number):
                texts.append(self._answers(row))
        for (number, row), answers in zip(rows, self._encode_both(texts), strict=True):
            with _naming(where, number):
                pairs.append(pair_of(*answers, row_weight(row)))
        return pairs

    def encode_prompt(self, row: CanonicalRow) -> list[int]:
        """The tokens after which an assistant's answer begins: of a conversation without the answer that it ends with."""
        return self._prompts([self._prompt(row)])[0]

    def encode_prompts(self, rows: Iterable[tuple[int, CanonicalRow]], where: Callable[[int], str]) -> list[EncodedPrompt]:
        """The prompt of each row and the tokens of its `reference_of`; errors start with `where` of the row's number."""
        prompts, known = [], []
        for number, row in rows:
            with _naming(where, number):
                prompts.append(self._prompt(row))
            known.append(reference_of(row))
        found = zip(self._prompts(prompts), self._tokeniser.ids(known), prompts, strict=True)
        return [EncodedPrompt(tokens, reference, text.rendered.lost) for tokens, reference, text in found]

    def _prompt(self, row: CanonicalRow) -> _Text:
        if not self.options.renders(row):
            return _Text(Rendered(row["prompt"], [], [], []), True, [], 1.0)
        messages, tools = self.options.shaped(prompt_of(row), row.get("tools"))
        rendered = self._chat_template.render_prompt(messages, tools, _variables(row))
        self.options.check(rendered.lost)
        return _Text(rendered, False, [], 1.0)

    def _prompts(self, texts: Sequence[_Text]) -> list[list[int]]:
        found = self._tokeniser.ids([text.rendered.text for text in texts])
        return [[*self.start, *ids] if text.document else ids for ids, text in zip(found, texts, strict=True)]

    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end an answer: the end of turn of the chat template first, if there is one, then eos, then the
        other stops. What closes other roles' messages, or a part of an answer, is none."""
        texts = (self._answer_end, self._tokenizer.eos_token, *self._stops)
        ids = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts if text]
        return list(dict.fromkeys(found[0] for found in ids if len(found) == 1))

    @property
    def _answer_end(self) -> str:
        return self._chat_template.answer_end if self._tokenizer.chat_template else ""

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._stops, self.options.variables)
        return self._template

    def _text(self, row: CanonicalRow) -> _Text:
        weight = row_weight(row)
        if "messages" in row:
            first, variables = row.get("first", 0), _variables(row)
            return self._conversation(row["messages"], row.get("tools"), first, weight, variables, self.options.roles)
        if "completion" in row and self.options.template:
            asked = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            return self._conversation(asked, None, 0, weight, _variables(row), self.options.roles)
        if "completion" in row:
            return self._continuation(row["prompt"], row["completion"], weight)
        return _Text(_continued("", row["text"]), True, [], weight)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None,
        first: int = 0,
        weight: float = 1.0,
        variables: Variables | None = None,
        roles: frozenset[str] = ASSISTANT,
    ) -> _Text:
        if not messages:
            raise UserError("a conversation needs at least one message")
        shaped, tools = self.options.shaped(messages, tools)
        if first and self.options.tools == "inline":  # results of calls that follow one another become one message
            first = len(shaped) - len(self.options.shaped(messages[first:], None)[0])
        rendered = self._chat_template.render(shaped, tools, first, variables, roles)
        self.options.check(rendered.lost)
        return _Text(rendered, False, self.weighing.factors(rendered, shaped), weight)

    def _continuation(self, prompt: str, completion: str, weight: float) -> _Text:
        """A prompt is the user's words, and what follows it the assistant's."""
        rendered = _continued(prompt, completion, self.options.roles)
        factors = self.weighing.factors(rendered, [{"content": prompt}, {"content": completion}])
        return _Text(rendered, True, factors, weight)

    def _answers(self, row: CanonicalRow) -> tuple[_Text, _Text]:
        return self._answer(row, row["chosen"]), self._answer(row, row["rejected"])

    def _answer(self, row: CanonicalRow, answer: str | list[Message]) -> _Text:
        prompt = row["prompt"]
        if isinstance(prompt, str) and isinstance(answer, str) and not self.options.renders(row):
            return _Text(_continued(prompt, answer), True, [], 1.0)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return self._conversation([*before, *after], row.get("tools"), len(before), variables=_variables(row))

    def _encode(self, texts: Sequence[_Text]) -> list[Encoded]:
        if all(text.is_whole for text in texts) and not self.weighing.gamma:
            ids = self._tokeniser.ids([text.rendered.text for text in texts])
            return [self._all_trained(tokens, text) for tokens, text in zip(ids, texts, strict=True)]
        found = self._tokeniser.tokens([text.rendered.text for text in texts])
        return [self._weighed(tokens, text) for tokens, text in zip(found, texts, strict=True)]

    def _encode_both(self, answers: Sequence[tuple[_Text, _Text]]) -> list[tuple[Encoded, Encoded]]:
        found = self._tokeniser.pairs([(chosen.rendered.text, rejected.rendered.text) for chosen, rejected in answers])
        weighed = self._weighed
        return [(weighed(x, c), weighed(y, r)) for (x, y), (c, r) in zip(found, answers, strict=True)]

    def _all_trained(self, tokens: list[int], text: _Text) -> Encoded:
        first = self._least(text) if text.rendered.words and len(tokens) > self._least(text) else -1
        return self._finished(tokens, [1.0] * len(tokens), 0, first, text)

    def _least(self, text: _Text) -> int:
        """Index of the first of the text's tokens that is predicted."""
        return 0 if text.document and self.start else 1

    def _weighed(self, tokens: Tokens, text: _Text) -> Encoded:
        weights, borders = weights_of(tokens.offsets, text.rendered.spans)
        if text.factors or self.weighing.gamma:
            weigh(weights, tokens.offsets, text.rendered.turns, text.factors, self.weighing)
        first = first_word_of(tokens.offsets, text.rendered.words, weights, self._least(text))
        return self._finished(tokens.ids, weights, borders, first, text)

    def _finished(self, tokens: list[int], weights: list[float], borders: int, first_word: int, text: _Text) -> Encoded:
        """With the row's own weight, and a document's beginning and end."""
        first_word = first_word if text.weight else -1
        shaped, answered = text.factors or self.weighing.gamma, any(turn.answer for turn in text.rendered.turns)
        end_weight = (weights[-1] if shaped and weights else 1.0) if answered else 0.0  # the end counts as what it ends
        if text.weight != 1:
            weights, end_weight = [text.weight * weight for weight in weights], text.weight * end_weight
        if not text.document:
            return Encoded(tokens, weights, borders, first_word, text.rendered.lost)
        end = self._tokenizer.eos_token_id
        if end is None:
            raise UserError("model.name: its tokenizer has no eos token, so a document's end cannot be marked")
        whole = text.rendered.spans[:1] and text.rendered.spans[0][0] == 0
        start_weights = [text.weight if whole else 0.0] * len(self.start)
        first_word += len(self.start) if first_word >= 0 else 0
        return Encoded([*self.start, *tokens, end], [*start_weights, *weights, end_weight], borders, first_word)


@contextmanager
def _naming(where: Callable[[int], str], number: int) -> Iterator[None]:
    """What is wrong within starts with where the row is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where(number)}: {error}") from error


def _variables(row: CanonicalRow) -> dict[str, Any] | None:
    """Of the chat template, as the row has them."""
    found = row.get("chat_template_kwargs")
    if found is not None and not isinstance(found, dict):
        raise UserError(f"chat_template_kwargs is {type(found).__name__}, not an object of names and values")
    return found


def _identity(tokenizer: Any, stops: tuple[str, ...]) -> str:
    """sha256 over vocabulary, merges, special tokens, chat template and stops."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}  # nothing is padded
    parts = [tokenizer.backend_tokenizer.to_str(), template_hash(tokenizer), str(special), str(stops)]
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def _continued(prompt: str, text: str, roles: frozenset[str] = ASSISTANT) -> Rendered:
    """A text of which all but its beginning is trained, or what is of these roles: a prompt is the user's."""
    whole, border = prompt + text, len(prompt)
    turns = [Turn(0, (0, border), False)] if prompt and "user" in roles else []
    turns += [Turn(1, (border, len(whole)))] if "assistant" in roles else []
    spans = [turn.span for turn in turns]
    spans = [(0, len(whole))] if len(spans) > 1 else spans
    return Rendered(whole, spans, [(start, stop) for start, stop in spans if whole[start:stop].strip()], turns)
