"""Rows of one file, read as they are needed, whatever its kind and compression; a bad row is told apart from a bad file."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from posttrain.data.rows import Row
from posttrain.data.sources.columnar import ParsedRows, arrow_rows, parquet_rows
from posttrain.data.sources.json_rows import is_conversation, json_rows, jsonl_rows
from posttrain.data.sources.lines import COMPRESSIONS, LONGEST_LINE, lines, reading, sound, zip_member
from posttrain.errors import UserError

NumberedRow = tuple[int, Row | UserError]  # number in the source from 1; the row, or what is wrong with this one alone

LOOKED_AT = 2**20  # letters of a text file in which a blank line decides what a document is


def file_rows(file: Path, name: str) -> Iterator[NumberedRow]:
    """Rows of a local file that exists and whose kind is known. Raises UserError for a file that cannot be read on."""
    empty, (kind, compression) = True, kind_of(file)
    with reading(name):
        for number, row in READERS[kind](file, name, compression):
            if is_conversation(row):
                row = {"messages": row}
            if not isinstance(row, dict | UserError):
                row = UserError(f"{name}, row {number}: is {_kind(row)}, not an object with columns")
            empty = False
            yield number, row
    if empty:
        raise UserError(f"{name}: is empty; give a file with at least one row")


def kind_of(file: Path) -> tuple[str, str]:
    """(.jsonl, .gz) of rows.jsonl.gz: the kind, empty where it is not known, and the compression, empty where there is none.
    The name of an archive need not say the kind: the file in it does."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if packed == ".zip" and not (suffixes and suffixes[-1] in READERS):
        with reading(str(file)):
            suffixes = [Path(zip_member(file)).suffix.lower()]
    kind = suffixes[-1] if suffixes and suffixes[-1] in READERS else ""
    return (kind, packed) if not packed or kind not in _WHOLE else ("", packed)


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _separated(delimiter: str) -> Callable[[Path, str, str], ParsedRows]:
    def read(file: Path, name: str, compression: str) -> ParsedRows:
        csv.field_size_limit(LONGEST_LINE)  # csv's own limit of 128 KiB is less than many a document
        found = sound(lines(file, name, compression))
        header = next(found, "")
        reader = csv.DictReader(chain([header], found), delimiter=_delimiter(header, delimiter), strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    cells = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
                    names = len(reader.fieldnames or [])
                    said = f"{name}, line {reader.line_num}: has {cells} cells where the header has {names}"
                    yield number, UserError(said)
                else:
                    yield number, row
        except csv.Error as error:
            raise UserError(f"{name}, line {reader.line_num + 1}: not valid CSV ({error})") from error

    return read


def _delimiter(header: str, usual: str) -> str:
    """What parts a header without the usual separator: spreadsheets of many languages write a semicolon."""
    return usual if usual in header else next((each for each in ";\t" if each in header), usual)


def _text(file: Path, name: str, compression: str) -> ParsedRows:
    """With a blank line within the first LOOKED_AT letters a document is what stands between them, else each line is one."""
    return (_paragraphs if _is_parted(file, name, compression) else _each_line)(file, name, compression)


def _is_parted(file: Path, name: str, compression: str) -> bool:
    looked, words, gap = 0, False, False
    for _, line in lines(file, name, compression):
        if isinstance(line, UserError) or line.strip():
            if gap:
                return True
            words = True
        gap = words and not isinstance(line, UserError) and not line.strip()
        looked += len(line) if isinstance(line, str) else 0
        if looked > LOOKED_AT:
            break
    return False


def _each_line(file: Path, name: str, compression: str) -> ParsedRows:
    number = 0
    for _, line in lines(file, name, compression):
        if isinstance(line, UserError) or line.strip():
            number += 1
            yield number, line if isinstance(line, UserError) else {"text": line.rstrip("\r\n")}


def _paragraphs(file: Path, name: str, compression: str) -> ParsedRows:
    number, words, wrong = 1, list[str](), list[UserError]()
    for _, line in chain(lines(file, name, compression), [(0, "")]):
        if isinstance(line, UserError):
            wrong.append(line)
        elif line.strip():
            words.append(line.replace("\r\n", "\n"))
        elif words or wrong:
            yield number, wrong[0] if wrong else {"text": "".join(words).strip()}
            number, words, wrong = number + 1, [], []


def _document(file: Path, name: str, compression: str) -> ParsedRows:
    if text := "".join(sound(lines(file, name, compression))).strip():
        yield 1, {"text": text}


READERS: dict[str, Callable[[Path, str, str], ParsedRows]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".txt": _text,
    ".md": _document,
    ".rst": _document,
}
_WHOLE = (".parquet", ".arrow")  # compressed within, read at any place
KNOWN = re.compile(rf".*({'|'.join(map(re.escape, READERS))})({'|'.join(map(re.escape, COMPRESSIONS))})?", re.IGNORECASE)
