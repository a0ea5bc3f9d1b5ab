"""What is held out, what is trained on, and that nothing lies between: shares of quality, ties, growth and repeats."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.held_out import HeldOut
from posttrain.data.prepare import prepare
from posttrain.data.sources.source import place
from posttrain.data.split import Split, read_source, sound_rows
from posttrain.data.stats import SourceStats
from posttrain.models.builtin import tiny_tokenizer
from posttrain.stages.spec import row_uses

ROWS: list[Any] = [(n, {"id": n, "text": str(n)}) for n in range(1, 2001)]


def sifted(rows: list[Any], share: float = 0.1, most: int = 10**9) -> tuple[list[Any], list[Any]]:
    """Trained on, held out."""
    held = HeldOut(share, most)
    return list(held.sift(iter(rows))), held.rows


def test_rows_keep_their_side_when_the_data_grows_or_is_shuffled() -> None:
    train, held = sifted(ROWS)
    assert sorted(train + held, key=lambda item: item[0]) == ROWS
    assert 160 <= len(held) <= 240  # 200 expected, standard deviation 13.4
    grown = [*ROWS[:1000], (0, {"id": -1, "text": "new"}), *ROWS[1000:]]
    assert [row for _, row in sifted(grown)[1] if row["id"] != -1] == [row for _, row in held]
    swapped = [(n, {"text": row["text"], "id": row["id"]}) for n, row in ROWS]
    assert sifted(swapped)[1] == held


def test_rows_beyond_the_most_are_trained_on() -> None:
    train, held = sifted(ROWS, most=10)
    assert len(held) == 10 and sorted(train + held, key=lambda item: item[0]) == ROWS
    assert sorted(place(row) for _, row in held) == sorted(place(row) for _, row in ROWS)[:10]


def test_a_row_that_was_trained_on_is_never_held_out_later() -> None:
    small, grown = sifted(ROWS[:500], most=10), sifted(ROWS[::-1], most=10)
    trained = {n for n, _ in small[0]}
    assert not trained & {n for n, _ in grown[1]}
    assert sifted(ROWS, most=10)[1] == grown[1]


def test_as_version_0_1_did() -> None:
    first = HeldOut(0.1, 10, drop=True)
    train = list(first.sift(ROWS))
    below = [(n, row) for n, row in ROWS if place(row) < 0.1]
    assert first.rows == below[:10] and first.dropped == len(below) - 10 and len(train) == 2000 - len(below)


def test_extremes() -> None:
    assert sifted(ROWS, 0.0) == (ROWS, []) and sifted(ROWS, most=0) == (ROWS, [])


def test_what_repeats_a_held_out_row_is_left_out_and_counted() -> None:
    _, held = sifted(ROWS, most=10)
    again = [(5000 + n, row) for n, row in held[:3]]
    both = HeldOut(0.1, 10)
    train = list(both.sift([*again, *ROWS]))
    assert both.repeats == 3 and len(train) == 1990
    assert {n % 5000 for n, _ in both.rows} == {n for n, _ in held}  # by the first number, and the second is left out
    trained = {json.dumps(row) for _, row in train}
    assert not trained & {json.dumps(row) for _, row in both.rows}


def test_it_reads_no_more_than_it_must() -> None:
    read = []
    rows = ((read.append(n), (n, {"text": str(n)}))[1] for n in range(10_000))
    next(HeldOut(0.5, 64).sift(rows))
    assert len(read) < 20


def split(folder: Path, rows: list[dict[str, Any]], *words: str) -> tuple[list[int], list[int], Split]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = validate(compose_run("sft", [f"data.path={folder / 'rows.jsonl'}", *words])).data
    found = Split(data, data, row_uses()["sft"])
    train = [number for number, _ in found.train]
    return train, [number for number, _ in found.held_out()], found


def test_of_a_thousand_rows_none_vanishes(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {k}", "completion": f"a {k}"} for k in range(1000)]
    train, held, _ = split(tmp_path, rows, "data.eval_rows=10")
    assert (len(train), len(held)) == (990, 10) and sorted(train + held) == list(range(1, 1001))


@pytest.mark.parametrize("top", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("levels", [1, 2, 5])
def test_of_equal_ratings_the_share_is_kept(top: float, levels: int, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {k}", "completion": "a", "quality": k % levels} for k in range(1000)]
    words = ["data.quality=filter", f"data.quality_top={top}", "data.eval_rows=10"]
    train, held, found = split(tmp_path, rows, *words)
    assert (len(train), found.filtered, len(held)) == (round(990 * top), 990 - round(990 * top), 10)
    rated = [rows[n - 1]["quality"] for n in train]
    left = [rows[n - 1]["quality"] for n in set(range(1, 1001)) - {*train, *held}]
    assert min(rated) >= max(left)
    assert train == split(tmp_path, rows, *words)[0]


def test_of_rows_that_are_the_same_the_share_is_kept_too(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "quality": 1}] * 100
    train, _, found = split(tmp_path, rows, "data.quality=filter", "data.quality_top=0.25", "data.eval_share=0")
    assert train == list(range(1, 26)) and found.filtered == 75


def test_a_column_has_one_name(tmp_path: Path) -> None:
    """The old one is gone: what a row with pictures is told to do works, and no column counts as not used twice."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"ask": "q", "say": "a", "images": ["x.png"]}) + "\n")
    words = [f"data.path={tmp_path}/rows.jsonl", "data.eval_share=0", "data.template=none"]
    words += [
        f"data.columns.{name}={theirs}" for name, theirs in (("prompt", "ask"), ("completion", "say"), ("left_out", "images"))
    ]
    data = validate(compose_run("sft", words)).data
    assert list(read_source(data, data.path, "train", few=True)) == [
        (1, {"prompt": "q", "completion": "a", "left_out": ["x.png"]})
    ]
    (found,) = prepare(data, row_uses()["sft"], Encoder(tiny_tokenizer()), 64, tmp_path / "cache")
    assert found.stats.rows == 1 and found.stats.unused == {"left_out": 1}


def test_a_row_of_another_format_says_the_way_out(tmp_path: Path) -> None:
    """Two files in a list, of which the first decides the format."""
    rows: list[Any] = [(1, {"prompt": "a", "completion": "b"}), (2, {"text": "c"}), (3, {"prompt": 1, "completion": "b"})]
    (tmp_path / "rows.jsonl").touch()
    stats = SourceStats(str(tmp_path / "rows.jsonl"), "prompt_completion", "")
    assert [number for number, _ in sound_rows(rows, "prompt_completion", stats, skips=True)] == [1]
    assert stats.places["skipped"][0].endswith(
        "row 2: has no prompt; its columns are text; it is of shape text among rows of shape prompt_completion: "
        "mix them by data=mix, a source for each"
    )
    assert stats.places["skipped"][1].endswith("row 3: prompt is int where text is needed")
