"""One way to an encoder: with the tokens at which the model stops, or a template that closes no message cannot be encoded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.commands.compose import compose_runs
from posttrain.data.chat.encoder import Encoder
from posttrain.errors import UserError
from posttrain.evaluation.agreement import held_out_rows
from posttrain.models.hub import resolve
from posttrain.models.language.loading import load_model
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder

# as GLM's: nothing closes a message, and the model stops by writing the next header, as its generation_config says
OPEN_ENDED = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]} for i in range(24)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model=tiny with such a template, and rows beside it."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(resolve("tiny", None).directory, folder / "base")
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    stops = tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<|im_start|>"])
    (folder / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    (folder / "open.jinja").write_text(OPEN_ENDED)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    words = ["train.max_steps=1", "train.batch_size=2", "eval.sets=null", "data.eval_share=0.3", "+peft=lora", "peft.r=2"]
    words += [f"model.name={model}/base", f"model.chat_template={model}/open.jinja", f"data.path={model}/rows.jsonl"]
    posttrain.run("sft", *words, f"run.dir={model}/run")
    return model / "run"


def test_the_end_of_a_turn_is_trained_though_no_token_closes_it(model: Path) -> None:
    tokenizer: Any = load_tokenizer(f"{model}/base", None, None, f"{model}/open.jinja")
    with pytest.raises(UserError, match="the chat template never ends an assistant turn"):
        Encoder(tokenizer).encode_conversation(ROWS[0]["messages"])
    found = make_encoder(tokenizer, f"{model}/base", None).encode_conversation(ROWS[0]["messages"])
    trained = [token for token, weight in zip(found.tokens, found.weights, strict=True) if weight]
    assert tokenizer.decode(trained) == "it is 0<|im_start|>"


def test_a_merge_is_compared_on_the_runs_own_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = load_model(run)
    texts = [live.tokenizer.decode(row) for row in held_out_rows(run, live)]
    assert "cannot be read again" not in capsys.readouterr().out
    assert any(text.startswith("<|im_start|>user\nsay ") and "it is " in text for text in texts)


def test_weights_of_a_composition_are_learned_on_conversations(run: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    manifest = compose_runs([str(run), str(tmp_path / "again")], tmp_path / "out", None, model / "rows.jsonl")
    assert manifest["stage"] == "compose"
