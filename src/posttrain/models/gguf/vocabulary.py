"""A tokenizer as llama.cpp has it: token texts and kinds, and merges with the name of the rule that cuts a text, or scores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, Keys, TokenType

from posttrain.errors import UserError
from posttrain.models.gguf.pieces import Pieces, is_sentencepiece, pieces_of

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_LAST = ("ByteLevel", False)
# how a text is cut, as tokenizers has it, and whether a word that is a token is one without merges -> llama.cpp's name for it
RULES = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", _WORDS % r"\p{N}"), _LAST), False): "qwen2",
    ((("Split", _WORDS % r"\p{N}{1,3}"), _LAST), True): "llama-bpe",
    ((("Split", _WORDS % r"\p{N}{1,3}"), _LAST), False): "dbrx",
    ((("Split", _CASED % ("", "", "")), _LAST), True): "tekken",
    ((("Split", _CASED % ("", "", "")), _LAST), False): "tekken",
    ((("Split", _CASED % (_SHORT, _SHORT, "{1,3}")), _LAST), False): "gpt-4o",
    ((("Punctuation", "Contiguous"), ("ByteLevel", True), ("Digits", False), ("Split", "[0-9][0-9][0-9]")), False): "falcon",
}

NO_RULE = "default"  # of a vocabulary with scores, which are all the rule that there is


@dataclass(frozen=True)
class Vocabulary:
    """texts, kinds: one a row of the embedding; a row without a token has a text of its own. rule: of RULES. ends: where
    answers stop. begin, close: whether a text begins with `bos`, ends with eos by itself. template: the chat template's text.
    talks: texts by it come first, where not all can be cut as the run's tokenizer does. beyond: added tokens that the embedding
    has no row for, as Gemma 3's of text alone has none for pictures: left out. composes: texts are made NFC first, which GGUF
    has no place for. pieces: of a vocabulary of SentencePiece's kind, which has neither merges nor rule."""

    texts: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str
    ends: list[int]
    bos: int | None
    pad: int | None
    unk: int | None
    begin: bool
    close: bool
    template: str | None
    talks: bool
    beyond: list[str]
    composes: bool
    pieces: Pieces | None = None

    @property
    def prefix(self) -> bool:
        """Does llama.cpp put a space before texts? Where that is done before a whole text alone, it cannot do the same: then not
        in conversations, which begin with a special token."""
        scheme = self.pieces.scheme if self.pieces else "never"
        return not self.talks if scheme == "first" else scheme != "never"

    @property
    def others(self) -> dict[str, int]:
        """The places for stop tokens beside the first, as far as they go."""
        return dict(zip((Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID), self.ends[1:], strict=False))

    def write(self, writer: GGUFWriter) -> None:
        """Into the file's metadata."""
        writer.add_tokenizer_model("llama" if self.pieces else "gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.texts)
        writer.add_token_types(self.kinds)
        if self.pieces:
            writer.add_token_scores(self.pieces.scores)
            writer.add_add_space_prefix(self.prefix)
            writer.add_remove_extra_whitespaces(False)
        else:
            writer.add_token_merges(self.merges)
        writer.add_add_bos_token(self.begin)
        writer.add_add_eos_token(self.close)
        writer.add_eos_token_id(self.ends[0])
        for place, token in self.others.items():
            writer.add_uint32(place, token)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        if self.pieces and self.unk is not None:
            writer.add_unk_token_id(self.unk)
        if self.template:
            writer.add_chat_template(self.template)


def vocabulary_of(tokenizer: Any, ends: list[int], rows: int, talks: bool = True) -> Vocabulary:
    """rows: of the embedding. ends: where the model stops. talks: was it trained on what the chat template writes?

    Raises UserError for what llama.cpp would tokenize otherwise.
    """
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise UserError("export: this tokenizer has no tokenizer.json, so its merges are not known; --to hf writes any")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, apart = content["model"], is_sentencepiece(content)
    rule = NO_RULE if apart else _rule(content)
    texts, kinds = [f"[PAD{i}]" for i in range(rows)], [int(TokenType.UNUSED)] * rows
    added = {token["id"]: token for token in content["added_tokens"]}
    entries = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    beyond = {i: text for i, text in entries.items() if i >= rows}
    if cut := [i for i in beyond if i not in added]:
        raise UserError(f"export: token {entries[cut[0]]!r} has id {cut[0]}, and the model has {rows} rows for tokens")
    for i, text in entries.items() - beyond.items():
        special = TokenType.CONTROL if i in added and added[i]["special"] else TokenType.USER_DEFINED
        texts[i], kinds[i] = text, int(special if i in added else TokenType.NORMAL)
    stops = ends or [i for i in [tokenizer.eos_token_id] if i is not None]
    if not stops:
        raise UserError("export: the model has no token at which it stops, and llama.cpp needs one; give the tokenizer an eos")
    own = [i for i in stops if i == tokenizer.eos_token_id]
    x, bos, eos = tokenizer("x").input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id
    named = tokenizer.chat_template  # some have several, by name
    template = named.get("default") if isinstance(named, dict) else named
    pieces = pieces_of(content, texts, kinds, tokenizer.unk_token_id) if apart else None
    merges = [] if apart else [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        texts, pieces.kinds if pieces else kinds, merges, rule, own + [i for i in stops if i not in own], bos,
        tokenizer.pad_token_id, tokenizer.unk_token_id, x[:1] == [bos], x[-1:] == [eos],
        template if isinstance(template, str) else None, talks and isinstance(template, str), list(beyond.values()),
        not apart and bool(content["normalizer"]), pieces,
    )  # fmt: skip


def _rule(content: dict[str, Any]) -> str:
    """llama.cpp's name of how the tokenizer cuts texts. Raises UserError where it has none that we know to be the same."""
    if content["model"]["type"] == "Unigram":
        raise UserError("export: no GGUF is written with a Unigram vocabulary, as T5 has; --to hf writes any")
    model, cutting, before = content["model"], content["pre_tokenizer"], content["normalizer"]
    parts = cutting["pretokenizers"] if cutting and cutting["type"] == "Sequence" else [cutting]
    found = RULES.get((tuple(_part(part) for part in parts if part), bool(model.get("ignore_merges"))))
    plain = model["type"] == "BPE" and not model.get("byte_fallback") and (before is None or before["type"] == "NFC")
    if found is None or not plain:
        raise UserError(
            f"export: this tokenizer ({model['type']}) cuts texts by a rule that is not known to be llama.cpp's "
            f"({', '.join(dict.fromkeys(RULES.values()))} are); --to hf writes any, and llama.cpp's own converter knows more"
        )
    return found


def _part(part: dict[str, Any]) -> tuple[str, Any]:
    kind = part["type"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return kind, part.get("use_regex", True)
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return kind, part["pattern"].get("Regex")
    return kind, part["behavior"] if kind == "Punctuation" else part.get("individual_digits")
