"""What is compared of two models: rows that they can read, and no cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import posttrain
from posttrain.commands.merge import merge_run
from posttrain.evaluation.agreement import agreement, held_out_rows, write_logprobs
from posttrain.models.language.loading import load_model
from posttrain.models.language.tokenizer import load_tokenizer


def test_rows_are_no_longer_than_the_model_takes(tmp_path: Path) -> None:
    """GPT-2 has 40 positions here; general text has longer rows."""
    tokenizer = load_tokenizer("tiny", None, None, None)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run, data = tmp_path / "run", tmp_path / "rows.jsonl"
    words = [f"model.name={tmp_path / 'base'}", "+peft=lora", "peft.r=2", "train.max_steps=1", "train.max_length=40"]
    words += [f"data.path={data}", f"data.eval_path={data}", "eval.sets=null", "model.dtype=float32"]
    data.write_text('{"prompt": "one", "completion": "two"}\n' * 40)
    posttrain.run("sft", *words, f"run.dir={run}")
    rows = held_out_rows(run, load_model(run))
    assert max(len(row) for row in rows) == 40
    assert merge_run(run, tmp_path / "merged", 1e-3)["kept"] == "full"


def test_no_cache_is_asked_for(tmp_path: Path) -> None:
    """Two models whose logits are worked out by hand: the same likeliest token, KL of (0.5, 0.5) from (0.75, 0.25)."""

    def model(first: float) -> Any:
        def call(input_ids: torch.Tensor, use_cache: bool) -> Any:
            assert not use_cache
            return SimpleNamespace(logits=torch.tensor([first, 1 - first]).log().expand(1, input_ids.shape[1], 2))

        call.device = "cpu"  # type: ignore[attr-defined]
        return call

    rows = [torch.tensor([0, 1, 0])]
    write_logprobs(model(0.5), rows, tmp_path / "live.safetensors")
    found = agreement(tmp_path / "live.safetensors", model(0.75), rows)
    expected = 0.5 * torch.log(torch.tensor([0.5 / 0.75, 0.5 / 0.25])).sum()
    assert abs(found.kl - float(expected)) < 1e-6
    assert abs(found.perplexity_live - 2.0) < 1e-6
