"""What rows are compared by: a hash of what they say, its runs of words, and signatures that show how many two rows share."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain.data.rows import CanonicalRow

SHINGLE = 5  # words of a run by which rows are nearly the same
RUN = 13  # words in a row that are no accident (Brown et al. 2020, arXiv 2005.14165, appendix C)
SHORTEST = 4  # words of a test row that is looked for as a whole
NUMBERS, BAND = 120, 5  # of a signature; so many of them together make two rows worth a comparison
ALIKE = 0.8  # the share of runs that near duplicates have in common (of all that either has)

_APART = ("weight", "margin", "columns", "first")  # of a canonical row: what it says is in none of these
_UNSAID = (*_APART, "label", "chat_template_kwargs", "role", "tools")  # nor in these, of what is compared word by word
_TURNS = (("prompt", "user"), ("completion", "assistant"), ("chosen", "assistant"), ("rejected", "assistant"))
_SAID = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_random = np.random.default_rng(20)
_FACTORS = _random.integers(1, 2**63, NUMBERS, dtype=np.uint64) | np.uint64(1)
_ADDENDS = _random.integers(0, 2**63, NUMBERS, dtype=np.uint64)


def key_of(row: CanonicalRow) -> int:
    """64 bits of a hash of what a row says; the same for rows that differ in weight, margin or columns of no use, and for texts
    and the messages that they can be rendered as."""
    found = {name: value for name, value in row.items() if name not in _APART}
    for name, role in _TURNS:
        if isinstance(found.get(name), str):
            found[name] = [{"role": role, "content": found[name]}]
    if "completion" in found:
        found["messages"] = [*found.pop("prompt"), *found.pop("completion")]
    said = _SAID.encode(found)
    return int.from_bytes(hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def texts_of(value: Any) -> list[str]:
    """What a row says in words, without roles, system messages and tools, which many rows share."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        if value.get("role") in ("system", "developer"):
            return []
        return [text for name, each in value.items() if name not in _UNSAID for text in texts_of(each)]
    return [text for each in value for text in texts_of(each)] if isinstance(value, list) else []


def words_of(texts: list[str]) -> NDArray[np.uint64]:
    """uint64: a hash of each word, whatever its case; of Chinese, Japanese and Korean each letter is a word."""
    found = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for text in texts for word in _WORD.findall(text.lower())]
    return np.asarray(found, dtype=np.uint64)


def runs_of(words: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """uint64: a hash of each `length` words in a row; none where there are fewer."""
    count = len(words) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for k in range(length):
        found = _mixed(found * np.uint64(0x9E3779B97F4A7C15) + words[k : k + count])
    return found


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def signature_of(words: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """uint32 [NUMBERS] (MinHash; Broder 1997): the share of numbers that two rows have alike estimates the share of runs."""
    runs = runs_of(words, min(SHINGLE, max(len(words), 1)))
    if not len(runs):
        return np.zeros(NUMBERS, np.uint32)
    lowest = np.full(NUMBERS, 2**64 - 1, np.uint64)
    for start in range(0, len(runs), 4096):  # a book is one row too
        lowest = np.minimum(lowest, (runs[start : start + 4096, None] * _FACTORS + _ADDENDS).min(0))
    return (lowest >> np.uint64(32)).astype(np.uint32)


def nearest_before(signatures: NDArray[np.uint32], first_of: int) -> NDArray[np.int64]:
    """int64 [n]: a row before each that it is nearly the same as, -1 where none is found. first_of: rows before it are compared
    with all others, and with none before them."""
    found = np.full(len(signatures), -1, np.int64)
    for start in range(0, NUMBERS, BAND):
        band = runs_of(signatures[:, start : start + BAND].astype(np.uint64).ravel(), BAND)[::BAND]
        order = np.argsort(band, kind="stable")
        begins = np.flatnonzero(np.append(True, band[order[1:]] != band[order[:-1]]))
        head = order[np.repeat(begins, np.diff(begins, append=len(order)))]  # the first of each one's group
        before = np.where(head == order, order, np.roll(order, 1))  # the one just before it there
        for other in (head, before):
            open_ = (found[order] < 0) & (other < order) & (order >= first_of)
            rows, others = order[open_], other[open_]
            for k in range(0, len(rows), 65536):
                some, like = rows[k : k + 65536], others[k : k + 65536]
                alike = (signatures[some] == signatures[like]).mean(1) >= ALIKE
                found[some[alike]] = like[alike]
    return found
