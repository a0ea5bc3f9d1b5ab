"""Texts that a file's vocabulary and the run's own tokenizer must cut alike."""

from __future__ import annotations

from typing import Any

from posttrain.errors import UserError
from posttrain.models.gguf.spm import WHOLE, Spm
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
    "emoji 🙂🎉 👩‍👩‍👧 🇫🇷, a rare sign 𐍈 and e\u0301 in two",
    "runs" + "x".join(" " * n for n in range(2, 40)),
    "1234567890 1,000,000 111111 aaaaaaa ababababa abcabcabc",
    "a\u2581sign <0x41> [PAD0] \u00a0 \u3000 \ufeff",
)
LEADING = (" one space first", "  two", "          ten", " ", "\u2581so")
TALK = ("What is 2+2?\nSay  it.", "It is 4.", "And  3 * 3? 🙂")
# by how the run's tokenizer puts a space before texts -> which kinds of texts llama.cpp has no way to cut alike
SPARED = {"always": (), "never": (), "unless": ("leading",), "first": ("leading", "other")}


def spm_of(vocabulary: Vocabulary) -> Spm | None:
    """What llama.cpp will have of it; None of a byte-level vocabulary."""
    found = vocabulary.pieces
    return Spm(vocabulary.texts, found.scores, vocabulary.kinds, vocabulary.prefix, found.strips) if found else None


def check_texts(spm: Spm, tokenizer: Any, vocabulary: Vocabulary) -> str:
    """spm: of the file. Raises UserError with the first text that it cuts otherwise than the tokenizer. Returns what is to
    be said of texts of which that is known beforehand, '' where there is none."""
    assert vocabulary.pieces
    main, other = (_talks(tokenizer), PLAIN) if vocabulary.template else (PLAIN, ())
    marked = _marked(vocabulary)
    kinds = {
        "main": [*main, *(marked if vocabulary.template else ())],
        "other": [*other, *(() if vocabulary.template else marked)],
        "leading": [*LEADING, *(text.replace("word", " word") for text in marked)],
    }
    told = ""
    for kind, texts in kinds.items():
        for text in texts:
            want, found = tokenizer(text, add_special_tokens=False).input_ids, spm(text)
            if want == found:
                continue
            how = f"{_shown(text)} as {_tokens(spm, found)}, and this tokenizer as {_tokens(spm, want)}"
            if kind not in SPARED[vocabulary.pieces.scheme]:
                raise UserError(f"export: llama.cpp would cut {how}; --to hf writes any")
            told = told or f"llama.cpp has no way to put the space before a text as this tokenizer does: it cuts {how}"
    return told


def _talks(tokenizer: Any) -> list[str]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TALK)]
    return [
        tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
        tokenizer.apply_chat_template(talk[:2], tokenize=False),
    ]


def _marked(vocabulary: Vocabulary, at_once: int = 32) -> list[str]:
    """Texts with every token that is found as it is."""
    whole = [text for text, kind in zip(vocabulary.texts, vocabulary.kinds, strict=True) if kind in WHOLE]
    return ["".join(f"{token}word" for token in whole[i : i + at_once]) for i in range(0, len(whole), at_once)]


def _shown(text: str) -> str:
    return repr(text if len(text) < 48 else text[:45] + "...")


def _tokens(spm: Spm, ids: list[int]) -> str:
    return " ".join(repr(spm.texts[i])[1:-1] for i in ids[:8]) + (" ..." if len(ids) > 8 else "")
