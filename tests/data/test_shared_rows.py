"""Rows that stand in several sources of a mixture: counted by source, left out where asked, and none lost on the way."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.left_out import LeftOut
from posttrain.data.mixture import Mixture, read_mixture
from posttrain.errors import UserError
from posttrain.stages.language.summary import lines_of_data
from posttrain.stages.spec import row_uses

RANDOM = random.Random(5)


def text(words: int) -> str:
    return " ".join(f"word{RANDOM.randrange(3000)}" for _ in range(words))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": each, "id": k}) + "\n" for k, each in enumerate(texts)))
    return path


def mixed(folder: Path, tokenizer: Any, sources: dict[str, list[str]], *words: str) -> tuple[Mixture, list[str]]:
    """And its first lines, without the folder."""
    for name, texts in sources.items():
        write(folder / f"{name}.jsonl", texts)
    told = [f"data.sources.{name}.path={folder}/{name}.jsonl" for name in sources]
    told += [f"data.sources.{name}.share={1 / len(sources)}" for name in sources]
    cfg = validate(compose_run("cpt", ["data=mix", *told, "data.eval_share=0", "train.max_length=2048", *words]))
    found = read_mixture(cfg.data, row_uses()["cpt"], Encoder(tokenizer), 2048, folder / "cache")
    return found, [line.replace(f"{folder}/", "") for line in lines_of_data(cfg, found, tokenizer)]


def rows(mixture: Mixture) -> list[list[int]]:
    return [sorted(set(part.train.rows.tolist())) for part in mixture.parts]


def test_rows_of_several_sources_are_counted_by_source(tmp_path: Path, make_tokenizer: Any) -> None:
    """A repeat within a source is that source's; one that two earlier sources have is the first one's."""
    sources = {"a": ["1", "2", "3", "2"], "b": ["4", "2", "4", "5"], "c": ["5", "1", "6", "2", "6"]}
    found, lines = mixed(tmp_path, make_tokenizer(None), sources)
    stats = [part.stats for part in found.parts]
    assert [each.repeated for each in stats] == [1, 1, 1]
    assert [each.shared for each in stats] == [{}, {"a": 1}, {"a": 2, "b": 1}]
    assert rows(found) == [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    begin = lines.index(next(line for line in lines if line.startswith("data c.jsonl: 5 rows of shape text")))
    assert lines[begin + 1 :] == [
        "  1 rows repeat an earlier one, the first: c.jsonl, row 5; data.dedupe=exact leaves them out",
        "  2 rows are in a as well, the first: c.jsonl, row 2; data.dedupe=exact leaves them out",
        "  1 rows are in b as well, the first: c.jsonl, row 1; data.dedupe=exact leaves them out",
        "  columns not used: id",
        "  the first row, [[trained]]: [[5</s>]]",
    ]


def test_they_are_left_out_of_the_later_source(tmp_path: Path, make_tokenizer: Any) -> None:
    sources = {"a": ["1", "2", "3", "2"], "b": ["4", "2", "4", "5"], "c": ["5", "1", "6", "2", "6"]}
    found, lines = mixed(tmp_path, make_tokenizer(None), sources, "data.dedupe=exact")
    assert rows(found) == [[1, 2, 3], [1, 4], [3]]
    assert [part.stats.shared for part in found.parts] == [{}, {"a": 1}, {"a": 2, "b": 1}]
    assert "  2 rows left out, they are in a as well, the first: c.jsonl, row 2" in lines
    again, _ = mixed(tmp_path, make_tokenizer(None), sources, "data.dedupe=exact")  # from the cache
    assert [part.stats for part in again.parts] == [part.stats for part in found.parts]
    # a change of an earlier source is another key of the later ones
    changed, _ = mixed(tmp_path, make_tokenizer(None), sources | {"a": ["7"]}, "data.dedupe=exact")
    assert rows(changed) == [[1], [1, 2, 4], [2, 3]]


def test_nearly_the_same_in_another_source(tmp_path: Path, make_tokenizer: Any) -> None:
    first = text(120)
    near = " ".join([*first.split()[:10], text(2), *first.split()[12:]])
    own = text(120)
    own_near = " ".join([*own.split()[:10], text(2), *own.split()[12:]])
    sources = {"a": [first, text(100)], "b": [text(100), near, own, own_near]}
    found, lines = mixed(tmp_path, make_tokenizer(None), sources, "data.dedupe=near")
    assert rows(found) == [[1, 2], [1, 3]]
    assert (found.parts[1].stats.near, found.parts[1].stats.shared_near) == (1, {"a": 1})
    assert "  1 rows left out, they are nearly one of a, the first: b.jsonl, row 2" in lines


@pytest.mark.parametrize("dedupe", ["none", "exact"])
def test_rows_of_a_later_source_that_are_held_out_of_the_first(tmp_path: Path, make_tokenizer: Any, dedupe: str) -> None:
    held = write(tmp_path / "held.jsonl", ["2", "9"])
    sources = {"a": ["1", "3"], "b": ["4", "2", "9", "9", "1"]}
    found, lines = mixed(tmp_path, make_tokenizer(None), sources, f"data.eval_path={held}", f"data.dedupe={dedupe}")
    stats = found.parts[1].stats
    assert (stats.also_held, stats.repeated, stats.shared) == (3, 0, {"a": 1})
    assert rows(found) == [[1, 2], [1, 2, 3, 4, 5] if dedupe == "none" else [1]]
    assert any("3 rows" in line and "held out as well" in line and "b.jsonl, row 2" in line for line in lines)


def test_no_row_of_a_later_source_is_held_out(tmp_path: Path, make_tokenizer: Any) -> None:
    """Nothing is measured on it: 64 rows of each vanished."""
    sources = {name: [f"{name} {k}" for k in range(300)] for name in ("a", "b")}
    found, lines = mixed(tmp_path, make_tokenizer(None), sources, "data.eval_share=0.1")
    assert found.held_out_stats.rows > 10 and found.stats.rows + found.held_out_stats.rows == 300
    assert found.parts[1].stats.rows == 300 and len(found.parts[1].held_out) == 0
    dropped, lines = mixed(tmp_path, make_tokenizer(None), sources, "data.eval_share=0.1", "data.eval_rest=drop")
    left = 300 - dropped.parts[1].stats.rows
    assert left > 10 and f"  {left} rows left out, beyond data.eval_rows (data.eval_rest=drop)" in lines  # as version 0.1 did


def test_each_source_is_shown_by_its_first_row(tmp_path: Path, make_tokenizer: Any) -> None:
    _, lines = mixed(tmp_path, make_tokenizer(None), {"a": ["one " * 90], "b": ["two"]})
    shown = [line for line in lines if "the first row" in line]
    assert shown[1] == "  the first row, [[trained]]: [[two</s>]]"
    assert shown[0].startswith("  the first row, [[trained]]: [[one one") and len(shown[0]) == 30 + 100 + 3


def test_test_sets_are_looked_for_in_every_source(tmp_path: Path, make_tokenizer: Any) -> None:
    asked = text(30)
    test = write(tmp_path / "test.jsonl", [asked])
    sources = {"a": [text(40)], "b": [text(40), f"so: {asked}"]}
    found, _ = mixed(tmp_path, make_tokenizer(None), sources, f"data.decontaminate={test}")
    assert rows(found) == [[1], [1]] and [part.stats.known for part in found.parts] == [{}, {str(test): 1}]


def test_only_the_sources_before_are_looked_at(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["1", "2", "2"])
    words = [f"data.sources.{name}.{key}" for name in ("a", "b") for key in (f"path={tmp_path}/{name}.jsonl", "share=0.5")]
    cfg = validate(compose_run("cpt", ["data=mix", *words, "data.dedupe=exact", "data.eval_share=0"]))
    assert LeftOut(cfg.data, row_uses()["cpt"]).of("a").repeated == [3]  # there is no b.jsonl


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path, make_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"all 3 rows of .*b.jsonl are left out by data.dedupe .*; leave the source out"):
        mixed(tmp_path, make_tokenizer(None), {"a": ["1", "2"], "b": ["2", "1", "2"]}, "data.dedupe=exact")
