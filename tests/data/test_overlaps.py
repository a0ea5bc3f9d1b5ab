"""Rows that repeat others, stand in the held-out rows, or are known from a test set: counted always, left out where asked."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.config.schema import LanguageStage
from posttrain.data.chat.encoder import Encoder
from posttrain.data.likeness import NUMBERS, key_of, nearest_before, runs_of, signature_of, words_of
from posttrain.data.prepare import PreparedSource, prepare
from posttrain.stages.language.summary import lines_of_source
from posttrain.stages.spec import row_uses

RANDOM = random.Random(3)
LEXICON = [f"word{k}" for k in range(3000)]


def text(words: int) -> str:
    return " ".join(RANDOM.choices(LEXICON, k=words))


def row(prompt: str, answer: str = " yes", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, **more}


@pytest.fixture
def encoder(make_tokenizer: Any) -> Encoder:
    return Encoder(make_tokenizer(None))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def prepared(folder: Path, encoder: Encoder, rows: list[dict[str, Any]], *words: str) -> tuple[PreparedSource, list[str]]:
    """And what its first lines say below the first."""
    write(folder / "rows.jsonl", rows)
    cfg = validate(
        compose_run("sft", [f"data.path={folder / 'rows.jsonl'}", "data.eval_share=0", "train.max_length=4096", *words])
    )
    assert isinstance(cfg, LanguageStage)
    found = prepare(cfg.data, row_uses()["sft"], encoder, 4096, folder / "cache")[0]
    dedupes = cfg.data.dedupe != "none"
    lines = [line.strip().replace(f"{folder}/", "") for line in lines_of_source(found.stats, 4096, dedupes=dedupes)[1:]]
    return found, lines


def test_repeats_are_counted_and_said(encoder: Encoder, tmp_path: Path) -> None:
    """Though they differ in a column that nobody reads, or in their weight."""
    rows = [row("a:", id=1), row("b:", id=2), row("a:", id=3, weight=0.5), row("a:", " no", id=4), row("b:", id=5)]
    found, lines = prepared(tmp_path, encoder, rows)
    assert (found.stats.rows, found.stats.repeated, found.stats.also_held) == (5, 2, 0)
    repeat = "2 rows repeat an earlier one, the first: rows.jsonl, row 3; data.dedupe=exact leaves them out"
    assert lines == [repeat, "columns not used: id"] and found.stats.unused == {"id": 5}


def test_repeats_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    rows = [row("a:", id=1), row("b:", id=2), row("a:", id=3), row("b:", id=4)]
    found, lines = prepared(tmp_path, encoder, rows, "data.dedupe=exact")
    assert found.train.rows.tolist() == [1, 2] and (found.stats.rows, found.stats.repeated) == (2, 2)
    assert lines == ["2 rows left out, they repeat an earlier one, the first: rows.jsonl, row 3", "columns not used: id"]


@pytest.mark.parametrize("dedupe", ["none", "exact"])
def test_rows_that_are_held_out_as_well(dedupe: str, encoder: Encoder, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [row("b:", note="x"), row("c:")])
    rows = [row("a:"), row("b:"), row("b:"), row("d:")]
    found, lines = prepared(tmp_path, encoder, rows, f"data.eval_path={held}", f"data.dedupe={dedupe}")
    assert (found.stats.also_held, found.stats.repeated, found.held_out_stats.rows) == (2, 0, 2)
    assert found.train.rows.tolist() == ([1, 2, 3, 4] if dedupe == "none" else [1, 4])
    flatters = "are held out as well, which flatters what is measured on them, the first: rows.jsonl, row 2"
    assert lines == [
        f"2 rows {flatters}; data.dedupe=exact leaves them out" if dedupe == "none" else f"2 rows left out, they {flatters}"
    ]


def changed(said: str, words: int) -> str:
    """With so many words of it replaced, side by side."""
    found = said.split()
    return " ".join([*found[:10], *text(words).split(), *found[10 + words :]])


def test_near_duplicates_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    texts = [text(120) for _ in range(30)]
    rows = [row(each) for each in texts] + [row(changed(each, 2)) for each in texts] + [row(changed(each, 60)) for each in texts]
    held = write(tmp_path / "held.jsonl", [row(changed(texts[0], 3))])
    words = (f"data.eval_path={held}", "data.dedupe=near")
    found, lines = prepared(tmp_path, encoder, rows, *words)
    assert found.train.rows.tolist() == [*range(2, 31), *range(61, 91)]  # 115 of 125 runs in common, against 56 of 184
    assert lines == ["31 rows left out, they are nearly an earlier or a held-out one, the first: rows.jsonl, row 1"]
    assert prepared(tmp_path, encoder, rows, "data.dedupe=exact")[0].stats.rows == 90


def test_a_long_system_message_makes_no_rows_alike(encoder: Encoder, tmp_path: Path, make_tokenizer: Any) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    chat = Encoder(make_tokenizer(template, ["<|im_start|>", "<|im_end|>"]))
    system = {"role": "system", "content": text(300)}

    def talk(k: int) -> list[dict[str, str]]:
        return [system, {"role": "user", "content": text(8)}, {"role": "assistant", "content": f"{k}"}]

    found, _ = prepared(tmp_path, chat, [{"messages": talk(k)} for k in range(20)], "data.dedupe=near")
    assert found.stats.rows == 20 and not found.stats.near


def test_words_of_test_sets_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    asked, short = text(40), text(6)
    one = write(tmp_path / "gsm.jsonl", [{"question": asked, "answer": "4"}, {"question": text(30), "answer": "5"}])
    two = write(tmp_path / "short.jsonl", [{"question": short}, {"question": "too short"}])
    borrowed = " ".join(asked.split()[5:18])  # 13 words in a row, and 12
    less = " ".join(asked.split()[5:17])
    rows = [row(text(50)), row(f"Here: {borrowed.upper()}!"), row(f"Here: {less} ."), row(f"so {short}?"), row("too short")]
    found, lines = prepared(tmp_path, encoder, rows, f"data.decontaminate=[{one},{two}]")
    assert found.train.rows.tolist() == [1, 3, 5] and found.stats.known == {str(one): 1, str(two): 1}
    assert lines == [
        "1 rows left out, they hold words of gsm.jsonl, the first: rows.jsonl, row 2",
        "1 rows left out, they hold words of short.jsonl, the first: rows.jsonl, row 4",
    ]


def test_a_change_of_the_test_set_is_another_key(encoder: Encoder, tmp_path: Path) -> None:
    test = write(tmp_path / "test.jsonl", [{"question": text(40)}])
    keys = [prepared(tmp_path, encoder, [row("a:")], f"data.decontaminate={test}")[0].key]
    write(test, [{"question": text(40)}])
    keys += [prepared(tmp_path, encoder, [row("a:")], *words)[0].key for words in ([f"data.decontaminate={test}"], [])]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_signature_estimates_the_share_of_common_runs(share: float) -> None:
    """Against the sets themselves: within four standard deviations, on the mean of forty pairs."""
    errors = []
    for _ in range(40):
        first = text(200)
        second = changed(first, round(200 * (1 - share) / (1 + share)))
        runs = [set(runs_of(words_of([each]), 5).tolist()) for each in (first, second)]
        true = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        errors.append((signature_of(words_of([first])) == signature_of(words_of([second]))).mean() - true)
    assert abs(np.mean(errors)) < 4 * 0.5 / np.sqrt(40 * NUMBERS)
    assert np.std(errors) < 0.08


def test_nearest_before_by_hand() -> None:
    signatures = np.random.default_rng(0).integers(0, 2**32, (6, NUMBERS), dtype=np.uint32)
    signatures[2] = signatures[0]
    signatures[2, :20] = 7  # 100 of 120 alike
    signatures[4] = signatures[1]
    signatures[4, :40] = 7  # 80 of 120
    signatures[5] = signatures[2]
    assert nearest_before(signatures, 0).tolist() == [-1, -1, 0, -1, -1, 0] or nearest_before(signatures, 0)[5] == 2
    assert nearest_before(signatures, 3)[:3].tolist() == [-1, -1, -1]


def test_texts_and_messages_say_the_same() -> None:
    asked, told = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]
    other = [{"role": "assistant", "content": "b"}]
    assert key_of({"prompt": "q", "completion": "a"}) == key_of({"messages": [*asked, *told]}) != key_of({"messages": asked})
    as_texts = key_of({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert as_texts == key_of({"prompt": asked, "chosen": told, "rejected": other})
    assert as_texts != key_of({"prompt": asked, "chosen": other, "rejected": told})
    assert key_of({"prompt": "q"}) == key_of({"prompt": asked}) != key_of({"text": "q"})


def test_keys_and_words() -> None:
    assert key_of({"text": "a", "weight": 2, "columns": {"id": 3}}) == key_of({"text": "a"}) != key_of({"text": "A"})
    assert key_of({"prompt": "a", "completion": "b", "label": False}) != key_of({"prompt": "a", "completion": "b", "label": True})
    assert words_of(["The cat, THE Cat."]).tolist()[:2] == words_of(["the cat"]).tolist()
    assert len(words_of(["東京は大きい"])) == 6 and len(words_of(["lone \ud800 surrogate"])) == 2
