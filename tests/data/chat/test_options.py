"""Every part of a row is rendered, or said to be left out: reasoning, system prompts, tools; and the ways out that data has."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import ChatOptions, options_of
from posttrain.data.chat.template_text import chat_template
from posttrain.data.prepare import prepare
from posttrain.errors import UserError
from posttrain.stages.spec import row_uses
from stock_templates import FOLDER, IS_THERE, SPECIAL, trained_texts

PLAIN = (  # knows contents alone, and no system
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THOUGHTFUL = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "7", "reasoning_content": "four and three"},
]


@pytest.fixture
def plain(make_tokenizer):
    return make_tokenizer(PLAIN, ("<|im_start|>", "<|im_end|>"))


def qwen3(make_tokenizer):
    if not IS_THERE:
        pytest.skip("trl, which ships the stock templates, is not installed")
    template = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    return make_tokenizer(template, sorted(set(SPECIAL.findall(template))))


def test_what_a_template_leaves_out_is_named(plain):
    encoder = Encoder(plain)
    system = {"role": "system", "content": "Be kind."}
    assert [p.name for p in encoder.encode_conversation([system, *THOUGHTFUL[:2]], [{"name": "f"}]).lost] == [
        "tools",
        "content of system messages",
        "reasoning_content",
    ]
    assert encoder.encode_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).lost == ()


@pytest.mark.parametrize(("mode", "own", "other"), [("own", True, False), ("stop", True, True), ("warn", False, False)])
def test_on_loss(plain, mode, own, other):
    encoder = Encoder(plain, options=ChatOptions(on_loss=mode))
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for messages, stops in ((THOUGHTFUL, own), (system, other)):
        if stops:
            with pytest.raises(UserError, match=r"not rendered by the chat template; .*data\.on_loss=warn trains without"):
                encoder.encode_conversation(messages)
        else:
            assert len(encoder.encode_conversation(messages).lost) == 1


def test_reasoning_that_is_left_out_is_refused_with_the_ways_out(plain):
    row = (3, {"messages": THOUGHTFUL})
    with pytest.raises(UserError) as error:
        Encoder(plain, options=ChatOptions(on_loss="own")).encode_many([row], "a.jsonl, row {}".format)
    assert str(error.value) == (
        "a.jsonl, row 3: reasoning_content is not rendered by the chat template; data.reasoning=inline writes reasoning into the "
        "content, drop leaves it out, data.turns=each learns every turn as the last of its conversation; "
        "data.on_loss=warn trains without"
    )


def test_reasoning_inline_and_dropped(plain):
    inline = Encoder(plain, options=ChatOptions(reasoning="inline", on_loss="stop")).encode_conversation(THOUGHTFUL[:2])
    assert trained_texts(plain, inline) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]
    drop = Encoder(plain, options=ChatOptions(reasoning="drop", on_loss="stop"))
    assert trained_texts(plain, drop.encode_conversation(THOUGHTFUL)) == ["4<|im_end|>", "7<|im_end|>"]
    within = [THOUGHTFUL[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}]
    assert trained_texts(plain, drop.encode_conversation(within)) == ["4<|im_end|>"]


def test_each_turn_is_learnt_as_it_was_generated(make_tokenizer, tmp_path):
    tokenizer = qwen3(make_tokenizer)
    row = {"messages": THOUGHTFUL}
    first, last = ("<think>\ntwo and two\n</think>\n\n4<|im_end|>", "<think>\nfour and three\n</think>\n\n7<|im_end|>")
    whole = Encoder(tokenizer).encode_conversation(THOUGHTFUL)
    assert trained_texts(tokenizer, whole) == ["4<|im_end|>", last]
    assert [part.name for part in whole.lost] == ["reasoning_content"]
    each = Encoder(tokenizer, options=ChatOptions(turns="each", on_loss="stop"))
    rows = each.options.examples_of(row)
    assert [trained_texts(tokenizer, each.encode(one)) for one in rows] == [[first], [last]]
    assert [row["first"] for row in rows] == [1, 3]
    only = Encoder(tokenizer, options=ChatOptions(train_on="last"))
    assert [trained_texts(tokenizer, only.encode(one)) for one in only.options.examples_of(row)] == [[last]]


def test_turns_of_weight_0_are_context(make_tokenizer):
    tokenizer = qwen3(make_tokenizer)
    marked = [THOUGHTFUL[0], THOUGHTFUL[1] | {"weight": 0}, *THOUGHTFUL[2:]]
    build = Encoder(tokenizer, options=ChatOptions(turns="each", on_loss="stop"))
    assert [row["first"] for row in build.options.examples_of({"messages": marked})] == [3]
    assert build.encode_conversation(marked).lost == ()  # the first thought is left out, as it is when the model writes


def test_variables_by_config_and_by_row(make_tokenizer):
    tokenizer = make_tokenizer(
        chat_template("chatml").replace("{%- for", "{{- '<' ~ (mood or 'none') ~ '>' -}}{%- for", 1),
        ("<|im_start|>", "<|im_end|>"),
    )
    row = {"messages": [*THOUGHTFUL[:1], {"role": "assistant", "content": "4"}]}
    build = Encoder(tokenizer, options=ChatOptions(variables={"mood": "calm"}))
    calm, bold = build.encode_many([(1, row), (2, row | {"chat_template_kwargs": {"mood": "bold"}})], str)
    assert tokenizer.decode(calm.tokens).startswith("<calm><|im_start|>")
    assert tokenizer.decode(bold.tokens).startswith("<bold><|im_start|>")
    other = row | {"chat_template_kwargs": {"mood": "bold"}}
    assert tokenizer.decode(build.encode_prompt(other)).startswith("<bold><|im_start|>")
    with pytest.raises(UserError, match="chat_template_kwargs is str, not an object"):
        build.encode(row | {"chat_template_kwargs": "mood"})


def test_chatml_writes_reasoning(make_tokenizer):
    tokenizer = make_tokenizer(chat_template("chatml"), ("<|im_start|>", "<|im_end|>"))
    for name in ("reasoning_content", "thinking", "reasoning"):
        answer = {"role": "assistant", "content": "4", name: " two and two\n"}
        encoded = Encoder(tokenizer, options=ChatOptions(on_loss="stop")).encode_conversation([THOUGHTFUL[0], answer])
        assert trained_texts(tokenizer, encoded) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]


def test_the_data_says_how_its_rows_are_read(plain, tmp_path):
    """Whatever the encoder was made for: an evaluation reads a run's held-out rows as the run did."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": THOUGHTFUL}) + "\n")
    words = [f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0", "data.reasoning=drop", "data.on_loss=stop"]
    data, use = validate(compose_run("sft", words)).data, row_uses()["sft"]
    one, other = (
        prepare(data, use, Encoder(plain, options=o), 1000, tmp_path / "cache")[0] for o in (None, ChatOptions(train_on="last"))
    )
    assert one.key == other.key and one.stats.lost == {} == other.stats.lost


def prepared(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], *words: str):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.path={folder / 'rows.jsonl'}", "data.eval_share=0", "data.max_untrained_share=1", *words]
    data = validate(compose_run("sft", given)).data
    return prepare(data, row_uses()["sft"], Encoder(tokenizer, options=options_of(data)), 1000, folder / "cache")[0]


def test_what_is_lost_is_counted_and_refused_by_default(plain, tmp_path):
    rows = [{"messages": THOUGHTFUL}, {"messages": [{"role": "system", "content": "Be kind."}, *THOUGHTFUL]}]
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1: reasoning_content is not rendered"):
        prepared(tmp_path, plain, rows)
    found = prepared(tmp_path, plain, rows, "data.on_loss=warn")
    assert found.stats.lost == {"reasoning_content": 2, "content of system messages": 1}
    assert [place.rsplit(", ")[-1] for place in found.stats.places["content of system messages"]] == ["row 2"]


def test_every_option_is_in_the_caches_key_and_each_turn_is_an_example(make_tokenizer, tmp_path):
    tokenizer = qwen3(make_tokenizer)
    rows = [{"messages": THOUGHTFUL}]
    keys = {
        prepared(tmp_path, tokenizer, rows, "data.on_loss=warn", *w).key
        for w in ([], ["data.turns=last"], ["data.reasoning=drop"])
    }
    assert len(keys) == 3
    found = prepared(tmp_path, tokenizer, rows, "data.turns=last")
    assert found.train.rows.tolist() == [1] and found.stats.lost == {}
    found = prepared(tmp_path, tokenizer, rows, "data.turns=each")
    assert found.train.rows.tolist() == [1, 1] and found.stats.rows == 1
    asked = len(Encoder(tokenizer).encode_prompt({"messages": THOUGHTFUL[:2]}))
    assert found.train.units.tolist() == [0, 2] and found.train.shared.tolist() == [asked, 0], "as it lies in the cache"


def test_prompts_and_names_of_ones_own_are_looked_at_too(plain):
    encoder = Encoder(plain)
    system = {"role": "system", "content": "Be kind."}
    (found,) = encoder.encode_prompts([(1, {"messages": [system, *THOUGHTFUL[:1]]})], str)
    assert [part.name for part in found.lost] == ["content of system messages"]
    noted = [THOUGHTFUL[0] | {"mood": "bad"}, {"role": "assistant", "content": "4", "note": "4"}]
    assert [part.name for part in encoder.encode_conversation(noted).lost] == ["mood of user messages"]
