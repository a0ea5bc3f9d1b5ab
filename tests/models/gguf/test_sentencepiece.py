"""Vocabularies of SentencePiece's kind: llama.cpp's rule, on what stands in the file, gives the tokenizer's own tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tests.models.gguf.sentencepiece import KINDS, SPACE, sentencepiece
from tests.models.gguf.test_gguf import made
from tests.since import needs
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from posttrain.errors import RunError, UserError
from posttrain.models.gguf.read import check_vocabulary
from posttrain.models.gguf.spm import Spm, read_spm
from posttrain.models.gguf.texts import LEADING, PLAIN, check_texts, cutter_of
from posttrain.models.gguf.vocabulary import vocabulary_of
from posttrain.models.gguf.write import write_gguf

ARCHITECTURES = {"llama2": "llama", "mistral": "mistral", "mistral3": "mistral", "gemma": "gemma2", "phi3": "phi3"}


def file_of(tokenizer: Any, kind: str, folder: Path, name: str = "m") -> tuple[Path, Any]:
    model = made(folder, ARCHITECTURES[kind])
    vocabulary = vocabulary_of(tokenizer, [], model.config.vocab_size)
    write_gguf(folder, model.config, vocabulary, "f32", folder / "m.gguf", name)
    check_vocabulary(folder / "m.gguf", vocabulary)
    return folder / "m.gguf", vocabulary


def changed(tokenizer: Any, change: Any) -> Any:
    """The same with another tokenizer.json."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_s_rule_gives_the_tokenizer_s_own_tokens(kind: str, template: bool, tmp_path: Path) -> None:
    """Every text alike: but those that begin with a space, where the tokenizer puts one before only if there is none (Mistral's
    Metaspace), and where it does so before the whole text alone, those that the space before a text can not be right for."""
    tokenizer = sentencepiece(kind, template)
    file, vocabulary = file_of(tokenizer, kind, tmp_path)
    spm = read_spm(file)
    told = check_texts(spm, tokenizer, vocabulary)
    alike = [[tokenizer(t, add_special_tokens=False).input_ids == spm(t) for t in texts] for texts in (PLAIN, LEADING)]
    assert [sum(each) for each in alike] == {
        "llama2": [12, 5], "gemma": [12, 5], "phi3": [12, 5], "mistral": [12, 0], "mistral3": [0, 5] if template else [12, 0],
    }[kind]  # fmt: skip
    assert bool(told) == (kind in ("mistral", "mistral3")) and "\n" not in told


@needs("transformers", "5.23", "older readers of GGUF put no bos before a text")
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reader_finds_the_same_tokens(kind: str, tmp_path: Path) -> None:
    """Its own class for the architecture; by which space stands before a text is its own choice."""
    tokenizer = sentencepiece(kind)
    file, _ = file_of(tokenizer, kind, tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    texts = [*PLAIN, *(LEADING if kind in ("gemma", "phi3") else ())]
    assert [back(t).input_ids for t in texts] == [tokenizer(t).input_ids for t in texts]
    assert (back.bos_token_id, back.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert back.chat_template == tokenizer.chat_template


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    tokenizer = sentencepiece("llama2")
    file, _ = file_of(tokenizer, "llama2", tmp_path)
    found = {k[15:]: f.contents() for k, f in GGUFReader(file).fields.items() if k.startswith("tokenizer.ggml.")}
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    first = tokenizer.convert_tokens_to_ids("".join(merges[0]))
    assert found["model"] == "llama" and found["pre"] == "default" and "merges" not in found
    assert found["token_type"][:5] == [2, 3, 3, 6, 6] and found["token_type"][258] == 6 and found["token_type"][259] == 1
    assert found["tokens"][13] == "<0x0A>" and found["tokens"][-1] == "[PAD895]" and found["token_type"][-1] == 5
    assert found["scores"][first] == 0.0 and found["scores"][1] == found["scores"][259] == -len(merges)
    made_by = [i for i, merge in enumerate(merges) if "".join(merge) == SPACE * 4]
    assert found["scores"][tokenizer.convert_tokens_to_ids(SPACE * 4)] == -made_by[0] and made_by == [
        made_by[0] + i for i in range(3)
    ]
    assert found["add_space_prefix"] and found["add_bos_token"]
    assert not found["add_eos_token"] and not found["remove_extra_whitespaces"]
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)


def test_the_highest_score_is_merged_first_and_of_equals_the_first_of_the_text() -> None:
    """By hand: ab and bc overlap; aa in aaa; é is no token, so it becomes two bytes; a space before a text and after <s>."""
    texts = ["<s>", "a", "b", "c", "ab", "bc", "aa", SPACE, SPACE + "a", "<0xC3>", "<0xA9>"]
    kinds = [3, 1, 1, 1, 1, 1, 1, 1, 1, 6, 6]
    spm = Spm(texts, [0, 0, 0, 0, -2, -1, -3, 0, -4, 0, 0], kinds, False, False)
    assert spm("abc") == [1, 5] and spm("aaa") == [6, 1] and spm("b\u00e9") == [2, 9, 10]
    assert spm("abc<s>ab a") == [1, 5, 0, 4, 8]
    assert replace(spm, scores=[0, 0, 0, 0, -1, -2, -3, 0, -4, 0, 0])("abc") == [4, 3]
    assert replace(spm, prefix=True)("b<s>a") == [7, 2, 0, 8]
    assert spm("<s>  b") == [0, 7, 7, 2] and replace(spm, strips=True)("<s>  b") == [0, 7, 7, 2]
    assert replace(spm, texts=["<|end|>", *texts[1:]], strips=True)("<|end|>\n b") == [0, 2]


def test_phi_3_s_name_says_that_its_tokens_take_white_space_and_no_other_s_does(tmp_path: Path) -> None:
    """llama.cpp goes by the model's name alone."""
    file, vocabulary = file_of(sentencepiece("phi3"), "phi3", tmp_path)
    assert GGUFReader(file).fields["general.name"].contents() == "phi-3 m" and read_spm(file).strips
    with pytest.raises(UserError, match=r"llama\.cpp would cut '<\|user\|>\\nWhat"):
        check_texts(replace(read_spm(file), strips=False), sentencepiece("phi3"), vocabulary)
    (tmp_path / "other").mkdir()
    file, _ = file_of(sentencepiece("llama2"), "llama2", tmp_path / "other", "my-Phi3-llama")
    assert GGUFReader(file).fields["general.name"].contents() == "my-phi-llama" and not read_spm(file).strips


def _swap(content: dict[str, Any]) -> None:
    """The first merge of two that make "the" goes to the end."""
    merges = content["model"]["merges"]
    i = next(i for i, merge in enumerate(merges) if "".join(merge) == SPACE + "the")
    merges.append(merges.pop(i))


def _drop(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    content["model"]["merges"] = [merge for merge in merges if merge != [SPACE * 2, SPACE * 2]]


def _no_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["byte"] = content["model"]["vocab"].pop("<0x0A>")


def _odd_sign(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["\u00e9t"] = len(content["model"]["vocab"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_odd_sign, "has no merge of '\u00e9' and 't', and llama.cpp makes '\u00e9t' of them"),
        (_swap, f"makes '{SPACE}the' by merges of two ranks"),
        (_drop, f"has no merge of '{SPACE * 2}' and '{SPACE * 2}', and llama.cpp makes '{SPACE * 4}' of them"),
        (_no_byte, "has no token <0x0A>"),
        (lambda content: content.update(normalizer={"type": "NFKC"}), "changes or cuts texts by more than"),
        (lambda content: content["model"].update(ignore_merges=True), "changes or cuts texts by more than"),
        (lambda content: content["added_tokens"][0].update(rstrip=True), "take white space beside them \\('<unk>'\\)"),
    ],
)
def test_what_llama_cpp_would_merge_otherwise_is_refused(change: Any, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        vocabulary_of(changed(sentencepiece("llama2"), change), [], 896)
    assert "\n" not in str(refused.value)


def test_runs_of_spaces_may_have_one_score_together() -> None:
    """As the newest transformers orders the merges of runs: the longest halves first, whatever they make."""

    def mixed(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        runs = [merge for merge in merges if set("".join(merge)) == {SPACE}]
        others = [merge for merge in merges if merge not in runs]
        content["model"]["merges"] = others + sorted(runs, key=lambda merge: [-len(half) for half in merge])

    tokenizer = changed(sentencepiece("llama2"), mixed)
    vocabulary = vocabulary_of(tokenizer, [], 896)
    ids = tokenizer.convert_tokens_to_ids([SPACE * n for n in (2, 3, 4, 8)])
    spm: Any = cutter_of(vocabulary, tokenizer)
    assert [spm.scores[i] - spm.scores[ids[0]] for i in ids] == [0.0, 5.0, 5.0, 6.0]
    assert check_texts(spm, tokenizer, vocabulary) == ""


def test_a_metaspace_that_cuts_words_is_one_where_no_token_is_longer() -> None:
    tokenizer = sentencepiece("mistral")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, split=True)
    with pytest.raises(UserError, match="changes or cuts"):
        vocabulary_of(tokenizer, [], 896)


def test_a_text_that_differs_is_named(tmp_path: Path) -> None:
    """A token that is added before texts are normalised is not found as llama.cpp finds it."""
    tokenizer = sentencepiece("llama2")
    tokenizer.add_tokens([AddedToken("word", normalized=True)])
    file, vocabulary = file_of(tokenizer, "llama2", tmp_path)
    with pytest.raises(UserError, match=r"llama\.cpp would cut '.*word.*' as .*, and this tokenizer as .*--to hf writes any"):
        check_texts(read_spm(file), tokenizer, vocabulary)
    scores = [*vocabulary.pieces.scores]
    scores[300] += 1
    with pytest.raises(RunError, match=r"tokenizer\.ggml\.scores"):
        check_vocabulary(file, replace(vocabulary, pieces=replace(vocabulary.pieces, scores=scores)))


def test_unigram_is_refused_by_its_name() -> None:
    made = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], unk_id=0, byte_fallback=False))
    made.normalizer = normalizers.NFKC()
    with pytest.raises(UserError, match="no GGUF is written with a Unigram vocabulary, as T5 has; --to hf writes any"):
        vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"), [], 8)


def test_of_a_run_on_bare_texts_those_come_first() -> None:
    """Mistral 7B v0.3's space stands before the whole text alone: a run that never saw its template is asked by bare texts."""
    tokenizer = sentencepiece("mistral3")
    found = [vocabulary_of(tokenizer, [], 896, talks) for talks in (True, False)]
    assert [v.prefix for v in found] == [False, True] and found[0].template == found[1].template
    for vocabulary, right in zip(found, ([0, 5], [12, 0]), strict=True):
        cutter = cutter_of(vocabulary, tokenizer)
        alike = [[tokenizer(t, add_special_tokens=False).input_ids == cutter(t) for t in texts] for texts in (PLAIN, LEADING)]
        assert [sum(each) for each in alike] == right and check_texts(cutter, tokenizer, vocabulary)
