"""Where rows are cut to train.max_length, and which are left out since nothing of their answer is left."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.template_text import CHATML
from posttrain.data.examples import Examples, join
from posttrain.data.prepare import PreparedSource, prepare
from posttrain.data.row_use import RowUse
from posttrain.errors import UserError
from posttrain.stages.dpo.loss import LABELLED
from posttrain.stages.spec import row_uses

LAST = {"prompt": "x", "completion": " y"}  # a row that fits
GIVEN = {"ppo": ["reward.function=posttrain.rewards:brevity"]}


@pytest.fixture(scope="module")
def encoder(make_tokenizer: Any) -> Encoder:
    return Encoder(make_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>"))


def prepared(
    folder: Path, encoder: Encoder, rows: list[dict[str, Any]], stage: str, most: int, *more: str, use: RowUse | None = None
) -> PreparedSource:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        f"data.path={folder / 'rows.jsonl'}",
        "data.eval_share=0",
        "data.max_untrained_share=1",
        *GIVEN.get(stage, []),
        *more,
    ]
    return prepare(validate(compose_run(stage, words)).data, use or row_uses()[stage], encoder, most, folder / "cache")[0]


def counting(encoder: Encoder, found: Examples) -> list[str]:
    """What counts of each sequence."""
    parts = [found.sequence(i) for i in range(len(found.rows))]
    return [encoder._tokenizer.decode(tokens[weights > 0].tolist()) for tokens, weights in parts]


def test_an_answer_is_cut_and_a_row_whose_answer_is_cut_off_is_left_out(encoder: Encoder, tmp_path: Path) -> None:
    row = {"prompt": "a b c", "completion": " d e f g"}
    first = next(k for k, weight in enumerate(encoder.encode_completion(**row).weights) if weight)
    cut = prepared(tmp_path, encoder, [row, LAST], "sft", first + 2)
    assert cut.train.rows.tolist() == [1, 2] and cut.train.sequence(0)[1].tolist() == [0.0] * first + [1.0, 1.0]
    assert (cut.stats.truncated, cut.stats.untrained) == (1, 0)
    gone = prepared(tmp_path, encoder, [row, LAST], "sft", first)
    assert gone.train.rows.tolist() == [2] and (gone.stats.truncated, gone.stats.untrained) == (1, 1)


def test_a_prompt_that_ends_in_a_space_takes_nothing_from_its_answer(encoder: Encoder, tmp_path: Path) -> None:
    row = {"prompt": "Review: the fox.\nLabel: ", "completion": "the"}
    empty = {"prompt": "x", "completion": " "}
    found = prepared(tmp_path, encoder, [row, empty], "sft", 100)
    assert counting(encoder, found.train) == [" the<|im_end|>"]
    assert (found.stats.untrained, found.stats.border_tokens) == (1, 1)
    assert found.stats.places["untrained"] == [found.stats.where(2)], "its end is all that it would train"
    pairs = [{"prompt": "Label: ", "chosen": "dog", "rejected": "fox"}, {"prompt": "x", "chosen": "", "rejected": " "}]
    found = prepared(tmp_path, encoder, pairs, "dpo", 100)
    assert found.train.rows.tolist() == [1] and found.stats.untrained == 1
    assert counting(encoder, found.train) == [" dog<|im_end|> fox<|im_end|>"]


def test_both_answers_of_a_pair_have_what_its_prompt_leaves(encoder: Encoder, tmp_path: Path) -> None:
    row = {"prompt": "a b c", "chosen": " d", "rejected": " e f g h i j"}
    other = {"prompt": "x", "chosen": " y", "rejected": " z"}
    pair = encoder.encode_pair(row)
    prompt, chosen = len(pair.prompt), len(pair.chosen.tokens)
    assert len(pair.rejected.tokens) > chosen + 1
    cut = prepared(tmp_path, encoder, [row, other], "dpo", prompt + chosen)
    assert cut.train.splits[0].tolist() == [prompt, prompt + chosen]
    tokens, _ = cut.train.sequence(0)
    assert len(tokens) == prompt + 2 * chosen, "the rejected answer is cut to the room that the chosen one fills"
    assert (cut.stats.truncated, cut.stats.untrained) == (1, 0)
    gone = prepared(tmp_path, encoder, [row, other], "dpo", prompt)
    assert gone.train.rows.tolist() == [2] and gone.stats.untrained == 1


def test_a_scored_answer_ends_with_its_end_of_turn(encoder: Encoder, tmp_path: Path) -> None:
    """ChatML writes a line break after it, which DPO keeps and a reward model does not see."""
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c d"}
    end = encoder._tokenizer.convert_tokens_to_ids("<|im_end|>")
    for stage, is_last in (("dpo", False), ("rm", True)):
        found = prepared(tmp_path, encoder, [row], stage, 64).train
        tokens, _ = found.sequence(0)
        border = int(found.splits[0, 1])
        assert [bool(tokens[k] == end) for k in (border - 1, -1)] == [is_last] * 2
        assert counting(encoder, found) == ["b<|im_end|>c d<|im_end|>"]


def test_documents_are_cut_into_pieces_of_which_none_is_lost(encoder: Encoder, tmp_path: Path) -> None:
    row = {"text": "one two three four five six seven eight nine ten"}
    whole = encoder.encode_text(row).tokens
    found = prepared(tmp_path, encoder, [row, {"text": "a b"}], "cpt", 4).train
    assert max(found.unit_tokens()) <= 4
    pieces = [found.sequence(i)[0].tolist() for i in range(len(found.rows)) if found.rows[i] == 1]
    # but for a lone token at the end, which nothing predicts
    assert sorted(pieces) == sorted(whole[k : k + 4] for k in range(0, len(whole) - 1, 4)) and len(pieces) > 3


def test_prompts_that_are_too_long_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": " yes"}, {"prompt": "a b c d e f g h", "completion": " no"}]
    short = len(encoder.encode_prompt(rows[0]))
    found = prepared(tmp_path, encoder, rows, "ppo", short)
    assert found.train.rows.tolist() == [1] and found.stats.untrained == 1
    assert int(found.train.splits[0, 0]) == short and not found.train.weights[:].any()
    assert encoder._tokenizer.decode(found.train.sequence(0)[0][short:].tolist()) == " yes"


def test_a_row_that_is_held_out_is_not_trained_on(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {k}:", "completion": f" answer {k}"} for k in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = validate(compose_run("sft", [f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0.3", "data.eval_rows=5"])).data
    found = prepare(data, row_uses()["sft"], encoder, 64, tmp_path / "cache")[0]
    train, held_out = (set(part.rows.tolist()) for part in (found.train, found.held_out))
    assert len(held_out) == 5 and not train & held_out
    assert len(train) == 35  # those beyond data.eval_rows are trained on


def test_answers_that_are_not_to_be_learnt_are_left_out_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    """KTO's rows in sft: `label: false` is an answer that people did not want."""
    rows = [{"prompt": "x", "completion": f" {k}", "label": k % 3 == 0} for k in range(6)]
    part = prepared(tmp_path, encoder, rows, "sft", 64)
    assert part.train.rows.tolist() == [1, 4]
    assert (part.stats.rows, part.stats.disliked, part.stats.untrained) == (6, 4, 0)
    assert part.stats.places["disliked"] == [f"{tmp_path / 'rows.jsonl'}, row {n}" for n in (2, 3, 5, 6)]
    with pytest.raises(UserError, match=r"the label of all 2 rows of .* is false, so there is nothing to learn"):
        prepared(tmp_path, encoder, [row | {"label": False} for row in rows[:2]], "sft", 64)


def test_a_message_that_is_marked_and_a_prompt_in_messages_are_not_learnt(encoder: Encoder, tmp_path: Path) -> None:
    q, a, b = ({"role": role, "content": said} for role, said in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    marked = {"messages": [q, a | {"train": False}, q, b]}
    prompted = {"prompt": [q, a, q], "completion": [b]}
    for row in (marked, prompted):
        found = prepared(tmp_path, encoder, [row], "sft", 64).train
        assert counting(encoder, found) == ["b<|im_end|>"]


def test_prompts_alone_in_every_form(encoder: Encoder, tmp_path: Path) -> None:
    """A text is a user's turn with data.template=chat, and plain text without."""
    user = [{"role": "user", "content": "q"}]
    rows = [{"prompt": user, "solution": "4"}, {"prompt": "q"}]
    found = prepared(tmp_path, encoder.templated(True), rows, "ppo", 64).train
    assert found.sequence(0)[0].tolist() == found.sequence(1)[0].tolist() == encoder.encode_prompt({"messages": user})
    plain = prepared(tmp_path, encoder, rows, "ppo", 64).train
    assert encoder._tokenizer.decode(plain.sequence(1)[0].tolist()).removeprefix("<s>") == "q"


def test_texts_are_rendered_alike_in_every_stage(encoder: Encoder, tmp_path: Path) -> None:
    """With data.template=chat a prompt that is a text is a user's turn, as if it were written in messages; without, it is not."""
    chat = encoder.templated(True)
    asked, told = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    other = [{"role": "assistant", "content": "b"}]
    texts = {"sft": {"prompt": "q", "completion": "a"}, "ppo": {"prompt": "q"}}
    lists = {"sft": {"messages": [*asked, *told]}, "ppo": {"prompt": asked}}
    for stage in ("dpo", "rm"):
        texts[stage] = {"prompt": "q", "chosen": "a", "rejected": "b"}
        lists[stage] = {"prompt": asked, "chosen": told, "rejected": other}
    for stage in texts:
        as_text, as_list = (prepared(tmp_path, chat, [row], stage, 64) for row in (texts[stage], lists[stage]))
        plain = prepared(tmp_path, encoder, [texts[stage]], stage, 64)
        found, wanted = as_text.train.sequence(0), as_list.train.sequence(0)
        assert (found[0].tolist(), found[1].tolist()) == (wanted[0].tolist(), wanted[1].tolist())
        assert found[0].tolist() != plain.train.sequence(0)[0].tolist()
        assert (as_text.stats.templated, as_list.stats.templated, plain.stats.templated) == (1, 1, 0)
        assert as_text.key != plain.key


def test_a_chat_model_stops_at_the_end_of_turn_of_its_template(make_tokenizer: Any) -> None:
    special = ["<|im_start|>", "<|im_end|>", "</s>"]
    assert Encoder(make_tokenizer(CHATML, special, eos="<|im_end|>")).of_chat_model
    assert Encoder(make_tokenizer(CHATML, special, eos="</s>"), ["<|im_end|>"]).of_chat_model
    assert not Encoder(make_tokenizer(CHATML, special, eos="</s>")).of_chat_model
    assert not Encoder(make_tokenizer(None, special, eos="</s>")).of_chat_model


SAME = " ".join(str(k % 10) for k in range(30))


def test_pairs_that_are_equal_when_cut_are_left_out_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": f" {SAME} a", "rejected": f" {SAME} b"}, {"prompt": "x", "chosen": " a", "rejected": " b"}]
    part = prepared(tmp_path, encoder, rows, "dpo", 32)
    assert part.train.rows.tolist() == [2]
    assert (part.stats.alike, part.stats.untrained, part.stats.truncated) == (1, 0, 1)
    assert part.stats.places["alike"] == [f"{tmp_path / 'rows.jsonl'}, row 1"]
    assert prepared(tmp_path, encoder, rows, "dpo", 200).train.rows.tolist() == [1, 2]
    with pytest.raises(UserError, match=r"1 of 1 rows of .* of 0, 1 pairs whose answers are equal when cut\); raise"):
        prepared(tmp_path, encoder, rows[:1], "dpo", 32)


def test_a_scored_answer_whose_end_is_cut_off_is_left_out_and_counted(encoder: Encoder, tmp_path: Path) -> None:
    """A reward model scores an answer at its end; the token at which it is cut says nothing."""
    rows = [{"prompt": "x", "chosen": " a", "rejected": f" b {SAME}"}, {"prompt": "x", "chosen": " a", "rejected": " b"}]
    part = prepared(tmp_path, encoder, rows, "rm", 32)
    assert part.train.rows.tolist() == [2] and (part.stats.endless, part.stats.alike) == (1, 0)
    assert prepared(tmp_path, encoder, rows, "dpo", 32).train.rows.tolist() == [1, 2]


def test_a_long_prompt_is_cut_at_its_beginning_where_that_is_asked_for(encoder: Encoder, tmp_path: Path) -> None:
    long = f"{SAME} {SAME}"
    rows = {
        "sft": {"prompt": long, "completion": " yes"},
        "dpo": {"prompt": long, "chosen": " yes", "rejected": " no"},
        "rm": {"prompt": long, "chosen": " yes", "rejected": " no"},
        "ppo": {"prompt": long},
    }
    for stage, row in rows.items():
        whole = prepared(tmp_path, encoder, [row], stage, 200).train
        part = prepared(tmp_path, encoder, [row], stage, 32, "data.long_prompts=cut")
        assert (part.stats.cut_prompts, part.stats.untrained) == (1, 0)
        found, full = part.train.sequence(0)[0].tolist(), whole.sequence(0)[0].tolist()
        first = int(part.train.splits[0, 0]) if stage != "sft" else 0
        start = encoder.start
        assert found[: len(start)] == start and full[-len(found) + len(start) :] == found[len(start) :]
        assert counting(encoder, part.train) == counting(encoder, whole)
        assert stage == "sft" or 16 <= first <= 32
        with pytest.raises(UserError, match=r"1 of 1 rows of .* have no token to train on"):
            prepared(tmp_path, encoder, [row], stage, 32)


def test_tools_are_rendered_in_pairs(make_tokenizer: Any, tmp_path: Path) -> None:
    template = "{{ tools | tojson if tools else '' }}" + CHATML
    encoder = Encoder(make_tokenizer(template, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>"))
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "add"}]}
    found = prepared(tmp_path, encoder, [row], "dpo", 64).train
    tokens, _ = found.sequence(0)
    assert encoder._tokenizer.decode(tokens.tolist()).startswith(
        '[{"type": "function", "function": {"name": "add"}}]<|im_start|>user\nq<|im_end|>'
    )


def test_the_columns_of_a_prompts_row_stay_with_it(encoder: Encoder, tmp_path: Path) -> None:
    """Also through the cache, and where rows are left out before it; those that make up the prompt too."""
    rows = [{"prompt": f"p{k} " + "long " * (200 if k == 1 else 0), "solution": k, "tests": ["ä", {"k": None}]} for k in range(4)]
    for _ in range(2):
        found = prepared(tmp_path, encoder, rows, "ppo", 64).train
        assert found.rows.tolist() == [1, 3, 4]
        assert [found.columns_of(i) for i in range(3)] == [rows[k] for k in (0, 2, 3)]
        both = join([found, found])
        assert [both.columns_of(i) for i in range(6)] == 2 * [rows[k] for k in (0, 2, 3)]
    assert prepared(tmp_path, encoder, [{"text": "a", "id": 1}], "cpt", 64).train.columns_of(0) == {}


def test_labelled_answers_of_rows_and_of_pairs_taken_apart(encoder: Encoder, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answers = [{"role": "assistant", "content": "d"}, {"role": "assistant", "content": "e"}]
    texts = [
        {"prompt": "x", "completion": " y", "label": True},
        {"prompt": "x", "completion": " z", "label": False, "weight": 2},
    ]
    found = prepared(tmp_path, encoder, texts, "dpo", 100, use=LABELLED)
    assert counting(encoder, found.train) == [" y<|im_end|>", " z<|im_end|>"]
    assert (found.train.margins.tolist(), found.train.pair_weights.tolist()) == ([1.0, -1.0], [1.0, 2.0])
    assert [int(a) for a, _ in found.train.splits] == [1, 1] and found.stats.untrained == 0
    chats = [{"messages": [*said, answer], "label": "true"} for answer in answers[:1]]
    chat = prepared(tmp_path, encoder, chats, "dpo", 100, use=LABELLED).train
    assert counting(encoder, chat) == ["d<|im_end|>"], "earlier turns of the assistant are the prompt's"
    pair = {"prompt": said, "chosen": answers[:1], "rejected": answers[1:]}
    apart = prepared(tmp_path, encoder, [pair], "dpo", 100, use=LABELLED).train
    assert counting(encoder, apart) == ["d<|im_end|>", "e<|im_end|>"] and apart.margins.tolist() == [1.0, -1.0]
    assert apart.sequence(0)[0].tolist() == chat.sequence(0)[0].tolist() and apart.rows.tolist() == [1, 1]
    cut = prepared(tmp_path, encoder, texts, "dpo", 3, use=LABELLED)
    assert counting(encoder, cut.train) == [" y", " z"] and cut.stats.truncated == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "completion": " y"}, "has no label, which is true of a good answer; write label: true or false"),
        ({"prompt": "x", "completion": " y", "label": 1}, "label is 1, not true or false; write label: true or false"),
        ({"messages": [{"role": "user", "content": "x"}], "label": True}, "does not end with the assistant's answer"),
    ],
)
def test_a_row_without_what_a_label_needs_is_named(encoder: Encoder, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    rows = [{"prompt": "x", "completion": " y", "label": True}] if "prompt" in row else []
    with pytest.raises(UserError, match=rf"rows\.jsonl, row {len(rows) + 1}: {re.escape(said)}"):
        prepared(tmp_path, encoder, [*rows, row], "dpo", 100, use=LABELLED)
