"""Weights of tokens by span, turn, length and row, by hand on a real tokenizer."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoded, Encoder
from posttrain.data.chat.loss_weights import PLAIN, Weighing
from posttrain.data.chat.options import ChatOptions
from posttrain.data.chat.template_text import CHATML
from posttrain.data.prepare import prepare
from posttrain.errors import UserError
from posttrain.stages.spec import row_uses

COT = replace(PLAIN, marker="####", reasoning=0.25, answer=2.0)
CALL = {
    "role": "assistant",
    "content": "I look.",
    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {}}}],
}
TOOLS = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}<call>{{ c.function.name }}</call>{%- endfor -%}"
    "<|im_end|>\n{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


@pytest.fixture(scope="module")
def encoder_of(make_tokenizer: Any) -> Any:
    def make(weighing: Weighing, template: str = CHATML) -> Encoder:
        return Encoder(make_tokenizer(template, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>"), (), weighing)

    return make


def texts_by_weight(encoder: Encoder, found: Encoded) -> dict[float, str]:
    by_weight: dict[float, list[int]] = {}
    for token, weight in zip(found.tokens, found.weights, strict=True):
        by_weight.setdefault(weight, []).append(token)
    return {weight: encoder._tokenizer.decode(tokens) for weight, tokens in by_weight.items()}


def turns(*answers: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for answer in answers:
        said = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        found += [{"role": "user", "content": "Go on."}, said]
    return found


def test_reasoning_and_answer(encoder_of: Any) -> None:
    encoder = encoder_of(COT)
    found = texts_by_weight(encoder, encoder.encode({"messages": turns("one and one is two. #### 2")}))
    assert found[0.25] == "one and one is two. ####"
    assert found[2.0].strip() == "2<|im_end|>"  # the end of turn counts as the answer it ends
    assert "assistant" in found[0.0]


def test_weight_1_is_plain(encoder_of: Any) -> None:
    row = {"messages": turns("a #### b", "c #### d")}
    assert encoder_of(replace(COT, reasoning=1.0, answer=1.0)).encode(row) == encoder_of(PLAIN).encode(row)


def test_without_a_marker_all_is_answer_and_the_last_marker_decides(encoder_of: Any) -> None:
    encoder = encoder_of(COT)
    assert 0.25 not in encoder.encode({"messages": turns("just an answer")}).weights
    assert texts_by_weight(encoder, encoder.encode({"messages": turns("a #### b #### c")}))[0.25] == "a #### b ####"


def test_turns_and_their_own_weights(encoder_of: Any) -> None:
    encoder = encoder_of(replace(PLAIN, earlier_turns=0.5))
    messages = turns("first", {"role": "assistant", "content": "second", "weight": 0}, "third")
    found = texts_by_weight(encoder, encoder.encode({"messages": messages}))
    assert (found[0.5], found[1.0]) == ("first<|im_end|>", "third<|im_end|>")
    assert "second" in found[0.0]


def test_tool_calls(encoder_of: Any) -> None:
    encoder = encoder_of(replace(PLAIN, tool_calls=3.0), TOOLS)
    found = texts_by_weight(encoder, encoder.encode({"messages": turns(CALL)}))
    assert found[3.0] == "<call>find</call><|im_end|>" and found[1.0].strip() == "I look."


def test_length_control_by_hand(encoder_of: Any) -> None:
    plain = encoder_of(PLAIN).encode({"messages": turns("a", "a rather long answer, of many more tokens than the other one")})
    encoder = encoder_of(replace(PLAIN, gamma=0.1, l_max=4))
    found = encoder.encode({"messages": turns("a", "a rather long answer, of many more tokens than the other one")})
    lengths = [2, sum(plain.weights) - 2]  # "a" and its end of turn
    expected = {1.0, math.exp(-0.1 * (lengths[1] - 4))}
    assert sorted({w for w in found.weights if w}) == pytest.approx(sorted(expected))
    assert sum(w != 0 for w in found.weights) == sum(lengths)


def test_length_counts_all_tokens_of_an_answer_though_some_weigh_nothing(encoder_of: Any) -> None:
    row = {"messages": turns("a long chain of thought, of which nothing counts #### it is four")}
    whole = sum(encoder_of(PLAIN).encode(row).weights)
    short = replace(PLAIN, marker="####", reasoning=0.0, gamma=0.1, l_max=4)
    (found,) = {weight for weight in encoder_of(short).encode(row).weights if weight}
    assert found == pytest.approx(math.exp(-0.1 * (whole - 4)))


def test_rows_have_a_weight(encoder_of: Any) -> None:
    encoder = encoder_of(COT)
    assert set(encoder.encode({"text": "a b c", "weight": 0.5}).weights) == {0.5}
    assert set(encoder.encode({"prompt": "a", "completion": "b #### c", "weight": 2}).weights) == {0.0, 0.5, 4.0}
    with pytest.raises(UserError, match="weight is -1, not a number from 0 on"):
        encoder.encode({"text": "a", "weight": -1})


def prepared(tmp_path: Path, encoder: Encoder, rows: list[dict[str, Any]], *words: str, stage: str = "sft") -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose_run(stage, [f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0", *words])
    return prepare(validate(config).data, row_uses()[stage], encoder, 64, tmp_path / "cache")[0]


def test_quality_filters_or_weighs(tmp_path: Path, encoder_of: Any) -> None:
    rows = [{"q": f"q{i}", "completion": f"a{i}", "score": i / 10} for i in range(10)]
    words = ["data.columns.prompt=q", "data.columns.quality=score"]
    best = prepared(tmp_path, encoder_of(PLAIN), rows, *words, "data.quality=filter", "data.quality_top=0.3")
    assert best.train.rows.tolist() == [8, 9, 10] and (best.stats.rows, best.stats.filtered) == (3, 7)
    weighed = prepared(tmp_path, encoder_of(PLAIN), rows, *words, "data.quality=weight")
    found = {int(row): weighed.train.sequence(i)[1].max() for i, row in enumerate(weighed.train.rows)}
    assert found == {i + 1: pytest.approx(i / 10) for i in range(1, 10)}  # the first counts for nothing, and is left out
    assert weighed.stats.untrained == 1
    with pytest.raises(UserError, match=r"row 3: quality is nan, not a number"):
        prepared(tmp_path, encoder_of(PLAIN), [*rows[:2], {**rows[2], "score": float("nan")}], *words, "data.quality=filter")


def test_a_column_that_is_not_there_is_named(tmp_path: Path, encoder_of: Any) -> None:
    with pytest.raises(UserError, match=r"row 1: has no quest, which data\.columns\.prompt names - did you mean 'question'"):
        prepared(tmp_path, encoder_of(PLAIN), [{"question": "q", "answer": "a"}], "data.columns.prompt=quest")


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_pairs_have_the_weight_of_their_row(stage: str, tmp_path: Path, encoder_of: Any) -> None:
    """The column times the quality; the tokens' own weights are left alone."""
    pair = {"prompt": "a:", "chosen": " b", "rejected": " c"}
    rows = [pair, {**pair, "weight": 2, "quality": 0.25}, {**pair, "weight": 0}, {**pair, "weight": None, "quality": 3}]
    half = "data.max_untrained_share=0.5"
    plain = prepared(tmp_path, encoder_of(PLAIN), rows, half, stage=stage)
    assert plain.train.pair_weights.tolist() == [1, 2, 1] and plain.train.rows.tolist() == [1, 2, 4]
    assert (plain.stats.untrained, plain.stats.places["untrained"][0].split(", ")[-1]) == (1, "row 3")
    assert set(plain.train.weights[:].tolist()) == {0.0, 1.0}
    weighed = prepared(
        tmp_path, encoder_of(PLAIN), [{"quality": 1, **row} for row in rows], "data.quality=weight", half, stage=stage
    )
    assert weighed.train.pair_weights.tolist() == [1, 0.5, 3]
    for wrong in (-1, float("nan"), "2"):
        with pytest.raises(UserError, match=rf"rows.jsonl, row 2: weight is {wrong!r}, not a number from 0 on"):
            prepared(tmp_path, encoder_of(PLAIN), [pair, {**pair, "weight": wrong}], stage=stage)


def test_prompts_have_no_weights() -> None:
    with pytest.raises(UserError, match=r"data\.quality: ppo has prompts, which have no weights; say data\.quality=filter"):
        validate(compose_run("ppo", ["model=tiny", "data.quality=weight", "reward.function=a:b"]))


def test_where_no_row_can_be_read_the_first_mistake_is_said(tmp_path: Path, encoder_of: Any) -> None:
    rows = [{"q": "a", "completion": "b"}] * 3
    with pytest.raises(UserError, match=r"none of the 3 rows .*the first: .*row 1: quality is None"):
        prepared(tmp_path, encoder_of(PLAIN), rows, "data.columns.prompt=q", "data.quality=weight", "data.on_error=skip")


def test_a_file_that_was_moved_is_named_where_it_is(tmp_path: Path, encoder_of: Any) -> None:
    """Its tokens are in the cache by content, under the name that it had."""
    rows = [{"prompt": "question", "completion": "answer"}] * 9 + [{"prompt": "question " * 80, "completion": "answer"}]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("old", "new"):
        data = validate(compose_run("sft", [f"data.path={tmp_path / name}.jsonl", "data.eval_share=0"])).data
        found += prepare(data, row_uses()["sft"], encoder_of(PLAIN), 64, tmp_path / "cache")
        if name == "old":
            (tmp_path / "old.jsonl").rename(tmp_path / "new.jsonl")
    first, second = (part.stats for part in found)
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    assert second.source == str(tmp_path / "new.jsonl") and second.where(3) == f"{second.source}, row 3"
    assert second.places["untrained"] == [f"{second.source}, row 10"] and "old.jsonl" in first.places["untrained"][0]


@pytest.mark.parametrize("file", ["train.tokens", "train.weights", "held_out.offsets", "report.json"])
def test_a_damaged_cache_is_named_and_made_again(
    tmp_path: Path, file: str, encoder_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = validate(compose_run("sft", [f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0.2"])).data
    (first,) = prepare(data, row_uses()["sft"], encoder_of(PLAIN), 64, tmp_path / "cache")
    tokens = np.array(first.train.tokens[:])
    (damaged,) = (tmp_path / "cache").rglob(file)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x01
    damaged.write_bytes(content)
    (again,) = prepare(data, row_uses()["sft"], encoder_of(PLAIN), 64, tmp_path / "cache")
    assert np.array_equal(again.train.tokens[:], tokens) and again.stats == first.stats
    assert "it is made again" in capsys.readouterr().out


def test_weights_of_answers_are_of_no_other_role(encoder_of: Any) -> None:
    """Of users' words, which are learnt too, a message's own weight alone counts."""
    weighing = replace(COT, earlier_turns=0.5, gamma=1.0, l_max=1000)
    encoder = encoder_of(weighing).reading_as(ChatOptions(train_on="all"))
    messages = turns("a #### b", "c #### d")
    messages[2] = {"role": "user", "content": "So?", "weight": 3}
    found = texts_by_weight(encoder, encoder.encode({"messages": messages}))
    assert {weight: text.replace(" ", "") for weight, text in found.items() if weight} == {
        1.0: "Goon.<|im_end|>b<|im_end|>",  # 1, and 2 of an answer halved
        3.0: "So?<|im_end|>",
        0.125: "a####",
        0.25: "c####",
        2.0: "d<|im_end|>",
    }
