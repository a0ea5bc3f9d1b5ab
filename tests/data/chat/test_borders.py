"""No answer is left to its end token: random words in every stock template, split by tokenizers of five kinds."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.chat.encoder import Encoder
from stock_templates import FOLDER, IS_THERE, SPECIAL, STOCK, WRITTEN_LEAD, allowed, end_of_turn, leads_of

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
OTHER_BLANKS = {"word-piece", "byte-level-prefix", "byte-fallback-prefix", "unigram-prefix"}  # in what they decode to


def words(rng: random.Random) -> str:
    found = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 6)))
    return found if found.strip() else found + "a"


def _as_decoded(text: str) -> str:
    return text.replace("▁", " ")  # which stands in DeepSeek's end of turn


def bare(text: str) -> str:
    return "".join(_as_decoded(text).split())


def trained_runs(tokens: list[int], weights: list[float]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token, weight in zip(tokens, weights, strict=True):
        if weight:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_decodes_to_the_answers_and_their_ends(kind):
    """Before an answer there may be no more than the header's letters in the one token that reaches across its border."""
    rng, text, across = random.Random(kind), KINDS[kind]().to_str(), 0
    for name in STOCK:
        template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="</s>", bos_token="<s>")
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
        tokenizer.chat_template = template
        build = Encoder(tokenizer, stops=("<|user|>", "<|observation|>") if name == "glm4moe" else ())
        same = bare if kind in OTHER_BLANKS else _as_decoded
        for _ in range(4):
            turns = [{"role": ("user", "assistant")[k % 2], "content": words(rng)} for k in range(4)]
            result = build.encode_conversation(turns)
            found = trained_runs(result.tokens, result.weights)
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            assert len(found) == len(answers), (name, turns)
            for k, (run, answer) in enumerate(zip(found, answers, strict=True)):
                end = ("<|return|>" if k else "<|end|>") if name.startswith("gptoss") else end_of_turn(name)
                leads = ["", *leads_of(WRITTEN_LEAD, name)]
                wanted = {same(lead + form + end) for lead in leads for form in allowed(answer)}
                decoded, rest = (same(str(tokenizer.decode(ids))) for ids in (run, run[1:]))
                if decoded in wanted:
                    continue
                blank = str(tokenizer.convert_ids_to_tokens(run[0])).endswith("▁")  # the answer's part of the first token
                most = {one for one in wanted if decoded.endswith(one) and (len(rest) < len(one) or blank)}
                assert most, (name, decoded, turns)
                across += 1
    assert across == ACROSS.get(kind, 0)
