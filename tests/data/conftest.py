"""A small real tokenizer (byte-level BPE, trained here), to which a test gives a chat template."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. The user asks a question and the assistant answers it.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Grüße aus Köln, çà et là, naïve façade.",
]
MakeTokenizer = Callable[..., Any]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """make_tokenizer(template, special, eos="</s>", bos="<s>"): a fresh fast tokenizer with those special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    text = backend.to_str()

    def make(template: str | None, special: Sequence[str] = (), eos: str | None = "</s>", bos: str | None = "<s>") -> Any:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=eos, bos_token=bos)
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.chat_template = template
        return tokenizer

    return make
