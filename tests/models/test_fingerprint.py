"""The same weights with another config are another model; the same config written by another version is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models.hub import digest
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.runs.earlier import as_of_today, same_base


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer("tiny", None, None, None).save_pretrained(tmp_path)
    return tmp_path


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
        ("generation_config.json", {"eos_token_id": [2, 7]}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer_config.json", {"add_bos_token": True}),
    ],
)  # fmt: skip
def test_what_changes_the_function_changes_the_digest(file: str, values: dict[str, Any], model: Path) -> None:
    before = digest(model)
    change(model / file, **values)
    after = digest(model)
    assert not same_base(before, after) and before.split(":")[0] == after.split(":")[0]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"transformers_version": "9.9", "dtype": "bfloat16", "torch_dtype": "bfloat16", "_name_or_path": "x"}),
        ("config.json", {"use_cache": False, "output_attentions": True, "id2label": {"0": "good"}, "pruned": None}),
        ("config.json", {"architectures": ["LlamaForCausalLM"]}),
        ("generation_config.json", {"transformers_version": "9.9", "temperature": 0.2, "do_sample": True}),
        ("tokenizer.json", {"truncation": {"max_length": 4}, "padding": {"pad_id": 1}}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}", "model_max_length": 12}),
        ("added.json", {}),
    ],
)  # fmt: skip
def test_what_does_not_leaves_it(file: str, values: dict[str, Any], model: Path) -> None:
    before = digest(model)
    if not (model / file).exists():
        (model / file).write_text("{}")
    change(model / file, **values)
    assert digest(model) == before


def test_the_order_of_architectures_and_of_keys_says_nothing(model: Path) -> None:
    file = model / "config.json"
    change(file, architectures=["B", "A"])
    before = digest(model)
    config = json.loads(file.read_text()) | {"architectures": ["A", "B"]}
    file.write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert digest(model) == before


def test_a_digest_of_earlier_runs_is_compared_as_they_had_it(model: Path) -> None:
    """They knew of the weights alone."""
    now = digest(model)
    then = now.split(":")[0]
    assert same_base(then, now) and same_base(now, then) and same_base(now, now)
    assert not same_base("0" * 64, now) and not same_base(None, now) and not same_base("", now)
    assert as_of_today({"model.weights": then}, {"model.weights": now})[0] == {"model.weights": now}
    assert as_of_today({"model.weights": "0" * 64}, {"model.weights": now})[0] == {"model.weights": "0" * 64}
