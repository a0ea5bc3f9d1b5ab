import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.schema import SourceConfig
from posttrain.data.sources.source import fingerprint, is_local, place, read_rows, row_name
from posttrain.errors import UserError

ROWS = [{"text": "one"}, {"text": "zwölf"}]


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"text": "one"}\n\n{"text": "zwölf"}\r\n', [(1, ROWS[0]), (3, ROWS[1])]),
        ("a.jsonl", '\ufeff{"text": "one"}', [(1, ROWS[0])]),
        ("a.ndjson", '{"text": "a\u2028b"}\n', [(1, {"text": "a\u2028b"})]),
        ("a.json", json.dumps(ROWS, indent=1), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.json", "\n".join(map(json.dumps, ROWS)), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.json", '{"messages": [{"role": "user"}]}', [(1, {"messages": [{"role": "user"}]})]),
        (
            "a.csv",
            'text,n\n"one\ntwo",1\nzwölf,2\n',
            [(1, {"text": "one\ntwo", "n": "1"}), (2, {"text": "zwölf", "n": "2"})],
        ),
        ("a.tsv", "text\tn\none, two\t1\n", [(1, {"text": "one, two", "n": "1"})]),
        ("a.txt", "one\ntwo\nthree\n", [(1, {"text": "one"}), (2, {"text": "two"}), (3, {"text": "three"})]),
        ("a.txt", "\none\ntwo\r\n \r\n\nthree\n", [(1, {"text": "one\ntwo"}), (2, {"text": "three"})]),
        ("a.md", "# Title\n\nBody\n", [(1, {"text": "# Title\n\nBody"})]),
    ],
)
def test_reads(tmp_path: Path, name: str, text: str, expected: list[tuple[int, dict[str, str]]]) -> None:
    assert list(read_rows(write(tmp_path / name, text))) == expected


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
COLUMNS = {"prompt": ["q", "r"], "completion": ["a", "b"]}
BY_COLUMNS = [(1, {"prompt": "q", "completion": "a"}), (2, {"prompt": "r", "completion": "b"})]
BY_NUMBER = {name: {"0": values[0], "1": values[1]} for name, values in COLUMNS.items()}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", json.dumps(ROWS, indent=1), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.jsonl", json.dumps(ROWS), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.jsonl", f"{json.dumps(TALK)}\n{json.dumps(TALK)}\n", [(1, {"messages": TALK}), (2, {"messages": TALK})]),
        ("a.json", json.dumps([TALK, TALK], indent=1), [(1, {"messages": TALK}), (2, {"messages": TALK})]),
        ("a.json", json.dumps(TALK), [(1, {"messages": TALK})]),
        ("a.json", json.dumps(COLUMNS), BY_COLUMNS),
        ("a.json", json.dumps(BY_NUMBER), BY_COLUMNS),
        ("a.json", json.dumps({"text": ["one", "zwölf"]}), [(1, ROWS[0]), (2, ROWS[1])]),
        ("a.json", json.dumps({"messages": [TALK, TALK]}), [(1, {"messages": TALK}), (2, {"messages": TALK})]),
        ("a.json", json.dumps({"messages": TALK, "tools": [{}]}), [(1, {"messages": TALK, "tools": [{}]})]),
        ("a.json", json.dumps({"prompt": TALK, "chosen": TALK, "rejected": TALK}),
         [(1, {"prompt": TALK, "chosen": TALK, "rejected": TALK})]),
        ("a.csv", 'text;n\n"one; two";1\ntwo, 3;2\n', [(1, {"text": "one; two", "n": "1"}), (2, {"text": "two, 3", "n": "2"})]),
        ("a.csv", "text\tn\none, two\t1\n", [(1, {"text": "one, two", "n": "1"})]),
        ("a.csv", "text\none; two\n", [(1, {"text": "one; two"})]),
    ],
)  # fmt: skip
def test_layouts_that_people_have(tmp_path: Path, name: str, text: str, expected: list[tuple[int, dict[str, Any]]]) -> None:
    assert list(read_rows(write(tmp_path / name, text))) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"train": [{"text": "a"}], "test": [{"text": "b"}]}, "holds several lists of rows (train, test); save each as a file"),
        ({"prompt": ["a", "b"], "completion": ["c"]}, "its columns are lists of several lengths (prompt 2, completion 1)"),
    ],
)
def test_an_object_that_is_no_rows_is_named_for_what_it_is(tmp_path: Path, text: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        list(read_rows(write(tmp_path / "a.json", json.dumps(text))))
    assert says in str(error.value)


@pytest.mark.parametrize("block", [7, 2**20])
@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a": }]', "line 3: not valid JSON (Expecting value: column 7)"),
        ('[\n\n{"a": 1},\n{"a": 2}', "line 4: not valid JSON (expecting ',' or ']': column 9)"),
        ('[{"a": 1},\n{"a": 2}]\n[{"a": 3}]', "line 3: not valid JSON (extra data after the list: column 1)"),
        ('[{"a": 1},\n{"a": ' + "[" * 100_000, "line 2: not valid JSON that can be read (nested too deep)"),
        ('[{"role": "user",\n "content": "q"}]', " is one conversation, a list of messages"),
    ],
)
def test_the_line_of_a_mistake_in_a_list_is_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, at: str, block: int
) -> None:
    for module in ("lines", "json_rows"):
        monkeypatch.setattr(f"posttrain.data.sources.{module}.BLOCK", block)
    with pytest.raises(UserError) as error:
        list(read_rows(write(tmp_path / "a.json", text)))
    assert at in str(error.value)


def test_several_sources_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Each row is named by its own file, and the name of the data is that of all of them in this order."""
    (tmp_path / "d").mkdir()
    files = [write(tmp_path / name, json.dumps(row)) for name, row in zip(("a.jsonl", "b.json"), ROWS, strict=True)]
    for name in ("1.jsonl", "2.jsonl"):
        write(tmp_path / "d" / name, json.dumps({"text": name}))
    path = SourceConfig(path=[files[0], str(tmp_path / "d"), files[1]]).path  # type: ignore[arg-type, call-arg]
    assert path == f"{files[0]} + {tmp_path / 'd'} + {files[1]}"
    found = list(read_rows(path))
    assert [row for _, row in found] == [ROWS[0], {"text": "1.jsonl"}, {"text": "2.jsonl"}, ROWS[1]]
    places = [files[0], f"{tmp_path}/d/1.jsonl", f"{tmp_path}/d/2.jsonl", files[1]]
    assert [row_name(path, number) for number, _ in found] == [f"{place}, row 1" for place in places]
    assert fingerprint(path) != fingerprint(" + ".join(path.split(" + ")[::-1])) != fingerprint(files[0])
    assert is_local(path) and not is_local(f"{files[0]} + org/name")


@pytest.mark.parametrize("path", [[], ["a.jsonl", "builtin:questions"], ["self", "a.jsonl"]])
def test_what_stands_alone_is_no_part_of_a_list(path: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"stands alone|the list is empty"):
        SourceConfig(path=path)  # type: ignore[arg-type, call-arg]


def test_reads_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert list(read_rows(str(tmp_path / "a.parquet"))) == [(1, ROWS[0]), (2, ROWS[1])]


def test_csv_cells_may_be_long(tmp_path: Path) -> None:
    ((_, row),) = read_rows(write(tmp_path / "a.csv", "text\n" + "x" * 200_000))
    assert isinstance(row, dict) and len(row["text"]) == 200_000


def test_reads_built_in_sets() -> None:
    number, row = next(read_rows("builtin:general", split="eval"))
    assert number == 1 and isinstance(row, dict) and list(row) == ["text"]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b"", "a.jsonl: is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: is empty"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            "a.jsonl, line 2: not UTF-8 (byte 0xe9 at place 11 of the line)",
        ),
        ("a.jsonl", b"\xff\xfe\x00" * 50, "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, row 2: is a list, not an object"),
        ("a.json", b'["b"]', "a.json, row 1: is a text, not an object"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "a.json, line 2: not valid JSON"),
        ("a.json", b'{"text": "a"}\n{"text": \n', "a.json, line 2: not valid JSON"),
        ("a.json", b"[]", "a.json: is empty"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: has 1 cells where the header has 2"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv, line 2: has 3 cells where the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"a,b\n", "a.csv: is empty"),
        ("a.parquet", b"PAR2", "a.parquet: not valid Parquet"),
        ("a.txt", b"\n\n", "a.txt: is empty"),
        ("a.docx", b"x", "unknown extension '.docx'; read are .jsonl"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(str(tmp_path / name)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_missing_file_names_a_near_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(UserError, match=r"no such file - did you mean 'train\.jsonl'"):
        list(read_rows(str(tmp_path / "trian.jsonl")))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{}")
    os.chmod(path, 0)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (ConnectionError("offline mode is enabled"), "cannot reach the hub .* give a local file"),
        (ValueError("Unknown split \"tran\". Should be one of ['train']."), r"data\.split: .*'tran'.*\['train'\]"),
        (ValueError("Config name is missing. Please pick one"), r"data\.subset: "),
        (RuntimeError("two\nlines"), r"data\.path: cannot load org/name from the hub \(RuntimeError: two lines\)"),
    ],
)
def test_trouble_with_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, raised: Exception, says: str) -> None:
    def load_dataset_builder(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match=says) as error:
        list(read_rows("org/name", split="tran"))
    assert "\n" not in str(error.value)


def test_place_is_of_the_content() -> None:
    text = '{"a": "ü", "b": 1}'
    expected = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12
    assert place({"b": 1, "a": "ü"}) == expected


def test_a_column_that_holds_nothing_does_not_move_a_row() -> None:
    """Of the same rows as JSONL and as Parquet, the same are held out."""
    assert place({"text": "a", "note": None}) == place({"text": "a"}) != place({"text": "a", "note": ""})


def test_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    assert fingerprint(path) == hashlib.sha256(b'{"text": "a"}\n').hexdigest()
    assert fingerprint("builtin:general") != fingerprint("builtin:reference")
    with pytest.raises(UserError, match="no such file"):
        fingerprint(str(tmp_path / "b.jsonl"))
    with pytest.raises(UserError, match="did you mean 'general'"):
        fingerprint("builtin:generel")
