"""The masks of chat templates as models ship them (those in TRL's wheel), against two independent references."""

import pytest
from tokenizers import processors

from posttrain.data.chat.encoder import Encoder
from posttrain.errors import UserError
from stock_templates import (
    FOLDER,
    IS_THERE,
    SPECIAL,
    STOCK,
    THINK,
    WRITTEN_LEAD,
    allowed,
    end_of_turn,
    leads_of,
    trained_runs,
    trained_texts,
)

if not IS_THERE:
    pytest.skip("trl, which ships the stock templates, is not installed", allow_module_level=True)

# What TRL's twin trains beside ours: what it takes for the model's part though it is in front of the content.
TWIN_LEAD = {
    "deepseek": ["<\uff5cAssistant\uff5c>"],
    "glm4moe": ["\n<think></think>\n"],
    "gptoss": ["<|start|>assistant"],
    "muse_glimmer": ["<|start|>assistant"],
    "nemotron": ["<think></think>", "<think>\n"],
    "qwen2_5": ["\n"],
    "qwen2_5_vl": [""],
    "qwen3": ["<think>\n\n</think>\n\n", "<think>\n"],
}


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CONVERSATIONS = {
    "single": chat("What?", "The dog."),
    "multi": chat("What?", "The dog.", "And?", "The fox."),
    "system": chat("What?", "The dog.", system="Be kind."),
    "think_last": chat("What?", "The dog.", "And?", THINK + "The fox."),
    "think_early": chat("What?", THINK + "The dog.", "And?", "The fox."),
    "unicode": chat("Grüße 👩‍💻", "naïve 日本 👩‍💻"),
    "white_space": chat("  hi ", "\n  The dog. \n", " x\n", " y "),
    "template_text": chat("<|im_end|>\n<|im_start|>assistant\nThe <start_of_turn>model\n", "user\n[/INST] The dog"),
    "identical": chat("x", "x", "x", "x"),
    "empty": chat("What?", "", "And?", "y"),
}
# The only refusals, each with the reason that its message gives.
REFUSED = {
    ("gemma", "system"): "System role not supported",
    ("glm4moe", "empty"): "rewrites a message",  # renders an empty content without the line break of any other
}


def load(make_tokenizer, name: str):
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return make_tokenizer(template, sorted(set(SPECIAL.findall(template))))


def encoder(tokenizer, name: str) -> Encoder:
    return Encoder(tokenizer, stops=("<|user|>", "<|observation|>") if name == "glm4moe" else ())


@pytest.mark.parametrize("name", STOCK)
def test_trains_each_answer_and_its_end_and_nothing_else(make_tokenizer, name):
    tokenizer = load(make_tokenizer, name)
    build = encoder(tokenizer, name)
    for case, messages in CONVERSATIONS.items():
        if (name, case) in REFUSED:
            with pytest.raises(UserError, match=REFUSED[name, case]):
                build.encode_conversation(messages)
            continue
        result = build.encode_conversation(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        found = trained_texts(tokenizer, result)
        assert len(found) == len(answers) and result.borders == 0, (case, found)
        for k, (run, content) in enumerate(zip(found, answers, strict=True)):
            last = k == len(answers) - 1
            end = ("<|return|>" if last else "<|end|>") if name == "gptoss" else end_of_turn(name)
            leads = ["", *leads_of(WRITTEN_LEAD, name)]
            assert run.endswith(end), (case, run)
            assert run.removesuffix(end) in {lead + form for lead in leads for form in allowed(content)}, (case, run)


@pytest.mark.parametrize("name", STOCK)
def test_tokens_are_those_of_apply_chat_template(make_tokenizer, name):
    tokenizer = load(make_tokenizer, name)
    build = encoder(tokenizer, name)
    as_list = name in ("idefics3", "smolvlm", "llava_next")
    for case in ("multi", "white_space", "template_text", "unicode"):
        messages = CONVERSATIONS[case]
        given = [m | {"content": [{"type": "text", "text": m["content"]}]} if as_list else m for m in messages]
        expected = tokenizer.apply_chat_template(given)["input_ids"]
        appended = [tokenizer.convert_tokens_to_ids("<|user|>")] if name == "glm4moe" else []
        assert build.encode_conversation(messages).tokens == [*expected, *appended]


@pytest.mark.parametrize("name", [n for n in STOCK if (FOLDER / f"{n}_training.jinja").exists()])
def test_agrees_with_the_marked_twin_up_to_its_start(make_tokenizer, name):
    """Where both render the same text, the twin's mask ends where ours does, and starts no later.

    White space after the end of a turn, and the </s> that Phi 3 writes once after all, do not count for us.
    """
    stock, twin = load(make_tokenizer, name), load(make_tokenizer, f"{name}_training")
    twin.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # or transformers loses " The"
    build = encoder(stock, name)
    as_list = name in ("idefics3", "smolvlm", "llava_next")
    leads = ["", *leads_of(TWIN_LEAD, name)]
    compared = 0
    for case in ("single", "multi", "think_last", "white_space", "identical"):  # unicode: transformers drops bytes
        messages = CONVERSATIONS[case]
        given = [m | {"content": [{"type": "text", "text": m["content"]}]} if as_list else m for m in messages]
        reference = twin.apply_chat_template(given, return_assistant_tokens_mask=True)
        ours = build.encode_conversation(messages)
        if stock.decode(ours.tokens) != twin.decode(reference["input_ids"]):
            continue
        theirs = [twin.decode(run) for run in trained_runs(reference["input_ids"], reference["assistant_masks"])]
        theirs = [run.removesuffix("\n</s>" if name.startswith("phi") else "").rstrip() for run in theirs]
        found = trained_texts(stock, ours)
        assert len(found) == len(theirs), (case, found, theirs)
        assert all(run in {lead + own for lead in leads} for run, own in zip(theirs, found, strict=True)), (
            found,
            theirs,
        )
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*_training.jinja")))
def test_marked_templates_end_with_the_end_of_turn(make_tokenizer, name):
    tokenizer = load(make_tokenizer, name)
    result = Encoder(tokenizer).encode_conversation(CONVERSATIONS["multi"])
    found = [run for run in trained_texts(tokenizer, result) if run != "</s>"]
    ends = ["<|end|>", "<|return|>"] if name.startswith("gptoss") else [end_of_turn(name)] * 2
    assert all(run.endswith(answer + end) for run, answer, end in zip(found, ["The dog.", "The fox."], ends, strict=True))


def test_glm_without_known_stop_tokens_is_refused(make_tokenizer):
    with pytest.raises(UserError, match="never ends an assistant turn"):
        Encoder(load(make_tokenizer, "glm4moe")).encode_conversation(CONVERSATIONS["single"])
