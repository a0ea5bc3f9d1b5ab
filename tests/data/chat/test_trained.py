"""Whose words are learnt (data.train_on), and which of their letters (train, train_detail, a prefill): by hand on ChatML."""

import json
import random
from itertools import pairwise

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import ChatOptions, options_of
from posttrain.data.chat.template_text import chat_template
from posttrain.data.formats import to_canonical
from posttrain.errors import UserError
from stock_templates import trained_texts

TOKENS = ("<|im_start|>", "<|im_end|>")
SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "The dog."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "fox"},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(params=["chatml", "marked"])
def tokenizer(make_tokenizer, request):
    return make_tokenizer(MARKED if request.param == "marked" else chat_template("chatml"), TOKENS)


@pytest.fixture
def chatml(make_tokenizer):
    return make_tokenizer(chat_template("chatml"), TOKENS)


def learnt(tokenizer, row, **options) -> list[str]:
    encoder = Encoder(tokenizer, options=ChatOptions(**options))
    return [run for each in encoder.options.examples_of(row) for run in trained_texts(tokenizer, encoder.encode(each))]


def canonical(row, shape="messages"):
    return to_canonical(row, shape, "row 1")


END = "<|im_end|>"
OWN = ["The dog.<|im_end|>", "fox<|im_end|>"]
USERS = ["Hi<|im_end|>", "And?<|im_end|>"]


@pytest.mark.parametrize(
    ("train_on", "wanted"),
    [
        ("assistant", OWN),
        ("last", OWN[1:]),
        ("all", ["Be kind.<|im_end|>", "Hi<|im_end|>", "The dog.<|im_end|>", "And?<|im_end|>", "fox<|im_end|>"]),
        (("user",), USERS),
        (("system", "assistant"), ["Be kind.<|im_end|>", *OWN]),
        (("tool",), []),
    ],
)
def test_the_words_and_ends_of_the_roles_named(tokenizer, train_on, wanted):
    """No header of any role, and nothing of any other."""
    assert learnt(tokenizer, {"messages": CHAT}, train_on=train_on) == wanted


def test_each_turn_of_several_roles_is_learnt_once(tokenizer):
    found = ChatOptions(turns="each", train_on="all").examples_of({"messages": [*CHAT, {"role": "user", "content": "Bye"}]})
    assert [(each["first"], len(each["messages"])) for each in found] == [(0, 3), (3, 5), (5, 6)]
    row = {"messages": CHAT}
    assert learnt(tokenizer, row, turns="each", train_on="all") == learnt(tokenizer, row, train_on="all")


def test_a_prompt_that_is_text_is_the_users(chatml):
    row = {"prompt": "What is it?", "completion": " The dog."}
    assert learnt(chatml, row) == [" The dog.</s>"]
    assert learnt(chatml, row, train_on="all") == ["What is it? The dog.</s>"]
    assert learnt(chatml, row, train_on=("user",)) == ["What is it?"]
    assert learnt(chatml, row, train_on="all", template=True) == ["What is it?<|im_end|>", " The dog.<|im_end|>"]


def test_results_of_tools_stay_the_tools_where_they_are_written_into_the_users_message(chatml):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    row = {"messages": [CHAT[1], call, {"role": "tool", "content": "noon"}, CHAT[4]]}
    assert learnt(chatml, row, tools="inline", train_on=("user",)) == ["Hi<|im_end|>"]
    assert learnt(chatml, row, tools="inline", train_on=("tool",)) == ["<tool_response>\nnoon\n</tool_response><|im_end|>"]


def test_what_is_learnt_may_not_be_lost(make_tokenizer):
    tokenizer = make_tokenizer(MARKED.replace("in messages", "in messages if m.role != 'system'"), TOKENS)
    with pytest.raises(UserError, match="content of system messages are not rendered"):
        learnt(tokenizer, {"messages": CHAT}, train_on="all", on_loss="own")
    assert learnt(tokenizer, {"messages": CHAT}, train_on=("user", "assistant"), on_loss="own") == [
        text for pair in zip(USERS, OWN, strict=True) for text in pair
    ]


def test_a_call_without_arguments_is_an_answer(make_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, TOKENS)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    encoded = Encoder(tokenizer).encode_conversation([CHAT[1], call])
    assert trained_texts(tokenizer, encoded) == ["<call>now<|im_end|>"] and encoded.first_word >= 0


def test_marks_of_messages_come_before_the_roles(tokenizer):
    """As in axolotl, whose `train` holds for a message of any role; OpenAI's `weight` is the assistant's alone."""
    chat = [SYSTEM, CHAT[1] | {"train": True}, CHAT[2] | {"train": False}, CHAT[3] | {"weight": 1}, CHAT[4]]
    assert learnt(tokenizer, canonical({"messages": chat})) == ["Hi<|im_end|>", "fox<|im_end|>"]


def detail(*spans: tuple[int, int, bool]) -> list[dict]:
    return [{"begin_offset": a, "end_offset": b, "train": train} for a, b, train in spans]


AXOLOTL = "I'm doing very well, thank you!"  # of its documentation: both offsets are of letters within


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([(0, 8, False), (9, 18, True), (19, 30, False)], [" very well"]),
        ([(9, 18, True)], [" very well"]),
        ([(0, 2, True), (21, 30, True)], ["I'm", "thank you!<|im_end|>"]),
        ([(0, 30, True)], ["I'm doing very well, thank you!<|im_end|>"]),
        ([(0, 30, False)], []),
    ],
)
def test_letters_that_axolotl_marks_and_no_others(tokenizer, spans, wanted):
    marked = {"role": "assistant", "content": AXOLOTL, "train_detail": detail(*spans)}
    assert learnt(tokenizer, canonical({"messages": [CHAT[1], marked]})) == [*wanted]
    other = {"role": "user", "content": AXOLOTL, "train_detail": detail(*spans)}
    assert learnt(tokenizer, canonical({"messages": [other, CHAT[4]]})) == [*wanted, "fox<|im_end|>"]


def test_a_token_with_any_letter_that_is_marked_is_trained(chatml):
    tokens = chatml.tokenize("the")
    assert len(tokens) == 1
    marked = {"role": "assistant", "content": "the fox", "train_detail": detail((1, 1, True))}
    assert learnt(chatml, canonical({"messages": [CHAT[1], marked]})) == ["the"]


@pytest.mark.parametrize("template", [MARKED, chat_template("chatml")])
def test_marks_of_all_letters_are_none(make_tokenizer, template):
    """However the letters are cut into marks, with white space and thoughts among them: every letter has its place."""
    tokenizer, rng = make_tokenizer(template, TOKENS), random.Random(3)
    build = Encoder(tokenizer)
    for _ in range(40):
        content = "".join(rng.choice(["dog", " ", "\n", "</think>", "<think>", "é", "日", "."]) for _ in range(8)).strip() + "x\n"
        cuts = [0, *sorted(rng.sample(range(1, len(content)), 2)), len(content)]
        plain = [CHAT[1], {"role": "assistant", "content": content}]
        parts = [[[a, b]] for a, b in pairwise(cuts)]
        whole = build.encode_conversation(plain)
        each = [build.encode_conversation([CHAT[1], plain[1] | {"trained": part}]) for part in [*parts, [p[0] for p in parts]]]
        assert each[-1].tokens == whole.tokens and each[-1].weights == whole.weights, content
        assert [max(ws) for ws in zip(*(e.weights for e in each[:-1]), strict=True)] == whole.weights, content


def test_marks_move_with_the_content(chatml):
    answer = {"role": "assistant", "content": "the fox", "reasoning_content": "hm", "train_detail": detail((4, 6, True))}
    row = canonical({"messages": [CHAT[1], answer]})
    assert learnt(chatml, row, reasoning="inline") == [" fox<|im_end|>"] or learnt(chatml, row, reasoning="inline") == [
        "fox<|im_end|>"
    ]
    within = {"role": "assistant", "content": "<think>hm</think>the fox", "train_detail": detail((21, 23, True))}
    with pytest.raises(UserError, match=r"is marked in parts .* data.reasoning=drop takes one away"):
        learnt(chatml, canonical({"messages": [CHAT[1], within]}), reasoning="drop")


BEGUN = {"role": "assistant", "content": "The dog"}


@pytest.mark.parametrize("answer", [" and the fox.", "The dog and the fox."])
def test_an_answer_that_goes_on_behind_a_prefill_is_one_turn(tokenizer, answer):
    rows = [
        {"prompt": [CHAT[1], BEGUN], "completion": [{"role": "assistant", "content": answer}]},
        {"prompt": [CHAT[1], BEGUN], "completion": answer},
        {"prompt": [CHAT[1], BEGUN], "completion": [CHAT[1], {"role": "assistant", "content": "The dog and the fox."}]},
    ]
    whole = Encoder(tokenizer).encode_conversation([CHAT[1], {"role": "assistant", "content": "The dog and the fox."}])
    for row in rows:
        found = canonical(row, "prompt_completion")
        assert found["messages"][1:] == [{"role": "assistant", "content": "The dog and the fox.", "prefill": 7}]
        encoded = Encoder(tokenizer).encode_many([(1, found)], str)[0]
        assert encoded.tokens == whole.tokens and trained_texts(tokenizer, encoded) == [" and the fox.<|im_end|>"]


def test_a_pair_behind_a_prefill_begins_where_its_answers_do(tokenizer):
    row = {"prompt": [CHAT[1], BEGUN], "chosen": [{"role": "assistant", "content": " and"}], "rejected": " fox"}
    pair = Encoder(tokenizer).encode_pair(canonical(row, "pairs"))
    assert tokenizer.decode(pair.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nThe dog"
    assert [trained_texts(tokenizer, each) for each in (pair.chosen, pair.rejected)] == [[" and<|im_end|>"], [" fox<|im_end|>"]]
    transcripts = {
        "chosen": [CHAT[1], BEGUN | {"content": "The dog and"}],
        "rejected": [CHAT[1], BEGUN | {"content": "The dog fox"}],
    }
    assert Encoder(tokenizer).encode_pair(canonical(row | transcripts, "pairs")) == pair


@pytest.mark.parametrize(
    ("row", "shape", "message"),
    [
        (
            {"prompt": [CHAT[1], BEGUN], "chosen": "The dog and", "rejected": " fox"},
            "pairs",
            "chosen begins with 'The dog', as the prompt ends, and rejected does not; write both alike",
        ),
        (
            {"prompt": [CHAT[1], BEGUN], "completion": [BEGUN | {"reasoning_content": "hm"}]},
            "prompt_completion",
            "completion goes on behind 'The dog' and cannot begin with reasoning_content",
        ),
        (
            {"prompt": [CHAT[1], BEGUN | {"tool_calls": [{"function": {"name": "f"}}]}], "completion": "x"},
            "prompt_completion",
            "completion goes on behind an assistant's message that calls tools",
        ),
        (
            {"messages": [CHAT[1], BEGUN | {"train_detail": detail((0, 7, True))}]},
            "messages",
            r"train_detail of messages\[1\]: letters 0 to 7 \(included\) are not all among its 0 to 6",
        ),
        (
            {"messages": [CHAT[1], BEGUN | {"train_detail": detail((0, 3, True), (3, 5, False))}]},
            "messages",
            r"train_detail of messages\[1\] says both true and false of letter 3",
        ),
        (
            {"messages": [CHAT[1], BEGUN | {"train_detail": [{"begin_offset": 0, "train": True}]}]},
            "messages",
            r"train_detail of messages\[1\] has in place 0 no numbers begin_offset and end_offset",
        ),
        (
            {"messages": [CHAT[1], {"role": "assistant", "content": ["a", "b"], "train_detail": detail((0, 0, True))}]},
            "messages",
            r"train_detail of messages\[1\] marks letters of a content that is list",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(row, shape, message):
    with pytest.raises(UserError, match=f"^row 1: {message}"):
        canonical(row, shape)


def test_the_config_says_whose(tmp_path):
    config = compose_run("sft", [f"data.path={tmp_path}"])

    def data(**given):
        return validate({**config, "data": config["data"] | given}).data

    assert options_of(data()).train_on == "assistant" and options_of(data(train_on=["assistant"])).train_on == "assistant"
    assert options_of(data(train_on="user")).train_on == ("user",)
    assert options_of(data(train_on=["tool", "user"])).train_on == ("user", "tool")
    last = data(turns="last")
    assert (last.turns, last.train_on) == ("all", "last") == (data(train_on="last").turns, data(train_on="last").train_on)
    near = "there is no role 'asistant' - did you mean 'assistant'?"
    for given, message in (("asistant", near), (["user", "asistant"], near), ([], "names no role")):
        with pytest.raises(UserError) as error:
            data(train_on=given)
        assert message in str(error.value) and "data.train_on" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"last is data.train_on=last"):
        data(turns="last", train_on=["user"])


def test_ppo_and_its_like_write_no_answer_from_a_prefill():
    row = canonical({"prompt": [CHAT[1], BEGUN], "completion": " and"}, "prompt_completion")
    from posttrain.data.rows import prompt_of, reference_of

    assert reference_of(row) == " and" and json.dumps(row)
    pair = canonical({"prompt": [CHAT[1], BEGUN], "chosen": " and", "rejected": " fox"}, "pairs")
    for each in (row, pair):
        with pytest.raises(UserError, match="its prompt ends with 7 letters of the answer"):
            prompt_of(each)
