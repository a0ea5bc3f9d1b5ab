"""Tokens and weights of rows: expectations written out by hand on a small real tokenizer."""

import hashlib
import json
from datetime import datetime

import pytest
from tokenizers import AddedToken

from posttrain.data.chat import rendering
from posttrain.data.chat.encoder import Encoded, Encoder, chat_template, template_hash
from posttrain.errors import UserError

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"  # no end of turn at all
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


@pytest.fixture
def chatml(make_tokenizer):
    return make_tokenizer(chat_template("chatml"), CHATML_TOKENS)


def coloured(tokenizer, encoded: Encoded) -> str:
    """The decoded tokens with the trained stretches in braces."""
    out, trained = "", False
    stretch: list[int] = []
    for token, weight in [*zip(encoded.tokens, encoded.weights, strict=True), (None, None)]:
        if (bool(weight) != trained or token is None) and stretch:
            text = tokenizer.decode(stretch)
            out, stretch = out + (f"{{{text}}}" if trained else text), []
        trained = bool(weight)
        stretch += [] if token is None else [token]
    return out


def test_chatml_trains_contents_and_ends_of_turn(chatml):
    result = Encoder(chatml).encode_conversation([user("Hi"), assistant(" The dog.\n"), user("And?"), assistant("fox")])
    assert coloured(chatml, result) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{ The dog.\n<|im_end|>}\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n{fox<|im_end|>}\n"
    )
    assert set(result.weights) == {0.0, 1.0} and result.borders == 0


def test_markers_are_used_and_the_end_of_turn_outside_them_is_included(make_tokenizer):
    tokenizer = make_tokenizer(MARKED, CHATML_TOKENS)
    result = Encoder(tokenizer).encode_conversation([user("Hi"), assistant("The dog.")])
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{The dog.<|im_end|>}\n"
    assert coloured(tokenizer, result) == expected


def test_a_turn_may_be_marked_in_pieces(make_tokenizer):
    pieces = "{% generation %}{% endgeneration %}{% generation %}{{ m.content }}{% endgeneration %}{% generation %}"
    template = MARKED.replace(
        "{% generation %}{{ m.content }}{% endgeneration %}{% else", pieces + "{{ '!' }}{% endgeneration %}{% else"
    )
    tokenizer = make_tokenizer(template, CHATML_TOKENS)
    result = Encoder(tokenizer).encode_conversation([user("Hi"), assistant("The dog")])
    assert coloured(tokenizer, result) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{The dog!<|im_end|>}\n"


def test_markers_that_cover_no_assistant_turn_are_an_error(make_tokenizer):
    template = MARKED.replace("m.role == 'assistant'", "m.role == 'model'")
    with pytest.raises(UserError, match="markers cover 0 of 1 assistant turns"):
        Encoder(make_tokenizer(template, CHATML_TOKENS)).encode_conversation([user("Hi"), assistant("The dog.")])


def test_bos_that_the_template_writes_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer("{{ bos_token }}" + chat_template("chatml"), CHATML_TOKENS)
    from tokenizers import processors

    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    encoder = Encoder(tokenizer)
    tokens = encoder.encode_conversation([user("Hi"), assistant("dog")]).tokens
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    document = encoder.encode_text({"text": "the dog"})
    assert document.tokens[0] == tokenizer.bos_token_id and document.tokens[-1] == tokenizer.eos_token_id
    assert coloured(tokenizer, encoder.encode_completion("Q:", " dog")) == "<s>Q:{ dog</s>}"


def test_document_trains_every_token_and_its_end(chatml):
    result = Encoder(chatml).encode_text({"text": "the quick brown fox"})
    assert coloured(chatml, result) == "{the quick brown fox</s>}"
    assert result.weights == [1.0] * len(result.tokens)


def test_token_across_the_border_is_the_answers_and_is_counted(chatml):
    """The token " dog" holds the answer's letters even if its space is the prompt's; this tokenizer's offsets would hide it."""
    encoder = Encoder(chatml)
    inside, across = encoder.encode_completion("the", " dog"), encoder.encode_completion("the ", "dog")
    assert inside.tokens == across.tokens and len(inside.tokens) == 3
    assert (inside.weights, inside.borders, inside.first_word) == ([0.0, 1.0, 1.0], 0, 1)
    assert (across.weights, across.borders, across.first_word) == ([0.0, 1.0, 1.0], 1, 1)


def test_prompt_that_ends_within_the_letters_of_a_token_counts_as_border(chatml):
    result = Encoder(chatml).encode_completion("the do", "g")
    assert (result.weights, result.borders) == ([0.0, 1.0, 1.0], 1)


def test_the_end_alone_is_no_word_of_the_answer(chatml):
    encoder = Encoder(chatml)
    for empty in ("", " ", "\n"):
        assert encoder.encode_completion("the", empty).first_word == -1
        assert encoder.encode_conversation([user("a"), assistant(empty)]).first_word == -1
    late = encoder.encode_conversation([user("a"), assistant(""), user("b"), assistant("fox")])
    assert chatml.decode(late.tokens[late.first_word]) in "fox" and late.weights[late.first_word] == 1


def test_an_end_token_that_takes_blanks_along_ends_where_its_letters_do(make_tokenizer):
    """Phi 3's <|end|> takes the line feed behind it along, and its <|assistant|> the blanks of the answer itself."""
    tokenizer = make_tokenizer(chat_template("chatml").replace("+ '\\n' + message['content']", "+ message['content']"))
    ends = [AddedToken(text, rstrip=True, special=True, normalized=False) for text in ("<|im_end|>", "<|im_start|>assistant")]
    tokenizer.add_special_tokens({"additional_special_tokens": ends})
    result = Encoder(tokenizer).encode_conversation([user("Hi"), assistant("  dog")])
    assert coloured(tokenizer, result).endswith("<|im_start|>assistant{dog<|im_end|>}")


def test_all_bytes_of_a_character_are_trained(chatml):
    encoder = Encoder(chatml)
    assert coloured(chatml, encoder.encode_completion("a", "日👩‍💻")) == "a{日👩‍💻</s>}"
    assert encoder.encode_completion("a", "日👩‍💻").borders == 0


def test_encode_many_equals_one_at_a_time_and_names_the_row(chatml):
    rows = [
        (4, {"messages": [user("Hi"), assistant("dog")]}),
        (7, {"messages": [user(" x "), assistant("y\n"), user("Hi"), assistant("dog")]}),
        (8, {"text": "the fox"}),
        (9, {"prompt": "Q:", "completion": " A"}),
    ]
    encoder = Encoder(chatml)
    assert encoder.encode_many(rows, "a.jsonl, row {}".format) == [encoder.encode(row) for _, row in rows]
    with pytest.raises(UserError, match=r"^a\.jsonl, row 12: a conversation needs"):
        encoder.encode_many([(12, {"messages": []})], "a.jsonl, row {}".format)


def test_pair_splits_at_the_generation_prompt(chatml):
    row = {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("the dog")],
        "rejected": [assistant("the fox")],
    }
    encoder = Encoder(chatml)
    pair = encoder.encode_pair(row)
    prompt = chatml.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    assert pair.prompt == prompt
    assert coloured(chatml, pair.chosen) == "{the dog<|im_end|>}\n"
    assert coloured(chatml, pair.rejected) == "{the fox<|im_end|>}\n"
    whole = encoder.encode_conversation([*row["prompt"], *row["chosen"]])
    assert [*pair.prompt, *pair.chosen.tokens] == whole.tokens  # as at SFT
    assert encoder.encode(row) == pair


def test_pair_with_markers_leaves_earlier_answers_out(make_tokenizer):
    tokenizer = make_tokenizer(MARKED, CHATML_TOKENS)
    row = {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "the dog", "rejected": "b"}
    pair = Encoder(tokenizer).encode_pair(row)
    assert tokenizer.decode(pair.prompt).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert coloured(tokenizer, pair.chosen) == "{the dog<|im_end|>}\n"


def test_pair_of_texts_needs_no_template(make_tokenizer):
    tokenizer = make_tokenizer(None)
    pair = Encoder(tokenizer).encode_pair({"prompt": "the", "chosen": " dog", "rejected": " fox"})
    assert tokenizer.decode(pair.prompt) == "the"
    assert coloured(tokenizer, pair.chosen) == "{ dog</s>}" and coloured(tokenizer, pair.rejected) == "{ fox</s>}"


def test_pair_whose_border_token_differs_shares_only_what_is_before_it(chatml):
    pair = Encoder(chatml).encode_pair({"prompt": "the ", "chosen": "dog", "rejected": "fox"})
    assert chatml.decode(pair.prompt) == "the"
    assert coloured(chatml, pair.chosen) == "{ dog</s>}" and pair.chosen.borders == 1
    assert coloured(chatml, pair.rejected) == "{ fox</s>}"


def test_equal_answers_are_an_error(chatml):
    with pytest.raises(UserError, match=r"^f, row 3: chosen and rejected are the same"):
        Encoder(chatml).encode_pairs([(3, {"prompt": [user("a")], "chosen": "b", "rejected": "b"})], "f, row {}".format)


def test_no_template(make_tokenizer):
    with pytest.raises(UserError, match=r"no chat template; give model\.chat_template=chatml"):
        Encoder(make_tokenizer(None)).encode_conversation([user("a"), assistant("b")])


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,  # nothing ends a turn
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}",  # the next header does
        # only the conversation ends
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endfor %}{{ eos_token }}",
    ],
)
def test_template_that_does_not_end_each_turn_is_refused(make_tokenizer, template):
    with pytest.raises(UserError, match="never ends an assistant turn, so the model would not learn to stop"):
        Encoder(make_tokenizer(template, CHATML_TOKENS)).encode_conversation(
            [user("a"), assistant("b"), user("c"), assistant("d")]
        )


def test_templates_own_refusal_is_passed_on(make_tokenizer):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer = make_tokenizer(template + chat_template("chatml"), CHATML_TOKENS)
    with pytest.raises(UserError, match="refuses this conversation: no system role"):
        Encoder(tokenizer).encode_conversation([{"role": "system", "content": "s"}, user("a"), assistant("b")])


@pytest.mark.parametrize("change", [" | upper", ".replace('dog', 'cat')", " | truncate(3)"])
def test_template_that_rewrites_contents_is_refused(make_tokenizer, change):
    template = chat_template("chatml").replace("message['content']", f"(message['content']{change})")
    with pytest.raises(UserError, match="rewrites a message"):
        Encoder(make_tokenizer(template, CHATML_TOKENS)).encode_conversation([user("the fox"), assistant("the dog barks")])


def test_template_that_leaves_the_assistant_out_is_refused(make_tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="does not render assistant message 2"):
        Encoder(make_tokenizer(template)).encode_conversation([user("a"), assistant("b")])


def test_same_shape_renders_once_more_only(chatml, monkeypatch):
    """The cached layout is what keeps the cost of a row at one rendering."""
    encoder = Encoder(chatml)
    encoder.encode_conversation([user("a"), assistant("b")])
    calls = []
    real = rendering.Renderer.render
    monkeypatch.setattr(rendering.Renderer, "render", lambda self, *a, **k: calls.append(a) or real(self, *a, **k))
    encoder.encode_conversation([user("the fox"), assistant("the quick dog")])
    assert len(calls) == 1


def test_date_in_the_template_may_change_between_rows(make_tokenizer, monkeypatch):
    from transformers.utils import chat_template_utils

    class Clock(datetime):
        of_month = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, cls.of_month)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    tokenizer = make_tokenizer("{{ strftime_now('%d') }}" + chat_template("chatml"), CHATML_TOKENS)
    encoder = Encoder(tokenizer)
    first = encoder.encode_conversation([user("a"), assistant("b")])
    Clock.of_month = 2
    second = encoder.encode_conversation([user("a"), assistant("b")])
    assert coloured(tokenizer, first).replace("01", "02") == coloured(tokenizer, second)


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
WITH_CALLS = chat_template("chatml").replace(
    "message['content']", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '')"
)


def test_tool_calls_are_trained_whole(make_tokenizer):
    tokenizer = make_tokenizer(WITH_CALLS, CHATML_TOKENS)
    result = Encoder(tokenizer).encode_conversation([user("a"), CALL, {"role": "tool", "content": "3"}, assistant("b")])
    call = json.dumps(CALL["tool_calls"])
    assert coloured(tokenizer, result).split("\n<|im_start|>")[1:] == [
        f"assistant\n{{{call}<|im_end|>}}",
        "tool\n3<|im_end|>",
        "assistant\n{b<|im_end|>}\n",
    ]


def test_tool_calls_that_the_template_ignores_are_refused(chatml):
    with pytest.raises(UserError, match="does not render the tool calls of assistant message 2"):
        Encoder(chatml).encode_conversation([user("a"), CALL])


def test_chat_template_by_name_by_file_and_neither(tmp_path):
    assert "<|im_start|>" in chat_template("chatml") and "generation %}" not in chat_template("chatml")
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert chat_template(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(UserError, match=r"model\.chat_template: 'chatmll' is neither.*did you mean 'chatml'"):
        chat_template("chatmll")


def test_template_hash_is_that_of_its_text(make_tokenizer):
    assert template_hash(make_tokenizer("abc")) == hashlib.sha256(b"abc").hexdigest()
    assert template_hash(make_tokenizer(None)) is None
