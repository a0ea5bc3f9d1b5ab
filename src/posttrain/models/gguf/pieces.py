"""A BPE vocabulary of SentencePiece's kind (\u2581 for spaces, bytes for what is no token) as llama.cpp has it: with scores."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from posttrain.errors import UserError
from posttrain.models.gguf.spm import NOT_STRIPPING, SPACE, byte_name

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Pieces:
    """scores: one a token. prefix: a space goes before a text. strips: special tokens take the white space after them. scheme:
    how the run's tokenizer puts the space before: always, never, first (of the whole text alone), unless (there is one)."""

    scores: list[float]
    kinds: list[int]
    scheme: str
    strips: bool


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """content: of a tokenizer.json."""
    return content["model"]["type"] == "BPE" and bool(content["model"].get("byte_fallback"))


def pieces_of(content: dict[str, Any], texts: list[str], kinds: list[int], unk: int | None) -> Pieces:
    """texts, kinds: of all rows. Raises UserError where llama.cpp's rule would not give what the merges give."""
    scheme = _scheme(content)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in content["model"]["merges"]]
    scores = _scores(merges)
    found = [_kind(text, kind, scores) for text, kind in zip(texts, kinds, strict=True)]
    if unk is not None:
        found[unk] = int(TokenType.UNKNOWN)
    known = set(texts)
    if missing := [b for b in range(256) if byte_name(b) not in known and not (b < 128 and chr(b) in known)]:
        raise _refused(f"has no token {byte_name(missing[0])}, and llama.cpp needs one for every byte")
    _require_all({text for text, kind in zip(texts, found, strict=True) if kind == TokenType.NORMAL}, set(merges))
    low = -float(len(merges))  # of what no merge makes
    return Pieces([scores.get(text, low) for text in texts], found, scheme, _strips(content["added_tokens"]))


def _scores(merges: list[tuple[str, ...]]) -> dict[str, float]:
    """Of a token minus the rank of the first merge that makes it: that is their order where they are sorted by what they make.

    Runs of one sign may lie among each other, as newer transformers writes those of SentencePiece that have one score: they get
    one again. That this is the same `check_texts` sees, for runs of all lengths.
    """
    made = ["".join(merge) for merge in merges]
    last = {text: rank for rank, text in enumerate(made)}
    found, start, end = dict[str, float](), 0, 0
    for rank, text in enumerate(made):
        start = rank if rank > end else start  # of the stretch of merges whose tokens are made within it
        end = max(end, last[text])
        found[text] = -float(start)
        if end > rank and len(set(text)) > 1 and text != made[rank + 1]:
            raise _refused(f"makes {text!r} by merges of two ranks, with others between: llama.cpp knows one score a token")
    return found


def _require_all(normal: Iterable[str], merges: set[tuple[str, ...]]) -> None:
    """llama.cpp merges any two neighbours that make a token, and a sign that is no token too: so must the merges."""
    known = set(normal)
    for text in known:
        for i in range(1, len(text)):
            both = text[:i], text[i:]
            if both not in merges and all(part in known or len(part) == 1 for part in both):
                raise _refused(f"has no merge of {both[0]!r} and {both[1]!r}, and llama.cpp makes {text!r} of them")


def _kind(text: str, kind: int, made: dict[str, float]) -> int:
    if kind == TokenType.NORMAL and _BYTE.fullmatch(text):
        return int(TokenType.BYTE)
    # found by merges, and as such written out with spaces
    return int(TokenType.NORMAL) if kind == TokenType.USER_DEFINED and SPACE in text and text in made else kind


def _scheme(content: dict[str, Any]) -> str:
    """How a space is put before texts. Raises UserError for anything else that is done to them."""
    model, cutting = content["model"], content["pre_tokenizer"]
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normal = _listed(content["normalizer"], "normalizers")
    cuts = [each for each in _listed(cutting, "pretokenizers") if each != _no_cut() or spaced not in normal]
    odd = any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    if not odd and not cuts and normal == [{"type": "Prepend", "prepend": SPACE}, spaced]:
        return "always"
    if not odd and not cuts and normal == [spaced]:
        return "never"
    if not odd and not normal and len(cuts) == 1 and _is_metaspace(cuts[0], model):
        scheme = str(cuts[0]["prepend_scheme"])
        return "unless" if scheme == "always" else scheme
    raise _refused("changes or cuts texts by more than putting \u2581 for spaces, which llama.cpp does not")


def _is_metaspace(cut: dict[str, Any], model: dict[str, Any]) -> bool:
    whole = not cut.get("split", True) or not any(SPACE in text[1:] for text in model["vocab"])
    return cut["type"] == "Metaspace" and cut["replacement"] == SPACE and whole


def _no_cut() -> dict[str, Any]:
    """Gemma's: by spaces, of which none is left by then."""
    return {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _listed(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def _strips(added: list[dict[str, Any]]) -> bool:
    """llama.cpp has one rule for this, that of Phi-3."""
    strips = {token["content"] for token in added if token["rstrip"]}
    others = {token["content"] for token in added} - strips
    odd = [token["content"] for token in added if token["lstrip"] or token["single_word"]]
    if odd or (strips and (others != set(NOT_STRIPPING) or "</s>" not in strips)):
        raise _refused(f"has tokens that take white space beside them ({(odd or sorted(strips))[0]!r}) otherwise than Phi-3's")
    return bool(strips)


def _refused(why: str) -> UserError:
    return UserError(f"export: this tokenizer {why}; --to hf writes any")
