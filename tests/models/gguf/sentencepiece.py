"""Small BPE tokenizers of SentencePiece's kind, made as those of Llama 2, Mistral, Gemma and Phi-3 are."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.models.gguf.texts import PLAIN
from posttrain.models.gguf.vocabulary import Vocabulary, vocabulary_of

SPACE = "\u2581"
SPECIAL = {"gemma": ("<pad>", "<eos>", "<bos>", "<unk>"), "phi3": ("<unk>", "<s>", "</s>", "<|endoftext|>")}
TURNS = {"gemma": ("<start_of_turn>", "<end_of_turn>"), "phi3": ("<|user|>", "<|assistant|>", "<|end|>")}
TALK = {
    "llama2": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}  # fmt: skip
KINDS = ("llama2", "mistral", "mistral3", "gemma", "phi3")


def learned(special: tuple[str, ...], tab: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as they come of a SentencePiece model: all merges that make a token, sorted by it."""
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=list(special))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([*PLAIN[:5], "the value of a list is the value of its parts " * 4], trainer)
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names[9] = "\t" if tab else names[9]
    found = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    runs = [SPACE * n for n in (2, 3, 4, 8)]
    texts = [*special, *names, *(text for text, _ in found if tab or not set(text) & set("\n\r\t")), *runs]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    made = ((text[:i], text[i:]) for text in vocab if text not in special for i in range(1, len(text)))
    return vocab, [both for both in made if both[0] in vocab and both[1] in vocab]


def sentencepiece(kind: str, template: bool = True) -> Any:
    special = SPECIAL.get(kind, ("<unk>", "<s>", "</s>"))
    vocab, merges = learned(special, tab=kind == "gemma")
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    last = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        made.normalizer, made.pre_tokenizer = replace, pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence(last)
    elif kind in ("mistral", "mistral3"):
        scheme = "always" if kind == "mistral" else "first"
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        made.decoder = decoders.Sequence([*last, decoders.Strip(" ", 1, 0)])
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        made.decoder = decoders.Sequence([*last, decoders.Strip(" ", 1, 0)])
    strip = kind == "phi3"
    made.add_special_tokens([AddedToken(t, rstrip=strip and t == "</s>", normalized=False) for t in special])
    made.add_special_tokens([AddedToken(t, rstrip=strip, normalized=False) for t in TURNS.get(kind, ())])
    if kind == "gemma":
        made.add_tokens([AddedToken(text, normalized=False) for text in ("\n", "\n\n", SPACE * 2, "<h1>")])
    bos, eos, pad = ("<bos>", "<eos>", "<pad>") if kind == "gemma" else ("<s>", "</s>", None)
    if not strip:
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    chat = TALK.get(kind, TALK["llama2"]) if template else None
    names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", **({"pad_token": pad} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=chat, **names)


def vocabulary(tokenizer: Any, rows: int = 1024) -> Vocabulary:
    return vocabulary_of(tokenizer, [], rows)
