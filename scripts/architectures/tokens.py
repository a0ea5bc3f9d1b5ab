"""A byte-level tokenizer, learnt here from a few sentences, with a chat template."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
ADDED = "<|endoftext|>"  # which transformers adds to a tokenizer of Qwen2's where it is not there
SPARE = [f"<|spare_{number}|>" for number in range(24)]  # ids for a picture, a sound, the end of one: never in a text
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = "a small model reads many short rows and says which of seven old towns lies near the sea or far up in the hills".split()


@cache
def make_tokenizer() -> Any:
    """Of transformers: an end of turn, and a padding token of its own, which ends nothing."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    special = [BEGIN, END, PAD, ADDED, *SPARE]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    found.train_from_iterator((" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def token_ids() -> dict[str, int]:
    """Token -> id; as many as the models' vocabularies have."""
    return make_tokenizer().get_vocab()
