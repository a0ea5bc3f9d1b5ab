"""Which tokens end an answer: not those that close a prompt, or a part of an answer."""

from typing import Any

import pytest

from posttrain.data.chat.encoder import Encoder

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# a user's message ends with a mark of its own, an answer with another: Mistral, gpt-oss
TWO = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|return|>{% endif %}{% endfor %}"
)
# an answer ends in two tokens, of which the first only ends its words: Cohere 2
RUN = (
    "{% for m in messages %}{% if m.role == 'user' %}<|U|>{{ m.content }}<|END|>"
    "{% else %}{{ m.content }}<|WORDS|><|END|>{% endif %}{% endfor %}"
)
OPEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "special", "stops", "ends"),
    [
        (CHATML, ["<|im_start|>", "<|im_end|>"], [], ["<|im_end|>", "</s>"]),
        (CHATML, ["<|im_start|>", "<|im_end|>"], ["</s>", "<s>"], ["<|im_end|>", "</s>", "<s>"]),
        (TWO, ["[INST]", "[/INST]", "<|return|>"], [], ["<|return|>", "</s>"]),
        (RUN, ["<|U|>", "<|END|>", "<|WORDS|>"], [], ["<|END|>", "</s>"]),
        (OPEN, ["<|user|>", "<|assistant|>"], ["</s>", "<|user|>"], ["</s>", "<|user|>"]),
        (None, [], [], ["</s>"]),
    ],
)
def test_an_answers_ends(
    template: str | None, special: list[str], stops: list[str], ends: list[str], make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer(template, special)
    encoder = Encoder(tokenizer, stops)
    assert tokenizer.convert_ids_to_tokens(encoder.end_tokens()) == ends
    # a model saved with these ends has the same, and reads rows as before
    again = Encoder(tokenizer, ends)
    assert again.end_tokens() == encoder.end_tokens()
    if stops != []:
        assert again.identity == encoder.identity
