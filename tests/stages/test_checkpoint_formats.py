"""Runs on checkpoints in fewer bits: trained, chained, read again and merged as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import posttrain
from posttrain.cli import app
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.merge import merge_run
from posttrain.commands.plan.plan import make_plan
from posttrain.errors import UserError
from posttrain.models.checkpoints.formulas import to_fp8
from posttrain.models.language.tokenizer import load_tokenizer

COMMON = ["train.batch_size=2", "train.max_steps=2", "optim.lr=0.01", "train.max_length=64", "eval.sets=null", "data.eval_rows=2"]
COMMON += ["data.path=chat.jsonl", "peft.r=2"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a plain base, one in bnb-4bit, one in fp8, and rows."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, **sizes)
    LlamaForCausalLM(config).save_pretrained("plain")
    bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    made: Any = AutoModelForCausalLM.from_pretrained("plain", quantization_config=bnb, dtype=torch.bfloat16)
    made.save_pretrained("bnb")
    in_8 = BitsAndBytesConfig(load_in_8bit=True)
    made = AutoModelForCausalLM.from_pretrained("plain", quantization_config=in_8, dtype=torch.bfloat16)
    made.save_pretrained("bnb8")
    shutil.copytree("plain", "fp8")
    tensors = load_file("fp8/model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensors[name], (32, 32))
    save_file(tensors, "fp8/model.safetensors", {"format": "pt"})
    settings = json.loads(Path("fp8/config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    Path("fp8/config.json").write_text(json.dumps(settings))
    for name in ("plain", "bnb", "bnb8", "fp8"):
        tokenizer.save_pretrained(name)
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i} it is"}]} for i in range(12)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], line: str) -> None:
    out = capsys.readouterr().out
    assert line in out, out


@pytest.mark.slow
@pytest.mark.parametrize("base", ["bnb", "bnb8", "fp8"])
def test_a_lora_is_trained_chained_measured_and_merged(base: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = posttrain.run("sft", f"model.name={base}", "+peft=lora", *COMMON, "run.dir=first")
    held = "used as it is, dequantized for each product" if base == "fp8" else "used as it is"
    name = {"bnb": "bnb-4bit", "bnb8": "bnb-8bit", "fp8": "fp8"}[base]
    said(capsys, f"the checkpoint is in {name}: {held}")
    assert (first["base"]["format"], first["base"]["held"]) == (name, held)
    measured = evaluate_runs(["first"])["first"]
    assert measured["eval/loss"] == pytest.approx(first["metrics"]["eval/loss"], abs=1e-5)
    second = posttrain.run("sft", "init=first", "+peft=lora", *COMMON, "run.dir=second")
    assert second["chain"] == "stack" and second["base"]["digest"] == first["base"]["digest"]
    assert posttrain.run("sft", f"model.name={base}", "+peft=lora", *COMMON, "run.dir=first") == first, "it goes on from its end"
    third = posttrain.run("sft", "init=first", "+peft=lora", "chain.mode=merge", *COMMON, "run.dir=third")
    assert third["chain"] == "merge" and "format" not in third["base"], "it lies on the merged model, which is in 16 bit"
    chat = CliRunner().invoke(app, ["chat", "second", "--prompt", "Say 3", "--temperature", "0", "--max-new-tokens", "4"])
    assert chat.exit_code == 0
    capsys.readouterr()
    figures = merge_run(Path("second"), home / "merged", max_kl=0.05)
    said(capsys, f"the base is in {name}: the merged model is plain; --as same puts it back into that")
    assert figures["candidates"]["full"]["kl"] < 1e-3
    config = json.loads((home / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged: Any = AutoModelForCausalLM.from_pretrained(home / "merged", dtype=torch.float32)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    figures = merge_run(Path("second"), home / "again", max_kl=0.5, form="same")
    assert (
        json.loads((home / "again" / "config.json").read_text())["quantization_config"]
        == json.loads(Path(base, "config.json").read_text())["quantization_config"]
    )
    assert load_file(home / "again" / "model.safetensors").keys() == load_file(f"{base}/model.safetensors").keys()


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_what_cannot_be_trained_is_refused_before_the_data_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    missing = [*COMMON[:-2], "data.path=nowhere.jsonl"]
    with pytest.raises(UserError, match=r"model\.name: the checkpoint is in fp8, and is trained in full: say quant=dequantize"):
        posttrain.run("sft", "model.name=fp8", "+peft=none", *missing)
    with pytest.raises(UserError, match=r"model\.name: the checkpoint is in bnb-4bit, .*say quant=dequantize"):
        posttrain.run("sft", "model.name=bnb", "+peft=pissa", *missing)
    tensors = load_file("plain/model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, "plain/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensor"):
        posttrain.run("sft", "model.name=plain", "+peft=lora", *missing)
    capsys.readouterr()
    words = [word for word in COMMON if not word.startswith("peft")]
    manifest = posttrain.run("sft", "model.name=fp8", "+peft=none", "quant=dequantize", *words, "run.dir=full")
    said(capsys, "the checkpoint is in fp8: dequantized to float32 at load, ")
    assert manifest["quant"] == {"method": "dequantize"}
    assert "quantization_config" not in json.loads(Path("full/model/config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_held_as_it_is_or_dequantized_once_a_run_is_the_same_to_the_last_bit(stage: str, home: Path) -> None:
    """In each stage, with its references, rollouts and evaluations."""
    words = ["model.name=fp8", "+peft=lora", *COMMON]
    if stage == "dpo":
        pairs = [{"prompt": f"Say {i}", "chosen": f"{i} it is", "rejected": "no"} for i in range(12)]
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        words[words.index("data.path=chat.jsonl")] = "data.path=pairs.jsonl"
    if stage == "ppo":
        words += ["reward.function=[posttrain.rewards:brevity]", "rollout.max_new_tokens=6", "train.grad_accum=4", "ppo.epochs=1"]
    ways = {"held": [], "once": ["quant=dequantize"]}
    runs = {name: posttrain.run(stage, *words, *more, f"run.dir={name}") for name, more in ways.items()}
    held, once = (load_file(home / name / "adapter" / "adapter_model.safetensors") for name in runs)
    assert held.keys() == once.keys() and all(torch.equal(held[name], once[name]) for name in held)
    assert runs["held"]["metrics"] == runs["once"]["metrics"]


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_base_in_fp8_is_quantized_again(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = posttrain.run("sft", "model.name=fp8", "+peft=qlora", *COMMON, "run.dir=again")
    said(capsys, "the checkpoint is in fp8: dequantized to bfloat16 at load, and kept in nf4")
    assert manifest["quant"]["method"] == "nf4"
    figures = merge_run(Path("again"), Path("merged"), max_kl=0.5)
    assert set(figures["candidates"]) == {"full", "dequantized"} and figures["candidates"]["dequantized"]["kl"] < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_plan_counts_and_says_what_the_run_will_hold() -> None:
    """The linear layers of the blocks in 4 bits: 2 layers of (64 + 64 + 2 * 32) x 64 and 3 x 128 x 64 numbers."""
    numbers = 2 * (64 * (64 + 64 + 32 + 32) + 3 * 128 * 64)
    words = [*COMMON, "+peft=lora"]
    plans = {name: make_plan("sft", [f"model.name={name}", *words], 10**9) for name in ("plain", "bnb", "fp8")}
    assert plans["bnb"]["memory"]["quantized weights"] == numbers / 2
    assert plans["bnb"]["checkpoint"] == ["the checkpoint is in bnb-4bit: used as it is"]
    assert plans["bnb"]["total_parameters"] == plans["plain"]["total_parameters"]
    assert plans["fp8"]["memory"]["quantized weights"] == numbers, "a byte each"
    assert plans["fp8"]["memory"]["quantization constants"] == numbers / 32**2 * 4, "a scale in 32 bit for each block"
    assert plans["fp8"]["memory"]["weights"] == plans["bnb"]["memory"]["weights"]
    assert plans["fp8"]["checkpoint"] == ["the checkpoint is in fp8: used as it is, dequantized for each product"]
    dequantized = make_plan("sft", ["model.name=fp8", "quant=dequantize", *words], 10**9)
    assert dequantized["memory"] == plans["plain"]["memory"] and plans["plain"]["checkpoint"] == []
    assert dequantized["checkpoint"][0].startswith("the checkpoint is in fp8: dequantized to bfloat16 at load, 0.000")
