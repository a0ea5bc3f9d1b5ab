"""What reads rows with a run's result renders them as the run did: one rule for eval, chat, merge and compose."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.commands.chat import Conversation
from posttrain.commands.evaluate import _sets as sets_of
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.words import runs_and_settings
from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.loading import LoadedModel
from posttrain.models.language.run_data import differences
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.runs.artifact import open_artifact

# shows thoughts only where it is asked to, and a mark of the variable
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '(' + mood + ')' if mood is defined else '' }}{% endif %}"
)


def run(folder: Path, words: list[str], template: dict[str, str] | None, chat_template: str = TEMPLATE) -> Path:
    """A finished run's directory, without weights."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(compose_run("sft", ["model=tiny", *words])))
    manifest: dict[str, Any] = {"stage": "sft", "weights": {"kind": "model", "path": "model"}, "metrics": {}, "files": {}}
    manifest |= {"config_digest": "", "schema": 1} | ({"template": template} if template else {})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model").mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(builtin_directory("tiny")[0] / name, folder / "model")
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder / "model")
    return folder


def live(folder: Path, *words: str) -> LoadedModel:
    _, _, of_data = runs_and_settings(words)
    return LoadedModel(open_artifact(folder, "run"), None, load_tokenizer(str(folder / "model"), None, None, None), of_data)


def prompt(found: LoadedModel, text: str = "Hi") -> str:
    conversation = Conversation.__new__(Conversation)
    conversation.live, conversation.system, conversation._lost = found, None, set()
    conversation.messages = [{"role": "user", "content": text}]
    return found.tokenizer.decode(conversation.prompt())


CHAT, PLAIN = {"rows": "chat", "texts": "chat"}, {"rows": "none", "texts": "none"}
ASKED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("words", "template", "said", "expected"),
    [
        ([], CHAT, [], ASKED),
        ([], PLAIN, [], "Hi"),
        ([], {"rows": "chat", "texts": "none"}, [], ASKED),  # trained on messages, whatever texts would have been
        ([], None, [], ASKED),  # of version 0.1, which spoke by the template
        ([], PLAIN, ["data.template=chat"], ASKED),
        ([], CHAT, ["data.template=none"], "Hi"),
        (["data.template_kwargs={mood: glad}"], CHAT, [], ASKED + "(glad)"),
        (["data.template_kwargs={mood: glad}"], CHAT, ["data.template_kwargs={mood: sad}"], ASKED + "(sad)"),
        (["data.template_kwargs={mood: glad}"], CHAT, ["data.template_kwargs=null"], ASKED),
    ],
)
def test_chat_speaks_as_the_rows_were_rendered(
    tmp_path: Path, words: list[str], template: dict[str, str] | None, said: list[str], expected: str
) -> None:
    assert prompt(live(run(tmp_path / "run", words, template), *said)) == expected


def test_earlier_answers_are_as_the_run_had_reasoning(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", ["data.reasoning=drop"], CHAT)
    conversation = Conversation.__new__(Conversation)
    conversation.system, conversation._lost = None, set()
    conversation.messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>b"},
        {"role": "user", "content": "c"},
    ]
    for words, thought in (((), ""), (("data.reasoning=keep",), "<think>hm</think>")):
        conversation.live = live(folder, *words)
        assert f"assistant\n{thought}b<|im_end|>" in conversation.live.tokenizer.decode(conversation.prompt())


def measured(folder: Path, file: Path, *words: str) -> tuple[str, str]:
    """The kind of the set, and its first row as it is measured, what counts in brackets."""
    found = live(folder, f"data.path={file}", *words)
    (only,) = sets_of(found, {}, None)
    tokens, weights = only.examples.sequence(0)
    text = ""
    for token, weight in zip(tokens.tolist(), weights.tolist(), strict=True):
        text += f"[{found.tokenizer.decode([token])}]" if weight else found.tokenizer.decode([token])
    return only.kind, text.replace("][", "")


def test_a_file_is_measured_as_the_runs_rows_were_read(tmp_path: Path) -> None:
    """The names of its columns, its format, and its template are the run's; every one can be said otherwise."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"ask": "q", "say": "a", "prompt": "p", "completion": "c"}) + "\n")
    words = ["data.columns.prompt=ask", "data.columns.completion=say", "data.shape=prompt_completion"]
    folder = run(tmp_path / "run", words, PLAIN)
    assert measured(folder, file) == ("conversation", "q[a<|im_end|>]")
    assert (
        measured(folder, file, "data.template=chat")[1] == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[a<|im_end|>]\n"
    )
    assert measured(folder, file, "data.columns=null") == ("conversation", "p[c<|im_end|>]")
    assert measured(folder, file, "data.columns={text: ask}", "data.shape=text") == ("text", "[q<|im_end|>]")


def test_of_a_mixture_the_first_source_says_how(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"ask": "q", "say": "a"}) + "\n")
    words = ["data=mix", f"data.sources.a.path={file}", "data.sources.a.share=1", "data.sources.a.columns.prompt=ask"]
    folder = run(tmp_path / "run", [*words, "data.sources.a.columns.completion=say"], PLAIN)
    assert measured(folder, file) == ("conversation", "q[a<|im_end|>]")


def test_what_is_lost_is_said_or_refused_as_in_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}],
        "id": 1,
    }
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    folder = run(tmp_path / "run", [], CHAT)
    with pytest.raises(
        UserError, match=r"row 1: reasoning_content is not rendered by the chat template; .*data.reasoning=inline"
    ):
        measured(folder, file)
    measured(folder, file, "data.on_loss=warn")
    said = " ".join(capsys.readouterr().out.split())
    assert "reasoning_content: not rendered by the chat template in 1 rows" in said and "columns not used: id" in said
    assert "<think> hm </think> a" in measured(folder, file, "data.reasoning=inline")[1].replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["data.templat=none"], r"unknown key 'data\.templat' - did you mean 'data\.template'\?"),
        (["data.template=maybe"], r"data\.template: input should be 'auto', 'chat' or 'none' \(got 'maybe'\)"),
        (["data.template_kwargs={a: "], r"data\.template_kwargs: '\{a: ' is no value"),
        (["train.max_length=4"], "unknown key 'train.max_length'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        evaluate_runs(["tiny", *words])


def test_runs_side_by_side_that_were_rendered_otherwise(tmp_path: Path) -> None:
    one = run(tmp_path / "a", ["data.template_kwargs={mood: glad}"], CHAT)
    other = run(tmp_path / "b", ["data.reasoning=drop"], PLAIN)
    artifacts = [open_artifact(folder, "run") for folder in (one, other)]
    assert differences(artifacts[0], artifacts[1], {}) == ["data.template", "data.reasoning", "data.template_kwargs"]
    assert differences(artifacts[0], artifacts[1], {"data.template": "chat", "data.template_kwargs": "null"}) == [
        "data.reasoning"
    ]
    assert differences(artifacts[0], artifacts[0], {}) == []
