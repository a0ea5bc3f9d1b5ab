"""New tokens from a first stage to a merged model, on a checkpoint of images and text: each stage begins where the last ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

import posttrain
from posttrain.commands.merge import merge_run
from posttrain.models.builtin import tiny_tokenizer
from posttrain.models.language.loading import load_model

TINY = ("train.max_steps=2", "train.batch_size=2", "optim.lr=0.01", "data.max_rows=40", "data.eval_rows=8", "eval.sets=null")
TOKENS = "model.add_tokens=['<|tool|>','the same']"


def base(out: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision: dict[str, Any] = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "preprocessor_config.json").write_text("{}")
    return out


def metrics(run: Path) -> dict[str, float]:
    return json.loads((run / "manifest.json").read_text())["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "none"])
def test_rows_go_through_a_chain(tmp_path: Path, method: str) -> None:
    words = (*TINY, "model.dtype=float32", f"peft={method}")
    sft, again, dpo = tmp_path / "sft", tmp_path / "again", tmp_path / "dpo"
    posttrain.run("sft", *words, f"model.name={base(tmp_path / 'base')}", TOKENS, f"run.dir={sft}")
    manifest = json.loads((sft / "manifest.json").read_text())
    size = len(tiny_tokenizer())
    assert manifest["added_tokens"] == {"<|tool|>": size, "the same": size + 1}
    assert list(manifest["towers"]) == ["model.visual"]
    posttrain.run("sft", *words, f"init={sft}", f"run.dir={again}")
    assert metrics(again)["eval/loss_before"] == pytest.approx(metrics(sft)["eval/loss"], abs=1e-6)
    posttrain.run("dpo", *words, f"init={again}", f"run.dir={dpo}")
    assert metrics(dpo)["eval/loss_before"] == pytest.approx(0.693147, abs=1e-6)
    whole = dpo / "model"
    if method == "lora":
        whole = tmp_path / "merged"
        merge_run(dpo, whole, max_kl=1e-6)
    assert (whole / "preprocessor_config.json").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(whole)
    ids = torch.tensor([tokenizer.encode("<|tool|> the same the same<|tool|>")])
    assert ids.tolist()[0].count(size) == 2 and ids.tolist()[0].count(size + 1) >= 1
    plain: Any = AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32)
    with torch.no_grad():
        logits = load_model(dpo).model(input_ids=ids).logits
        assert float((plain.eval()(input_ids=ids).logits - logits).abs().max()) < 1e-5
