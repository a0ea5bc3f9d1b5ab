"""Tool calls in every form that people have, as stock templates render them, and what is said where they do not."""

import json
import random

import pytest
from tokenizers import processors

from posttrain.data.chat.encoded import Encoded
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import ChatOptions
from posttrain.data.chat.template_text import chat_template
from posttrain.data.formats import to_canonical
from posttrain.errors import UserError
from stock_templates import FOLDER, IS_THERE, SPECIAL, STOCK, trained_texts

if not IS_THERE:
    pytest.skip("trl, which ships the stock templates, is not installed", allow_module_level=True)

ARGUMENTS = {"item": 'green "tea"', "n": 3, "when": {"day": "Monday", "hours": [8, 9]}}
FUNCTION = {"name": "price", "description": "Of an item.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
WIRE = {"id": "call00001", "type": "function", "function": {"name": "price", "arguments": json.dumps(ARGUMENTS)}}
OBJECT = {"id": "call00001", "type": "function", "function": {"name": "price", "arguments": ARGUMENTS}}
# how people write one and the same call
FORMS = {
    "object": {"content": "", "tool_calls": [OBJECT]},
    "wire": {"content": None, "tool_calls": [WIRE]},
    "flat": {"content": "", "tool_calls": [{"id": "call00001", "name": "price", "arguments": ARGUMENTS}]},
    "function_call": {"content": "", "function_call": {"name": "price", "arguments": json.dumps(ARGUMENTS)}},
}
CALL = json.dumps({"name": "price", "arguments": ARGUMENTS})
# What the answer's own span is to be, by hand, from each model's card.
SPANS = {
    "qwen2_5": f"<tool_call>\n{CALL}\n</tool_call><|im_end|>",
    "qwen3": f"<tool_call>\n{CALL}\n</tool_call><|im_end|>",
    "deepseekv3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>price\n```json\n"
    + json.dumps(ARGUMENTS)
    + "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>",
    "llama3_1": f'{{"name": "price", "parameters": {json.dumps(ARGUMENTS)}}}<|eot_id|>',
    "gptoss": f" to=functions.price<|channel|>commentary json<|message|>{json.dumps(ARGUMENTS)}<|call|>",
    "qwen3_5_think": '\n</think>\n\n<tool_call>\n<function=price>\n<parameter=item>\ngreen "tea"\n</parameter>'
    "\n<parameter=n>\n3\n"
    f"</parameter>\n<parameter=when>\n{json.dumps(ARGUMENTS['when'])}\n</parameter>\n</function>\n</tool_call><|im_end|>",
    "glm4moe": '\n<think></think>\n<tool_call>price\n<arg_key>item</arg_key>\n<arg_value>green "tea"</arg_value>\n'
    "<arg_key>n</arg_key>\n"
    "<arg_value>3</arg_value>\n<arg_key>when</arg_key>\n"
    f"<arg_value>{json.dumps(ARGUMENTS['when'])}</arg_value>\n</tool_call><|observation|>",
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def calling(form: str) -> dict:
    return {"role": "assistant", **FORMS[form]}


def chat(form: str) -> list[dict]:
    result = {"role": "tool", "name": "price", "tool_call_id": "call00001", "content": '{"price": 4.5}'}
    return [user("How much?"), calling(form), result, {"role": "assistant", "content": "It is 4.50."}]


def stock(make_tokenizer, name: str):
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return make_tokenizer(template, sorted({*SPECIAL.findall(template), "<|call|>", "<|observation|>"}))


def encoder(tokenizer, name: str, **options) -> Encoder:
    stops = {"glm4moe": ("<|user|>", "<|observation|>"), "gptoss": ("<|return|>", "<|call|>")}.get(name, ())
    return Encoder(tokenizer, stops, options=ChatOptions(**options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPANS)
def test_a_call_is_rendered_as_its_template_wants_it(make_tokenizer, name, form):
    tokenizer = stock(make_tokenizer, name)
    encoded = encoder(tokenizer, name).encode_conversation(chat(form), TOOLS)
    assert trained_texts(tokenizer, encoded)[0] == SPANS[name]
    assert len(trained_texts(tokenizer, encoded)) == 2
    assert [part.name for part in encoded.lost] == (["tools"] if name == "deepseekv3" else [])


# What TRL takes for the model's part though the generation prompt, or the header, writes it.
TWIN_LEADS = ("", "\n", "<|start|>assistant", "<think>\n", "<think></think>", "<think>\n\n</think>\n\n")
OTHER = {
    "deepseekv3",  # the twin turns arguments in JSON into JSON once more
    "diffusion_gemma",  # the end of a call, <|tool_response>, is not trained; a header that its generation prompt lacks is
}
TWINS = [
    name
    for name in STOCK
    if name not in OTHER
    and (FOLDER / f"{name}_training.jinja").exists()
    and "tool_calls" in (FOLDER / f"{name}.jinja").read_text()
]


@pytest.mark.parametrize("name", [name for name in TWINS if not name.startswith("deepseek_r1")])
def test_calls_agree_with_the_marked_twin_up_to_its_start(make_tokenizer, name):
    tokenizer, twin = stock(make_tokenizer, name), stock(make_tokenizer, f"{name}_training")
    twin.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    messages = [user("Hi"), {"role": "assistant", "content": "Hello."}, *chat("object")]
    theirs = twin.apply_chat_template(messages, tools=TOOLS, return_assistant_tokens_mask=True)
    wanted = trained_texts(twin, Encoded(theirs["input_ids"], theirs["assistant_masks"], 0, 0))
    found = trained_texts(tokenizer, encoder(tokenizer, name).encode_conversation(messages, TOOLS))
    assert len(found) == len(wanted) == 3
    for ours, their in zip(found, wanted, strict=True):
        assert their.rstrip() in {lead + ours for lead in TWIN_LEADS}


def any_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(7 if depth < 2 else 5)
    text = "".join(rng.choice(["a", "it's", '"q"', "\n", "\\", "é", "日本", "{x}", "</tool_call>", "  ", "1"]) for _ in range(3))
    if kind > 4:
        inner = [any_value(rng, depth + 1) for _ in range(2)]
        return inner if kind == 5 else {"k": inner[0], "l'": inner[1]}
    return [text, rng.randrange(10**6), rng.random(), rng.random() < 0.5, None][kind]


@pytest.mark.parametrize("name", ["qwen2_5", "deepseekv3", "llama3_1", "gptoss"])
def test_any_arguments_are_trained_letter_by_letter(make_tokenizer, name):
    rng = random.Random(name)
    tokenizer = stock(make_tokenizer, name)
    build = encoder(tokenizer, name)
    for _ in range(30):
        arguments = {f"n{k}": any_value(rng) for k in range(rng.randrange(4))}
        sent = arguments if rng.random() < 0.5 else json.dumps(arguments)
        call = {"type": "function", "function": {"name": "price", "arguments": sent}}
        encoded = build.encode_conversation([user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}], TOOLS)
        wanted = SPANS[name].replace(json.dumps(ARGUMENTS), json.dumps(arguments, ensure_ascii=False))
        assert trained_texts(tokenizer, encoded) == [wanted]
        assert [part.name for part in encoded.lost if part.own] == []


def test_tools_may_be_flat_and_calls_empty_or_several(make_tokenizer):
    tokenizer = stock(make_tokenizer, "qwen2_5")
    build = encoder(tokenizer, "qwen2_5")
    assert build.encode_conversation(chat("wire"), [FUNCTION]) == build.encode_conversation(chat("wire"), TOOLS)
    none = [user("Hi"), {"role": "assistant", "content": "Hello", "tool_calls": []}]
    assert trained_texts(tokenizer, build.encode_conversation(none)) == ["Hello<|im_end|>"]
    assert trained_texts(tokenizer, build.encode_conversation([none[0], none[1] | {"tool_calls": None}])) == ["Hello<|im_end|>"]
    two = calling("wire") | {"tool_calls": [WIRE, {"type": "function", "function": {"name": "now", "arguments": "{}"}}]}
    ran = trained_texts(tokenizer, build.encode_conversation([user("Hi"), two], TOOLS))
    assert ran == [
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call><|im_end|>'
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{'item': 1}", r"the arguments of the call of price are not valid JSON \(.*\): \"{'item': 1}\""),
        ("[1]", "the arguments of the call of price are list, not an object"),
        (3, "the arguments of the call of price are int, not an object"),
    ],
)
def test_arguments_that_are_no_object_are_refused(make_tokenizer, arguments, message):
    call = {"type": "function", "function": {"name": "price", "arguments": arguments}}
    with pytest.raises(UserError, match=message):
        encoder(stock(make_tokenizer, "qwen3"), "qwen3").encode_conversation(
            [user("a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        )


@pytest.mark.parametrize("name", ["phi3_training", "llama3_training"])
def test_markers_do_not_hide_a_call_that_is_left_out(make_tokenizer, name):
    call = {
        "role": "assistant",
        "content": "So.",
        "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}],
    }
    with pytest.raises(UserError, match=r"^tool calls are not rendered by the chat template; data\.tools=inline"):
        encoder(stock(make_tokenizer, name), name, on_loss="own").encode_conversation([user("a"), call])


def test_rows_with_function_call_and_its_result_are_read(make_tokenizer):
    """As OpenAI had calls before `tool_calls`."""
    call = {"role": "assistant", "content": None, "function_call": {"name": "price", "arguments": json.dumps(ARGUMENTS)}}
    result = {"role": "function", "name": "price", "content": "4.5"}
    row = {"messages": [user("How much?"), call, result, {"role": "assistant", "content": "4.50"}], "tools": json.dumps(TOOLS)}
    tokenizer = stock(make_tokenizer, "qwen3")
    (encoded,) = encoder(tokenizer, "qwen3").encode_many([(1, to_canonical(row, "messages", "row 1"))], str)
    assert trained_texts(tokenizer, encoded)[0] == SPANS["qwen3"] and encoded.lost == ()


def test_a_call_without_its_arguments_is_refused(make_tokenizer):
    template = chat_template("chatml").replace(
        "message['content']", "message['content'] + (message.tool_calls[0].function.name if message.tool_calls else '')"
    )
    tokenizer = make_tokenizer(template, ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(UserError, match=r"does not render all arguments of assistant message 2's calls; data\.tools=inline"):
        Encoder(tokenizer).encode_conversation([user("a"), calling("wire")])


@pytest.mark.parametrize("name", ["gemma", "gemma3", "llama3", "phi3", "cohere", "llava_next"])
def test_templates_without_tools_take_them_as_text(make_tokenizer, name):
    tokenizer = stock(make_tokenizer, name)
    with pytest.raises(UserError, match=r"data\.tools=inline writes tools, calls and results into the contents"):
        encoder(tokenizer, name).encode_conversation(chat("wire"), TOOLS)
    encoded = encoder(tokenizer, name, tools="inline", on_loss="stop").encode_conversation(chat("wire"), TOOLS)
    assert trained_texts(tokenizer, encoded)[0].lstrip().startswith(f"<tool_call>\n{CALL}\n</tool_call><")
    text = tokenizer.decode(encoded.tokens)
    assert json.dumps(TOOLS[0]) in text and '<tool_response>\n{"price": 4.5}\n</tool_response>' in text


def test_pairs_have_tools_and_calls(make_tokenizer):
    tokenizer = stock(make_tokenizer, "qwen3")
    row = {"prompt": [user("How much?")], "chosen": [calling("wire")], "rejected": "No idea.", "tools": TOOLS}
    pair = encoder(tokenizer, "qwen3").encode_pair(row)
    assert json.dumps(TOOLS[0]) in tokenizer.decode(pair.prompt)
    assert trained_texts(tokenizer, pair.chosen) == ["<think>\n\n</think>\n\n" + SPANS["qwen3"]]
