"""Rows of one file, read as they are needed, whatever its kind and compression; a bad row is told apart from a bad file."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from posttrain.data.rows import Row
from posttrain.data.sources.columnar import ParsedRows, arrow_rows, parquet_rows
from posttrain.data.sources.lines import BLOCK, COMPRESSIONS, LONGEST_LINE, blocks, lines, reading, sound, zip_member
from posttrain.errors import UserError

NumberedRow = tuple[int, Row | UserError]  # number in the source from 1; the row, or what is wrong with this one alone

LOOKED_AT = 2**20  # letters of a text file in which a blank line decides what a document is
CONVERSATION_COLUMNS = ("messages", "conversations", "prompt")


def file_rows(file: Path, name: str) -> Iterator[NumberedRow]:
    """Rows of a local file that exists and whose kind is known. Raises UserError for a file that cannot be read on."""
    empty, (kind, compression) = True, kind_of(file)
    with reading(name):
        for number, row in READERS[kind](file, name, compression):
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


def _parsed(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        return UserError(f"{name}, line {number}: not valid JSON that can be read (nested too deep)")
    except ValueError as error:
        return UserError(f"{name}, line {number}: not valid JSON ({error})")


def _jsonl(file: Path, name: str, compression: str) -> ParsedRows:
    for number, line in lines(file, name, compression):
        if isinstance(line, UserError):
            yield number, line
        elif line.strip():
            yield number, _parsed(line, name, number)


def _json(file: Path, name: str, compression: str) -> ParsedRows:
    """A list is read element by element; an object whole, unless each line is one: then it is JSONL."""
    first = [line for _, (_, line) in zip(range(2), lines(file, name, compression), strict=False)]
    opening = first[0].lstrip() if first and isinstance(first[0], str) else ""
    if opening.startswith("["):
        yield from _Elements(file, name, compression)
        return
    if len(first) == 2 and not isinstance(_parsed(opening or "?", name, 1), UserError):
        yield from _jsonl(file, name, compression)
        return
    text = "".join(sound(lines(file, name, compression)))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name}: not valid JSON that can be read (nested too deep)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}: column {error.colno})") from error
    if isinstance(value, dict):
        lists = [v for k, v in value.items() if isinstance(v, list) and k not in CONVERSATION_COLUMNS]
        value = lists[0] if len(lists) == 1 else [value]
    yield from enumerate(value if isinstance(value, list) else [value], 1)


class _Elements:
    """The elements of a JSON list, of which only one is in memory."""

    def __init__(self, file: Path, name: str, compression: str) -> None:
        self.name, self.line, self.text, self.at, self.ended = name, 1, "", 0, False
        self.blocks = blocks(file, name, compression)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def __iter__(self) -> ParsedRows:
        number, separator = 1, "["
        while self._next_letter() == separator:
            self.at += 1
            if number == 1 and self._next_letter() == "]":
                return
            yield number, self._element()
            number, separator = number + 1, ","
        if self._next_letter() != "]":
            raise self._wrong("expecting ',' or ']'", self.at)

    def _more(self) -> bool:
        """Read on; what is done with goes. False at the end of the file."""
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        before = len(self.text)
        while not self.ended and len(self.text) < max(2 * before, BLOCK):
            block = next(self.blocks, b"")
            self.ended = not block
            try:
                self.text += self.decoder.decode(block, final=self.ended)
            except UnicodeDecodeError as error:
                line = self.line + self.text.count("\n") + block.count(b"\n", 0, error.start)
                raise UserError(f"{self.name}, line {line}: not UTF-8; save the file as UTF-8") from error
        return len(self.text) > before

    def _next_letter(self) -> str:
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _element(self) -> Any:
        while True:
            self._next_letter()
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():
                    self.at = end
                    return value
            except RecursionError:
                raise UserError(f"{self.name}, line {self.line}: not valid JSON that can be read (nested too deep)") from None
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LONGEST_LINE or not self._more():
                    raise self._wrong(error.msg, error.pos) from error

    def _wrong(self, what: str, at: int) -> UserError:
        line = self.line + self.text.count("\n", 0, at)
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        return UserError(f"{self.name}, line {line}: not valid JSON ({what}: column {column})")


def _separated(delimiter: str) -> Callable[[Path, str, str], ParsedRows]:
    def read(file: Path, name: str, compression: str) -> ParsedRows:
        csv.field_size_limit(LONGEST_LINE)  # csv's own limit of 128 KiB is less than many a document
        reader = csv.DictReader(sound(lines(file, name, compression)), delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    cells = sum(v is not None for k, v in row.items() if k is not None) + len(row.get(None) or [])
                    header = len(reader.fieldnames or [])
                    said = f"{name}, line {reader.line_num}: has {cells} cells where the header has {header}"
                    yield number, UserError(said)
                else:
                    yield number, row
        except csv.Error as error:
            raise UserError(f"{name}, line {reader.line_num + 1}: not valid CSV ({error})") from error

    return read


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
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
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
