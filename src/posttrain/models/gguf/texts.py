"""Texts that a file's vocabulary and the run's own tokenizer must cut alike."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from posttrain.data.chat.rendering import Given, Renderer
from posttrain.errors import UserError
from posttrain.models.gguf.spm import WHOLE, Bytes, Cutter, Spm
from posttrain.models.gguf.vocabulary import Vocabulary

PLAIN = (
    "The quick brown fox doesn't jump over 13 lazy dogs, does it?",
    "two  spaces,   three,    four and eight        of them; one at the end ",
    "one line\nanother\n\n\nand a\ttab\t\tor two\r\n",
    "def f(x):\n    if x >= 10 and x != 20:\n        return [x ** 2, -x]  # 3.14e-10\n",
    "<div class=\"a\">{&nbsp;'b': 0x1F}</div> // == === ==== -----",
    "naïve café, Ångström, Übermut, œuvre, ¿qué?, 25 °C, 10 €",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया",
    "你好，世界。こんにちは世界、안녕하세요 세계 สวัสดีชาวโลก",
    "emoji 🙂🎉 👩‍👩‍👧 🇫🇷, a rare sign 𐍈",
    "runs" + "x".join(" " * n for n in range(2, 40)),
    "1234567890 1,000,000 111111 aaaaaaa ababababa abcabcabc",
    "a\u2581sign <0x41> [PAD0] \u00a0 \u3000 \ufeff",
)
LEADING = (" one space first", "  two", "          ten", " ", "\u2581so")
PARTED = ("e\u0301 in two", "A\u030angstro\u0308m")
TALK = ("What is 2+2?\nSay  it.", "It is 4.", "And  3 * 3? 🙂")
# by how the run's tokenizer puts a space before texts -> which kinds of texts llama.cpp has no way to cut alike
SPARED = {"always": (), "never": (), "unless": ("leading",), "first": ("leading", "other")}
WHY = {
    "parted": "GGUF has no place for this tokenizer's NFC, by which signs in two parts become one",
    "other": "llama.cpp has no way to put the space before a text as this tokenizer does",
}


def cutter_of(vocabulary: Vocabulary, tokenizer: Any) -> Cutter:
    """What llama.cpp will have of it."""
    if found := vocabulary.pieces:
        return Spm(vocabulary.texts, found.scores, vocabulary.kinds, vocabulary.prefix, found.strips)
    return Bytes(vocabulary.texts, vocabulary.kinds, tokenizer.backend_tokenizer)


def check_texts(cutter: Cutter, tokenizer: Any, vocabulary: Vocabulary) -> str:
    """cutter: of the file. Raises UserError with the first text that it cuts otherwise than the tokenizer. Returns what is to
    be said of texts of which that is known beforehand, '' where there is none."""
    scheme = vocabulary.pieces.scheme if vocabulary.pieces else "never"
    spared = (*SPARED[scheme], *(("parted",) if vocabulary.composes else ()))
    plain = PLAIN if vocabulary.composes else (*PLAIN, *PARTED)
    talks = _talks(tokenizer) if vocabulary.template else []
    main, other = (talks, plain) if vocabulary.talks else (plain, talks)
    marked = _marked(vocabulary)
    spaced = [[part.replace("word", " word") for part in parts] for parts in marked]
    kinds: dict[str, Sequence[str | list[str]]] = {
        "main": [*main, *(marked if vocabulary.talks else [])],
        "other": [*other, *([] if vocabulary.talks else marked)],
        "parted": PARTED if vocabulary.composes else (),
        "leading": [*LEADING, *spaced],
    }
    told = ""

    def want(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for kind, texts in kinds.items():
        for parts in texts:
            text = parts if isinstance(parts, str) else "".join(parts)
            if want(text) == cutter(text):
                continue
            text = next((part for part in parts if want(part) != cutter(part)), text) if isinstance(parts, list) else text
            how = f"{_shown(text)} as {_tokens(cutter, cutter(text))}, and this tokenizer as {_tokens(cutter, want(text))}"
            if kind not in spared:
                raise UserError(f"export: llama.cpp would cut {how}; --to hf writes any")
            told = told or f"{WHY.get(kind, WHY['other'])}: llama.cpp cuts {how}"
    return told


def _talks(tokenizer: Any) -> list[str]:
    """Conversations by the chat template, as far as it takes them."""
    renderer, found = Renderer(tokenizer), list[str]()
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TALK)]
    for messages, prompt in ((talk[:1], True), (talk, True), (talk[:2], False)):
        with contextlib.suppress(UserError):
            found.append(renderer.render(messages, Given(), prompt=prompt)[0])
    return found


def _marked(vocabulary: Vocabulary, at_once: int = 32) -> list[list[str]]:
    """Texts, each in parts, with every token that is found as it is, behind a word and behind a space."""
    whole = [text for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True) if kind in WHOLE]
    return [[f"{token}word {token}word" for token in whole[i : i + at_once]] for i in range(0, len(whole), at_once)]


def _shown(text: str) -> str:
    return repr(text if len(text) < 48 else text[:45] + "...")


def _tokens(cutter: Cutter, ids: list[int]) -> str:
    return " ".join(repr(cutter.texts[i])[1:-1] for i in ids[:8]) + (" ..." if len(ids) > 8 else "")
