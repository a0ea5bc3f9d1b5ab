import json
import re
from typing import Any

import pytest

from posttrain.config.compose import compose_run
from posttrain.config.paths import root
from posttrain.config.schema import SourceConfig
from posttrain.data.formats import FORMATS, by_precedence, check_fits, recognise, to_canonical
from posttrain.errors import UserError
from posttrain.stages.spec import row_uses

PAGE = root("configs").parent / "docs" / "data.md"
Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}
PAIR = {"prompt": [Q], "chosen": [A], "rejected": [B]}
HUMAN, GPT, GPT2 = ({"from": f, "value": v} for f, v in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        ({"messages": [S, Q, A], "id": 3}, "messages", {"messages": [S, Q, A], "columns": {"id": 3}}),
        (
            {"prompt": "q", "prompt_id": "1", "messages": [Q, A]},
            "messages",
            {"messages": [Q, A], "columns": {"prompt": "q", "prompt_id": "1"}},
        ),
        ({"conversations": [Q, A]}, "messages", {"messages": [Q, A]}),
        ({"messages": None, "conversations": [HUMAN, GPT]}, "sharegpt", {"messages": [Q, A]}),
        (
            {"messages": [Q, CALL], "tools": '[{"name": "f"}]'},
            "messages",
            {"messages": [Q, CALL | {"content": ""}], "tools": [{"name": "f"}]},
        ),
        ({"messages": [Q | {"name": None}, A | {"weight": 0}]}, "messages", {"messages": [Q, A | {"weight": 0}]}),
        ({"system": "s", "conversations": [HUMAN, GPT]}, "sharegpt", {"messages": [S, Q, A]}),
        (
            {"conversations": [HUMAN, {"from": "chatgpt", "value": "a"}, {"from": "observation", "value": "o"}, GPT]},
            "sharegpt",
            {"messages": [Q, A, {"role": "tool", "content": "o"}, A]},
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", {"messages": [Q, A]}),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", {"messages": [Q, A]}),
        (
            {"instruction": "q", "input": "x", "output": "a", "system": "s", "history": [["q", "b"]], "text": "all"},
            "alpaca",
            {"messages": [S, Q, B, {"role": "user", "content": "q\nx"}, A], "columns": {"text": "all"}},
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", {"prompt": "q", "completion": "a"}),
        ({"prompt": [Q], "completion": [A]}, "prompt_completion", {"messages": [Q, A]}),
        ({"prompt": [S, Q], "completion": "a"}, "prompt_completion", {"messages": [S, Q, A]}),
        ({"prompt": "q", "response": "a"}, "prompt_completion", {"messages": [Q, A]}),
        ({"question": "q", "answer": "a"}, "prompt_completion", {"messages": [Q, A]}),
        ({"text": "t", "url": "u"}, "text", {"text": "t", "columns": {"url": "u"}}),
        ({"content": "t"}, "text", {"text": "t"}),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, "pairs", PAIR | {"prompt": [S, Q]}),
        (
            {"instruction": "q", "input": "x", "chosen": "a", "rejected": "b"},
            "pairs",
            PAIR | {"prompt": [{"role": "user", "content": "q\nx"}]},
        ),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT2}, "pairs", PAIR),
        ({"prompt": [Q], "chosen": [A], "rejected": [B]}, "pairs", PAIR),
        (
            {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]},
            "pairs",
            PAIR | {"columns": {"messages": [Q, A]}},
        ),
        ({"prompt": "q", "chosen": [A], "rejected": [B]}, "pairs", PAIR),
        ({"prompt": "q", "chosen": [S, Q, A], "rejected": [S, Q, B]}, "pairs", PAIR | {"prompt": [S, Q]}),
        (
            {"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]},
            "pairs",
            {"prompt": [Q, A, Q], "chosen": [A], "rejected": [B]},
        ),
        ({"chosen": [Q, A], "rejected": [Q, A, Q, B]}, "pairs", {"prompt": [Q], "chosen": [A], "rejected": [A, Q, B]}),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "pairs", PAIR),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, "pairs", PAIR),
    ],
)
def test_recognised_and_canonical(row: dict[str, Any], shape: str, expected: dict[str, Any]) -> None:
    assert recognise(row) == shape
    assert to_canonical(row, shape, "f, row 1") == expected


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t"},
        {"messages": [Q, A]},
        {"prompt": "q", "completion": "a"},
        PAIR,
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ],
)
def test_canonical_rows_stay_as_they_are(row: dict[str, Any]) -> None:
    assert to_canonical(row, recognise(row), "f, row 1") == row


def test_hh_transcript_with_several_turns() -> None:
    start = "\n\nHuman: Hi: there\n\nSecond paragraph\n\nAssistant: Hello\n\nHuman: q\n\nAssistant:"
    found = to_canonical({"chosen": start + " a", "rejected": start + " b"}, "pairs", "f, row 1")
    assert [m["content"] for m in found["prompt"]] == ["Hi: there\n\nSecond paragraph", "Hello", "q"]
    assert (found["chosen"], found["rejected"]) == ([A], [B])


@pytest.mark.parametrize(
    ("row", "shape", "says"),
    [
        ({"messages": [{"content": "q"}]}, "messages", "messages[0] has no role; its keys are content"),
        (
            {"messages": [Q, {"role": "asistant", "content": "a"}]},
            "messages",
            "messages[1] has the unknown role 'asistant' - did you mean 'assistant'",
        ),
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "messages", "content of messages[1] is null"),
        ({"messages": [Q, {"role": "assistant"}]}, "messages", "messages[1] has no content"),
        ({"messages": [Q, "a"]}, "messages", "messages[1] is str, not an object"),
        ({"messages": []}, "messages", "messages is an empty conversation"),
        ({"messages": None}, "messages", "messages is null, not a list"),
        ({"messages": "hi"}, "messages", "messages is str, not a list"),
        ({"messages": [Q, A], "tools": "{"}, "messages", "tools is not valid JSON"),
        ({"text": "t"}, "messages", "has no messages or conversations; its columns are text"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "add(1)"}]}, "sharegpt", "value is not valid JSON"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]}, "sharegpt", "without the name of a function"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "sharegpt", "unknown role 'alien'"),
        ({"conversations": [{"from": "gpt", "value": float("nan")}]}, "sharegpt", "value of conversations[0] is NaN"),
        ({"instruction": "q", "output": 3}, "alpaca", "output is int where text is needed"),
        ({"instruction": "q", "input": "", "ouput": "a"}, "alpaca", "has no output - did you mean 'ouput'"),
        (
            {"instruction": "q", "output": "a", "history": ["x"]},
            "alpaca",
            "history is not a list of [question, answer]",
        ),
        ({"prompt": "q"}, "prompt_completion", "has no completion"),
        ({"text": None}, "text", "text is null"),
        ({"prompt": "q", "rejected": "b"}, "pairs", "has no chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "pairs", "rejected is null"),
        ({"chosen": "a", "rejected": "b"}, "pairs", "no prompt"),
        ({"chosen": [Q, A], "rejected": [S, Q, B]}, "pairs", "no first message in common"),
        ({"prompt": "q", "chosen": [Q, A], "rejected": [Q]}, "pairs", "rejected ends with a message of the user"),
    ],
)
def test_malformed_rows_name_file_and_row(row: dict[str, Any], shape: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        to_canonical(row, shape, "data.jsonl, row 7")
    assert str(error.value).startswith("data.jsonl, row 7: ") and says in str(error.value)


TEXTS = {"prompt": "q", "completion": "a"}
MANY = {"role": "user", "content": [{"type": "text", "text": "q"}]}


@pytest.mark.parametrize(
    ("row", "shape", "expected"),
    [
        ({"messages": [MANY, A | {"tool_calls": []}]}, "messages", {"messages": [Q, A]}),
        ({"messages": [{"role": "user", "content": ["q"]}, A]}, "messages", {"messages": [Q, A]}),
        ({"messages": json.dumps([Q, A])}, "messages", {"messages": [Q, A]}),
        ({"conversations": json.dumps([HUMAN, GPT])}, "sharegpt", {"messages": [Q, A]}),
        ({"prompt": json.dumps([Q]), "completion": json.dumps([A])}, "prompt_completion", {"messages": [Q, A]}),
        ({"query": "q", "response": "a", "history": []}, "prompt_completion", {"messages": [Q, A]}),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion", {"messages": [S, Q, A]}),
        ({"prompt": "q", "completion": "a", "label": True}, "prompt_completion", TEXTS | {"label": True}),
        ({"prompt": "q", "completion": "a", "label": "False"}, "prompt_completion", TEXTS | {"label": False}),
        (
            {"prompt": "q", "completion": "a", "label": 0},
            "prompt_completion",
            {"prompt": "q", "completion": "a", "columns": {"label": 0}},
        ),
        ({"messages": [Q, A], "kto_tag": False}, "messages", {"messages": [Q, A], "label": False}),
        ({"prompt": [Q, B, Q], "completion": [A]}, "prompt_completion", {"messages": [Q, B | {"weight": 0}, Q, A]}),
        ({"prompt": [Q], "completion": [Q, A]}, "prompt_completion", {"messages": [Q, A]}),
        ({"prompt": [Q], "completion": [A], "tools": ["t"]}, "prompt_completion", {"messages": [Q, A], "tools": ["t"]}),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": ["t"]}, "pairs", PAIR | {"tools": ["t"]}),
        ({"prompt": [Q, A], "chosen": [Q | {"content": "r"}, A], "rejected": [Q | {"content": "r"}, B]}, "pairs",
         {"prompt": [Q, A, Q | {"content": "r"}], "chosen": [A], "rejected": [B]}),
        ({"prompt": [S, Q], "chosen": [Q, A], "rejected": [Q, B]}, "pairs", PAIR | {"prompt": [S, Q]}),
        ({"query": "q", "response": "a", "rejected_response": "b"}, "pairs", PAIR),
        ({"messages": [Q, A], "rejected_messages": [Q, B]}, "pairs", PAIR),
        ({"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}, "pairs", PAIR | {"columns": {"messages": [Q, A]}}),
        ({"prompt": "q", "images": []}, "prompts", {"prompt": "q", "columns": {"images": []}}),
        ({"prompt": "q", "tools": '["t"]', "a": "4"}, "prompts", {"prompt": [Q], "tools": ["t"], "columns": {"a": "4"}}),
        ({"instruction": "q", "input": "x"}, "prompts", {"prompt": "q\nx"}),
        ({"system": "s", "query": "q", "history": [["q", "b"]]}, "prompts", {"prompt": [S, Q, B, Q]}),
    ],
)  # fmt: skip
def test_rows_that_people_have(row: dict[str, Any], shape: str, expected: dict[str, Any]) -> None:
    assert recognise(row) == shape
    assert to_canonical(row, shape, "f, row 1") == expected


@pytest.mark.parametrize("key", ["weight", "train", "train_on_turn", "loss", "loss_scale", "loss_weight"])
def test_every_mark_of_a_message_is_its_weight(key: str) -> None:
    for said, weight in ((False, 0), (True, 1), (0, 0), (0.5, 0.5)):
        found = to_canonical({"messages": [Q, A | {key: said}]}, "messages", "row 1")
        learnt = {"train": True} if weight and key.startswith("train") else {}
        assert found == {"messages": [Q, A | {"weight": weight} | learnt]}
    found = to_canonical({"conversations": [HUMAN, GPT | {key: False}]}, "sharegpt", "row 1")
    assert found == {"messages": [Q, A | {"weight": 0}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [Q, A | {"loss": "no"}]}, "loss of messages[1] is 'no', not true, false or a number from 0 on"),
        ({"messages": [Q, A | {"train_detail": [{"begin_offset": 0}]}]}, "train_detail of messages[1] has in place 0 no numbers"),
        ({"messages": [Q | {"content": [{"type": "image"}]}, A]}, "content of messages[0] has a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "a <image>"}, A]}, "messages[0].content holds <image>, and only text"),
        ({"prompt": "a <video>", "completion": "b"}, "prompt holds <video>, and only text"),
        ({"text": "a caption", "image": {"bytes": None, "path": "a.png"}}, "has a column image, and only text"),
        ({"messages": str([Q, A])}, "messages is a text that is not valid JSON of messages; write it with json.dumps"),
        ({"prompt": "q\ud800", "chosen": "a", "rejected": "b"}, "prompt holds half a letter (\\ud800, at letter 2)"),
        ({"prompt": [Q, A]}, "prompt ends with the assistant's message, where it is to answer"),
        ({"prompt": [Q, S]}, "prompt[1] is a system message"),
        ({"prompt": [Q], "chosen": [A, A], "rejected": [B]}, "chosen[2] is the assistant's turn a second time"),
        ({"prompt": [Q], "completion": [S, Q | {"content": "r"}, A]}, "completion is a whole transcript without the prompt's"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_for_what_it_is(row: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        to_canonical(row, recognise(row), "data.jsonl, row 7")
    assert str(error.value).startswith(f"data.jsonl, row 7: {says}")


def test_html_and_code_are_no_pictures() -> None:
    row = {"text": "write <image> here"}
    assert to_canonical(row, "text", "row 1") == row


def test_unknown_columns() -> None:
    with pytest.raises(UserError, match=r"^data\.shape: the columns foo, bar make no known shape") as error:
        recognise({"foo": 1, "bar": 2})
    assert all(shape in str(error.value) for shape in FORMATS.names())
    with pytest.raises(UserError, match=r"make no known shape - did you mean 'prompt'\?; rename them to"):
        recognise({"completion": "b", "promt": "a"})


def test_what_fits_which_stage() -> None:
    taken = {stage: [] for stage in ("cpt", "sft", "dpo")}
    for stage, fitting in taken.items():
        for shape in FORMATS.names():
            try:
                check_fits(shape, row_uses()[stage])
                fitting.append(shape)
            except UserError:
                pass
    assert taken["cpt"] == ["text"] and taken["dpo"] == ["pairs"]
    assert set(taken["sft"]) == {"messages", "sharegpt", "alpaca", "prompt_completion", "text"}


@pytest.mark.parametrize(
    ("shape", "stage", "says"),
    [
        ("pairs", "sft", "use posttrain rm or ppo or dpo, or give data"),
        ("alpaca", "cpt", "use posttrain sft or ppo, or give data with a text column"),
        ("text", "dpo", "use posttrain cpt or sft, or give data with prompt, chosen and rejected"),
    ],
)
def test_misfits_come_with_a_hint(shape: str, stage: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_fits(shape, row_uses()[stage])


def test_a_function_call_of_sharegpt_is_a_tool_call() -> None:
    called = {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    row = {"conversations": [HUMAN, called, {"from": "observation", "value": "2"}, GPT]}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert to_canonical(row, "sharegpt", "row 1") == {"messages": [Q, said, {"role": "tool", "content": "2"}, A]}


@pytest.mark.parametrize("name", FORMATS.names())
def test_a_formats_own_example_is_what_it_says(name: str) -> None:
    """Recognised among all formats, made canonical, and canonical rows of it stay as they are."""
    found = FORMATS.get(name)
    assert recognise(found.example) == name
    canonical = to_canonical(found.example, name, "row 1")
    assert canonical == found.example_becomes
    again = recognise(canonical)
    assert FORMATS.get(again).kind == found.kind and to_canonical(canonical, again, "row 1") == canonical


def test_the_most_specific_format_wins() -> None:
    """The order is written down, and no two formats share a place in it."""
    formats = by_precedence()
    assert list(formats) == ["pairs", "sharegpt", "messages", "alpaca", "prompt_completion", "text", "prompts"]
    assert len({each.precedence for each in formats.values()}) == len(formats)
    row: dict[str, Any] = {}
    for name in reversed(formats):  # each with the columns of all that are less specific
        row |= formats[name].example
        if name == "sharegpt":
            del row["messages"]  # what is not null there comes before conversations
        assert recognise(row) == name


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
def test_the_documented_examples_are_what_the_page_says() -> None:
    """Each row of docs/data.md is recognised and becomes what stands behind it, or is refused in the words that stand there."""
    lines = [line for block in re.findall(r"```jsonl\n(.*?)```", PAGE.read_text(), re.S) for line in block.splitlines()]
    shapes = set()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(("->", "!!")):
            continue
        row = json.loads(line)
        shapes.add(shape := recognise(row))
        if after.startswith("!!"):
            with pytest.raises(UserError) as error:
                to_canonical(row, shape, "row 1")
            assert str(error.value) == f"row 1: {after[3:]}"
        else:
            found = to_canonical(row, shape, "row 1")
            assert not after.startswith("->") or found == json.loads(after[3:])
    assert shapes == set(FORMATS.names())


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
def test_the_documented_table_is_the_registry() -> None:
    """docs/data.md has a line for each format, in the order in which they are tried."""
    uses = {name: [use.name for use in row_uses().values() if each.kind in use.takes] for name, each in by_precedence().items()}
    lines = [f"| `{name}` | {each.columns} | {', '.join(uses[name])} |" for name, each in by_precedence().items()]
    table = PAGE.read_text().split("| `data.shape` | columns | for |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == lines


def test_the_settings_choices_are_the_registry() -> None:
    with pytest.raises(UserError, match=r"data\.shape: input should be one of 'auto', 'alpaca', .* - did you mean 'sharegpt'\?"):
        compose_run("sft", ["model=tiny", "data.shape=sharegtp"])
    assert SourceConfig.model_json_schema()["properties"]["shape"]["enum"] == ["auto", *FORMATS.names()]


def test_functions_are_tools() -> None:
    """OpenAI's earlier name; it was kept as a column that nobody reads."""
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for given in ([tool], json.dumps([tool])):
        assert to_canonical({"messages": talk, "functions": given}, "messages", "row 1") == {"messages": talk, "tools": [tool]}
    both = to_canonical({"messages": talk, "functions": [tool], "tools": [{"name": "sub"}]}, "messages", "row 1")
    assert both["tools"] == [{"name": "sub"}]
