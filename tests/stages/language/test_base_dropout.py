"""A base with dropout of its own (GPT-2, OPT): what compares two passes over the same tokens starts from no difference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import posttrain
from posttrain.models.language.dropout import switch_off_dropout
from posttrain.models.language.tokenizer import load_tokenizer

KINDS = {
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "opt": (
        transformers.OPTConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 2, "word_embed_proj_dim": 32},
    ),
}


def config(kind: str, size: int, end: Any) -> Any:
    make, sizes = KINDS[kind]
    return make(**sizes, vocab_size=size, bos_token_id=end, eos_token_id=end)


def base(kind: str, directory: Path) -> str:
    torch.manual_seed(0)
    tokenizer = load_tokenizer("tiny", None, None, None)
    model: Any = transformers.AutoModelForCausalLM.from_config(config(kind, len(tokenizer), tokenizer.eos_token_id))
    for parameter in model.parameters():
        parameter.data *= 3
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return f"model.name={directory}"


def first_line(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if "train/loss" in line)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_margin_is_zero(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1} then", "rejected": " no more of it"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [base(kind, tmp_path / "base"), f"data.path={tmp_path / 'pairs.jsonl'}", "eval.sets=null", "train.max_steps=1"]
    common += ["+peft=lora", "peft.dropout=0", "train.max_length=64"]
    posttrain.run("dpo", *common, f"run.dir={tmp_path / 'dpo'}")
    first = first_line(tmp_path / "dpo")
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    posttrain.run("dpo", *common, "train.base_dropout=true", f"run.dir={tmp_path / 'on'}")
    assert abs(first_line(tmp_path / "on")["train/loss"] - math.log(2)) > 1e-4


def test_routers_draw_nothing() -> None:
    """PhiMoE's are drawn from in training, beside the noise on what they read."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(
            **sizes,
            num_key_value_heads=2,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=1,
            pad_token_id=0,
            num_local_experts=4,
            input_jitter_noise=0.1,
            router_jitter_noise=0.1,
        )
    )
    tokens = torch.arange(12)[None]
    drawn = [model.train()(input_ids=tokens).logits for _ in range(2)]
    assert not torch.equal(*drawn)
    switch_off_dropout(model)
    assert torch.equal(model.train()(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)
    assert model.train().model.layers[0].mlp.experts.training


def test_what_is_switched_off_and_what_is_kept() -> None:
    model = transformers.AutoModelForCausalLM.from_config(config("opt", 50, 1))
    switch_off_dropout(model)
    tokens = torch.arange(12)[None]
    assert torch.equal(model.train()(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert model.config.dropout == 0.1
