"""Rows of JSON: a value a line, a list of them, or columns that are lists."""

from __future__ import annotations

import codecs
import json
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data.sources.columnar import ParsedRows
from posttrain.data.sources.lines import BLOCK, LONGEST_LINE, blocks, lines, sound
from posttrain.errors import UserError

_CONVERSATIONS = ("messages", "conversations", "prompt")


def is_conversation(value: Any) -> bool:
    """Is it a list of messages? Then it is a row, and not a list of rows."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from"})


def _parsed(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        return UserError(f"{name}, line {number}: not valid JSON that can be read (nested too deep)")
    except ValueError as error:
        return UserError(f"{name}, line {number}: not valid JSON ({error})")


def jsonl_rows(file: Path, name: str, compression: str) -> ParsedRows:
    """A row a line, which may be a list of messages; a file that is one list all the same is read as such."""
    if _is_list(_openings(file, name, compression)):
        yield from _Elements(file, name, compression)
        return
    for number, line in lines(file, name, compression):
        if isinstance(line, UserError):
            yield number, line
        elif line.strip():
            yield number, _parsed(line, name, number)


def json_rows(file: Path, name: str, compression: str) -> ParsedRows:
    """A list is read element by element; an object whole, unless each line is one: then it is JSONL."""
    first = _openings(file, name, compression)
    if _is_list(first) or (len(first) == 2 and not isinstance(_parsed(first[0], name, 1), UserError)):
        yield from jsonl_rows(file, name, compression)
        return
    if first and is_conversation(_parsed(first[0], name, 1)):
        yield 1, _parsed(first[0], name, 1)
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
    yield from enumerate(_rows_of(value, name) if isinstance(value, dict) else [value], 1)


def _openings(file: Path, name: str, compression: str) -> list[str]:
    """The first two lines that are not blank, or fewer where one is no text."""
    found = (line for _, line in lines(file, name, compression) if isinstance(line, UserError) or line.strip())
    return [line for line in islice(found, 2) if isinstance(line, str)]


def _is_list(first: list[str]) -> bool:
    """Does a file with these lines begin a list of rows?"""
    return bool(first) and first[0].lstrip().startswith("[") and not is_conversation(_parsed(first[0], "", 1))


def _rows_of(value: dict[str, Any], name: str) -> list[Any]:
    """The rows of one object: those of the only list of objects in it, of its columns where all are lists as long, or it is a row
    itself. Raises UserError for several lists of objects, and for columns of several lengths."""
    lists = {key: each for key, each in value.items() if isinstance(each, list)}
    if any(is_conversation(each) or (key in _CONVERSATIONS and _of_objects(each)) for key, each in lists.items()):
        return [value]
    tables = [key for key, each in lists.items() if _of_objects(each)]
    if len(tables) > 1:
        raise UserError(f"{name}: holds several lists of rows ({', '.join(tables)}); save each as a file of its own")
    if tables or (len(lists) == 1 and len(value) > 1):
        return lists[tables[0]] if tables else next(iter(lists.values()))
    indexed = {key: list(each.values()) for key, each in value.items() if isinstance(each, dict) and "0" in each}
    columns = lists or indexed  # pandas' to_json writes columns by the rows' numbers
    if not columns or len(columns) != len(value):
        return [value]
    if len({len(each) for each in columns.values()}) > 1:
        lengths = ", ".join(f"{key} {len(each)}" for key, each in columns.items())
        raise UserError(f"{name}: its columns are lists of several lengths ({lengths}); save a list of rows")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _of_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(each, dict) for each in values)


class _Elements:
    """The elements of a JSON list, of which only one is in memory."""

    def __init__(self, file: Path, name: str, compression: str) -> None:
        self.name, self.line, self.text, self.at, self.ended = name, 1, "", 0, False
        self.letters = 0  # of the line at which the text begins, before it
        self.blocks = blocks(file, name, compression)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def __iter__(self) -> ParsedRows:
        number, separator = 1, "["
        while self._next_letter() == separator:
            self.at += 1
            if number == 1 and self._next_letter() == "]":
                break
            value = self._element()
            if number == 1 and is_conversation([value]):
                raise UserError(
                    f"{self.name}: is one conversation, a list of messages; save a list of conversations, or one a line"
                )
            yield number, value
            number, separator = number + 1, ","
        if self._next_letter() != "]":
            raise self._wrong("expecting ',' or ']'", self.at)
        self.at += 1
        if self._next_letter():
            raise self._wrong("extra data after the list", self.at)

    def _more(self) -> bool:
        """Read on; what is done with goes. False at the end of the file."""
        cut = self.text[: self.at]
        self.line += cut.count("\n")
        self.letters = len(cut) - cut.rfind("\n") - 1 + (0 if "\n" in cut else self.letters)
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
                length = end - self.at  # to read on cuts off what is done with
                if end < len(self.text) or not self._more():
                    self.at += length
                    return value
            except RecursionError:
                line = self.line + self.text.count("\n", 0, self.at)
                raise UserError(f"{self.name}, line {line}: not valid JSON that can be read (nested too deep)") from None
            except json.JSONDecodeError as error:
                length = error.pos - self.at
                if len(self.text) - self.at > LONGEST_LINE or not self._more():
                    raise self._wrong(error.msg, self.at + length) from error

    def _wrong(self, what: str, at: int) -> UserError:
        line = self.line + self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) + (0 if "\n" in self.text[:at] else self.letters)
        return UserError(f"{self.name}, line {line}: not valid JSON ({what}: column {column})")
