"""Files of every kind, and what is wrong with some: named by file and row, or counted and skipped."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.template_text import CHATML
from posttrain.data.prepare import PreparedSource, prepare
from posttrain.data.sources.source import fingerprint, read_rows, row_name
from posttrain.errors import UserError
from posttrain.stages.spec import row_uses

ROWS = [{"text": f"This is row {i}, zwölf."} for i in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(data, "zstd", asbytes=True)


def zipped(*files: tuple[str, bytes]) -> bytes:
    with (out := io.BytesIO()), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", "")
        for name, data in [*files, ("__MACOSX/._rows", b"of the Finder")]:
            archive.writestr(name, data)
        archive.close()
        return out.getvalue()


def locked(archive: bytes) -> bytes:
    """The same, said to need a password."""
    first, *entries = archive.split(b"PK\1\2")
    return b"PK\1\2".join([first, *(entry[:4] + bytes([entry[4] | 1]) + entry[5:] for entry in entries)])


PACKS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, ".zip": lambda data: zipped(("x", data))}


@pytest.mark.parametrize(("suffix", "pack"), PACKS.items())
def test_compressed(tmp_path: Path, suffix: str, pack: Any) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(LINES))
    assert [row for _, row in read_rows(str(tmp_path / f"a.jsonl{suffix}"))] == ROWS
    (tmp_path / f"b.json{suffix}").write_bytes(pack(json.dumps(ROWS).encode()))
    assert [row for _, row in read_rows(str(tmp_path / f"b.json{suffix}"))] == ROWS


def test_an_archive_of_one_file_says_its_kind_within(tmp_path: Path) -> None:
    (tmp_path / "rows.zip").write_bytes(zipped(("folder/rows.jsonl", LINES)))
    assert [row for _, row in read_rows(str(tmp_path / "rows.zip"))] == ROWS
    (tmp_path / "rows.zip").write_bytes(zipped(("folder/rows.exe", LINES)))
    with pytest.raises(UserError, match=r"unknown extension '\.zip'"):
        list(read_rows(str(tmp_path / "rows.zip")))


def test_a_field_that_an_object_does_not_have_is_no_null(tmp_path: Path) -> None:
    """A column gives every call all arguments of any: what a template would write as null."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [{"z": 0}, {"w": ""}]}}]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "id": None} for call in calls]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "a.parquet"))] == rows
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read_rows(str(tmp_path / "saved"))] == rows


def test_a_directory_and_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "notes.pdf").write_text("no rows")
    found = list(read_rows(str(tmp_path)))
    assert [row for _, row in found] == ROWS + ROWS
    assert row_name(str(tmp_path), found[1][0]) == f"{tmp_path}/a.jsonl, row 2"
    assert row_name(str(tmp_path), found[51][0]) == f"{tmp_path}/sub/b.jsonl.gz, row 2"
    assert list(read_rows(f"{tmp_path}/*.jsonl")) == list(read_rows(str(tmp_path / "a.jsonl")))
    before = fingerprint(str(tmp_path))
    (tmp_path / "c.jsonl").write_bytes(LINES)
    assert fingerprint(str(tmp_path)) != before
    with pytest.raises(UserError, match="no file is of this pattern"):
        list(read_rows(f"{tmp_path}/*.csv"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="without a file that is read"):
        list(read_rows(str(tmp_path / "none")))


def test_arrow_and_what_datasets_saves(tmp_path: Path) -> None:
    import pyarrow
    from datasets import Dataset, DatasetDict

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("stream.arrow", "file.arrow"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == ROWS
    data = Dataset.from_list(ROWS)
    data.select([3, 1]).save_to_disk(tmp_path / "one")
    assert list(read_rows(str(tmp_path / "one"))) == [(1, ROWS[3]), (2, ROWS[1])]
    DatasetDict({"test": data}).save_to_disk(tmp_path / "several")
    assert len(list(read_rows(str(tmp_path / "several"), split="test"))) == 50
    with pytest.raises(UserError, match=r"data\.split: .* has no split 'train' \(there are: test\)"):
        list(read_rows(str(tmp_path / "several")))


@pytest.mark.parametrize("offsets_of_two", [(0, 5, 2), (0, 5, 2**31 - 1), (-(2**30), 0, 5)])
def test_arrow_whose_texts_lie_elsewhere_is_named(offsets_of_two: tuple[int, ...], tmp_path: Path) -> None:
    """pyarrow checks no offsets by itself. It would raise an error that is not its own, read what lies there, or crash."""
    import pyarrow

    table = pyarrow.table({"text": ["abcde", "fg"]})
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    sound, damaged = struct.pack("<3i", 0, 5, 7), struct.pack("<3i", *offsets_of_two)
    assert sink.getvalue().count(sound) == 1
    (tmp_path / "a.arrow").write_bytes(sink.getvalue().replace(sound, damaged))
    with pytest.raises(UserError, match=r"a.arrow: not valid Arrow \(.*"):
        list(read_rows(str(tmp_path / "a.arrow")))


def test_a_list_of_json_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "json_rows"):  # borders within words, numbers and letters of two bytes
        monkeypatch.setattr(f"posttrain.data.sources.{module}.BLOCK", 7)
    (tmp_path / "a.json").write_text(json.dumps([{"n": i, "t": 'zwölf \\ "]'} for i in range(30)], ensure_ascii=False))
    assert [row for _, row in read_rows(str(tmp_path / "a.json"))] == [{"n": i, "t": 'zwölf \\ "]'} for i in range(30)]
    for text, line in (('[{"a": 1},\n{"a": }]', 2), ('[{"a": 1}\n\n{"a": 2}]', 3), ('[{"a": 1},\n', 2)):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=f"b.json, line {line}: not valid JSON"):
            list(read_rows(str(tmp_path / "b.json")))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "a.jsonl.gz: not a whole compressed file"),
        ("a.jsonl.gz", LINES, "a.jsonl.gz: not a whole compressed file"),
        ("a.jsonl", b'{"text": "' + b"x" * 20_000_000 + b'"}\n', "a.jsonl, line 1: is longer than 16 MB"),
        ("a.jsonl.gz", gzip.compress(b"\0" * 30_000_000), "a.jsonl.gz, line 1: is longer than 16 MB"),
        ("a.jsonl.gz", gzip.compress((b'{"text": "' + b"x" * 9999 + b'"}\n') * 8000), "as a decompression bomb does"),
        ("a.json", b'[{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "nested too deep"),
        ("a.parquet.gz", b"x", "unknown extension"),
        ("a.jsonl.zip", LINES, "a.jsonl.zip: not a whole compressed file"),
        ("a.zip", LINES, "a.zip: not a whole compressed file"),
        ("a.jsonl.zip", zipped(("x", LINES), ("y", LINES)), "a.jsonl.zip: holds 2 files where one is read; unpack it"),
        ("a.jsonl.zip", zipped(("x", LINES))[:40] + b"???" + zipped(("x", LINES))[43:], "not a whole compressed file"),
        ("a.jsonl.zip", locked(zipped(("x", LINES))), "a.jsonl.zip: needs a password; unpack it"),
        ("a.jsonl.zip", zipped(("x", b"\0" * 30_000_000)), "a.jsonl.zip, line 1: is longer than 16 MB"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_rows(str(tmp_path / name)))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def encoder(make_tokenizer: Any) -> Encoder:
    return Encoder(make_tokenizer(CHATML, ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>"))


def prepared(tmp_path: Path, encoder: Encoder, lines: list[bytes], stage: str, *words: str) -> PreparedSource:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    data = validate(compose_run(stage, [f"data.path={path}", "data.eval_share=0", *words])).data
    return prepare(data, row_uses()[stage], encoder, 64, tmp_path / "cache")[0]


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "words"} for role in roles]}


BAD = [
    ("sft", b"\xff\xfe not text", "line 4: not UTF-8"),
    ("sft", b'{"messages": [', "line 4: not valid JSON"),
    ("sft", json.dumps({"other": 1}).encode(), "row 4: has no messages or conversations"),
    ("sft", json.dumps(chat("assistant", "user")).encode(), "row 4: messages[0] is the assistant's, where a conversation begins"),
    ("sft", json.dumps(chat("user", "user", "assistant")).encode(), "row 4: messages[1] is the user's turn a second time"),
    ("sft", json.dumps(chat("user", "system", "assistant")).encode(), "row 4: messages[1] is a system message"),
    ("sft", json.dumps(chat("user")).encode(), "row 4: has no assistant's turn"),
    ("sft", b'{"messages": [{"role": "user", "content": NaN}]}', "row 4: content of messages[0] is NaN"),
    ("sft", b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "line 4: not valid JSON that can be read (nested too deep)"),
    ("dpo", json.dumps({"prompt": "q", "chosen": "a", "rejected": "a"}).encode(), "row 4: chosen and rejected are the same"),
]


@pytest.mark.parametrize(("stage", "line", "says"), BAD)
def test_a_bad_row_is_named_or_counted_and_skipped(
    tmp_path: Path, encoder: Encoder, stage: str, line: bytes, says: str
) -> None:  # fmt: skip
    good = chat("user", "assistant") if stage == "sft" else {"prompt": "q", "chosen": "a", "rejected": "b"}
    lines = [json.dumps(good | {"id": i}).encode() for i in range(6)]
    lines.insert(3, line)
    with pytest.raises(UserError) as error:
        prepared(tmp_path, encoder, lines, stage)
    assert says in str(error.value) and str(tmp_path / "rows.jsonl") in str(error.value)
    part = prepared(tmp_path, encoder, lines, stage, "data.on_error=skip")
    assert (part.stats.rows, part.stats.skipped) == (6, 1)
    assert says in part.stats.places["skipped"][0]
    assert part.train.rows.tolist() == [1, 2, 3, 5, 6, 7]


def test_a_bad_row_far_on_is_named_though_it_is_read_in_another_process(
    tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("posttrain.data.overlaps.PIECE", 64)
    lines = [json.dumps({"text": f"row {i}"}).encode() for i in range(1, 1001)]
    part = prepared(tmp_path, encoder, lines, "cpt")
    assert part.stats.rows == 1000 and part.train.rows.tolist() != list(range(1, 1001))  # grouped to fill their units
    assert sorted(part.train.rows.tolist()) == list(range(1, 1001))
    lines[699] = b'{"body": "no text"}'
    with pytest.raises(UserError, match=r"rows\.jsonl, row 700: has no text or content"):
        prepared(tmp_path, encoder, lines, "cpt")
    assert not list((tmp_path / "cache" / "data").glob(".*"))  # nothing half written is left
