"""No answer is left to its end token: random words in every stock template, split by tokenizers of five kinds."""

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import ChatOptions
from stock_templates import FOLDER, IS_THERE, SPECIAL, STOCK, WRITTEN_LEAD, allowed, end_of_turn, leads_of, trained_runs

if not IS_THERE:
    pytest.skip("trl, which ships the stock templates, is not installed", allow_module_level=True)

PIECES = [
    "a",
    "dog",
    "The",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "1",
    "23",
    ".",
    ":",
    "?!",
    "(",
    '"',
    "é",
    "ß",
    "日本",
    "_",
    "x y",
    "// ",
]
PIECES += ["👩\u200d💻"]
WORDS = ["the quick brown fox", "a dog: 12", "The answer\n\nis 23.", " x y (z)", "assistant\n\n The", "user\n", "model\n dog"]
WORDS += [": the"]
# answers of the 328 whose first token holds letters of the header as well
ACROSS = {"byte-level": 5, "byte-fallback": 23, "byte-fallback-prefix": 15, "unigram": 10}


def byte_level(prefix: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(WORDS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return backend


def byte_fallback(prefix: bool) -> Tokenizer:
    """As Llama 2 and Mistral: pieces over "▁", the bytes of what no piece has; `prefix`: with a space put before all text."""
    whole = [text.replace(" ", "▁") for text in [*WORDS, " a b c d e f g h i j k l m n o p q r s t u v w x y z"]]
    letters = sorted({letter for text in whole for letter in text})
    merges = [("▁", "d"), ("o", "g"), ("▁d", "og"), ("▁", "T"), ("h", "e"), ("▁T", "he"), (":", "▁"), ("\n", "▁"), ("▁", "▁")]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(merge) for merge in merges)]
    vocabulary = {piece: k for k, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram(scheme: str) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    letters = sorted({letter for piece in PIECES for letter in piece} | set("▁<>/=thinkosufralce"))
    trainer = trainers.UnigramTrainer(
        vocab_size=150, initial_alphabet=letters, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(WORDS * 20, trainer)
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=1000))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    letters = sorted({letter for text in [*PIECES, *WORDS, "<>="] for letter in text})
    trainer = trainers.WordPieceTrainer(vocab_size=200, initial_alphabet=letters, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([*WORDS * 3, *(f"{letter} a{letter}a" for letter in letters)], trainer)
    return backend


KINDS = {
    "byte-level": lambda: byte_level(False),
    "byte-level-prefix": lambda: byte_level(True),
    "byte-fallback": lambda: byte_fallback(False),
    "byte-fallback-prefix": lambda: byte_fallback(True),
    "unigram": lambda: unigram("never"),
    "unigram-prefix": lambda: unigram("always"),
    "word-piece": word_piece,
}
# templates that write nothing behind a message but the next one's header
OPEN_ENDED = {"deepseek_r1_distill", "deepseekv3", "glm4moe", "llava_next"}
OPEN_SYSTEM = {"muse_glimmer"}
NO_SYSTEM = {"gemma", "gemma3"}  # refused, or written into the user's first message
OTHER_BLANKS = {"word-piece", "byte-level-prefix", "byte-fallback-prefix", "unigram-prefix"}  # in what they decode to


def words(rng: random.Random) -> str:
    found = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))
    return found if found.strip() else found + "a"


def _as_decoded(text: str) -> str:
    return text.replace("▁", " ")  # which stands in DeepSeek's end of turn


def bare(text: str) -> str:
    return "".join(_as_decoded(text).split())


def stock(text: str, name: str, **options: Any) -> tuple[Any, Encoder]:
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.chat_template = template
    stops = ("<|user|>", "<|observation|>") if name == "glm4moe" else ()
    return tokenizer, Encoder(tokenizer, stops, options=ChatOptions(**options))


def wanted_of(name: str, role: str, content: str, last: bool) -> set[str]:
    """What may be trained of a message: the forms of its content, with what the template writes before an answer, and its end."""
    if role == "assistant":
        end = ("<|return|>" if last else "<|end|>") if name.startswith("gptoss") else end_of_turn(name)
        return {lead + form + end for lead in ["", *leads_of(WRITTEN_LEAD, name)] for form in allowed(content)}
    closed = {"gptoss": "<|end|>", "cohere2": "<|END_OF_TURN_TOKEN|>"}.get(name) or end_of_turn(name)
    closed = "\n\n<|end|>" if (name, role) == ("gptoss", "system") else closed
    open_ended = OPEN_ENDED if role == "user" else {*OPEN_ENDED, *OPEN_SYSTEM}
    return {form + ("" if name in open_ended else closed) for form in allowed(content)}


def is_across(tokenizer: Any, run: list[int], texts: set[str], same: Any, what: Any) -> bool:
    """Do its tokens decode to one of the texts but for letters before it, which are all in its first token?"""
    wanted = {same(text) for text in texts}
    decoded, rest = (same(str(tokenizer.decode(ids))) for ids in (run, run[1:]))
    if decoded in wanted:
        return False
    blank = str(tokenizer.convert_ids_to_tokens(run[0])).endswith("▁")  # the answer's part of the first token
    assert {one for one in wanted if decoded.endswith(one) and (len(rest) < len(one) or blank)}, (what, decoded)
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_decodes_to_the_answers_and_their_ends(kind):
    """Before an answer there may be no more than the header's letters in the one token that reaches across its border."""
    rng, text, across = random.Random(kind), KINDS[kind]().to_str(), 0
    for name in STOCK:
        tokenizer, build = stock(text, name)
        same = bare if kind in OTHER_BLANKS else _as_decoded
        for _ in range(4):
            turns = [{"role": ("user", "assistant")[k % 2], "content": words(rng)} for k in range(4)]
            result = build.encode_conversation(turns)
            found = trained_runs(result.tokens, result.weights)
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            assert len(found) == len(answers), (name, turns)
            for k, (run, answer) in enumerate(zip(found, answers, strict=True)):
                across += is_across(tokenizer, run, wanted_of(name, "assistant", answer, bool(k)), same, (name, turns))
    assert across == ACROSS.get(kind, 0)


@pytest.mark.parametrize(("kind", "train_on"), [*((kind, "all") for kind in KINDS), ("byte-level", ("user",))])
def test_of_the_roles_named_all_words_are_trained_and_nothing_else(kind, train_on):
    """Every message apart, with what closes it, whoever says it: no header stands between two that are trained."""
    rng, text = random.Random(f"{kind} {train_on}"), KINDS[kind]().to_str()
    same = bare if kind in OTHER_BLANKS else _as_decoded
    for name in STOCK if kind == "byte-level" else STOCK[len(kind) % 2 :: 2]:
        if name == "glm4moe" and train_on == "all":
            continue  # the header of the user's message ends the answer, and so nothing is between the two
        tokenizer, build = stock(text, name, train_on=train_on)
        chat = [{"role": ("user", "assistant")[k % 2], "content": words(rng)} for k in range(4)]
        chat = [*([] if name in NO_SYSTEM else [{"role": "system", "content": words(rng)}]), *chat]
        result = build.encode_conversation(chat)
        found = trained_runs(result.tokens, result.weights)
        learnt = [(k, m) for k, m in enumerate(chat) if m["role"] in build.options.roles]
        assert len(found) == len(learnt), (name, chat)
        for run, (k, message) in zip(found, learnt, strict=True):
            wanted = wanted_of(name, message["role"], message["content"], k == len(chat) - 1)
            is_across(tokenizer, run, wanted, same, (name, chat))
