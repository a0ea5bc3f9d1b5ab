"""train.gradient_checkpointing: as many layers as memory asks for, and the same run whatever their number."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import posttrain
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.kernels.candidates import peft_differs
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.stages.language import recompute
from posttrain.stages.language.build import build_model
from posttrain.stages.language.init import find_base, resolve_start

RUN = ("sft", "model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "eval.sets=null")


def trained(tmp_path: Path, name: str, *words: str) -> dict[str, torch.Tensor]:
    posttrain.run(*RUN, *words, f"run.dir={tmp_path / name}")
    found = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for key, value in found.items() if "lora_B" in key), "nothing was learned"
    return found


def test_of_a_shared_model_a_process_holds_its_part_by_hand() -> None:
    """Full training of two layers in two processes: 16 bytes a number, of which half; and all of it whole, in float32, once."""
    cfg: Any = typed_config(compose_run("sft", [*RUN[1:], "train.fsdp=true", "train.processes=2"]))
    start = resolve_start(cfg)
    built = build_model(cfg, start, find_base(start, None), 2, torch.device("cpu"))
    asked = recompute._asked(cfg, built, 48, torch.device("cpu"))
    numbers = sum(p.numel() for p in built.module.parameters())
    head = head_bytes(built.module.head.weight, 48, "cpu")
    assert len(built.module.units) == 2 and asked and asked.fixed == 8 * numbers + 4 * numbers + head
    half = built.module.bfloat16()  # as a base in 16 bits is, until it is sharded
    again = recompute._asked(cfg, replace(built, module=half), 48, torch.device("cpu"))
    assert again and again.fixed - head_bytes(half.head.weight, 48, "cpu") == 12 * numbers


def six_layers(directory: Path) -> str:
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=1024, num_hidden_layers=6)).save_pretrained(directory)
    load_tokenizer("tiny", None, None, None).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("word", ["+peft=lora", "train.precision=bf16"], ids=["lora", "autocast"])
def test_a_plan_and_a_run_choose_the_same_number(
    tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six layers, from where all must be recomputed to where none must."""
    run = [f"model.name={six_layers(tmp_path)}", *RUN[2:], word]
    cfg: Any = typed_config(compose_run("sft", run))
    start, cpu = resolve_start(cfg), torch.device("cpu")
    built = build_model(cfg, start, find_base(start, None), 2, cpu)
    plan = make_plan("sft", run)
    lying = plan["memory"]["weights"] + plan["memory"].get("adapters", 0)
    least, most = (plan[f"memory_{how}_recomputation"] / recompute.USED for how in ("with", "without"))
    planned, chosen = [], []
    capsys.readouterr()
    for share in (0.02, 0.4, 0.6, 1.05):
        memory = least + share * (most - least)
        planned.append(make_plan("sft", run, round(memory))["layers_recomputed"])
        monkeypatch.setattr(recompute, "free_bytes", lambda device, free=memory - lying: free)
        recompute.fit_memory(cfg, built.module, built, plan["micro_batch_tokens"], cpu)
        said = re.search(r"(\d+) of 6 layers are recomputed", capsys.readouterr().out)
        chosen.append(int(said[1]) if said else 0)
    assert planned == chosen and (planned[0], planned[-1]) == (6, 0) and len({*planned}) == 4


@pytest.mark.slow
def test_little_memory_recomputes_layers_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = trained(tmp_path, "plain", "+peft=lora")
    assert "recomputed" not in capsys.readouterr().out
    monkeypatch.setattr(recompute, "free_bytes", lambda device: 1e6)
    little = trained(tmp_path, "little", "+peft=lora")
    said = re.search(r"(\d+) of (\d+) layers are recomputed", capsys.readouterr().out)
    assert said and said[1] == said[2]
    one = trained(tmp_path, "one", "+peft=lora", "train.gradient_checkpointing=1")
    for other in (little, one):
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.slow
def test_dense_copies_of_four_bit_weights_change_nothing_but_what_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In whatever number, with recomputation too; and a weight is made dense once where it has a copy."""
    from bitsandbytes import functional

    peft_differs(True, "cpu")  # asked once a process, of a small weight in 4 bit
    made, make, keep = [], functional.dequantize_4bit, recompute.keep_dense
    monkeypatch.setattr(functional, "dequantize_4bit", lambda weight, state: made.append(state) or make(weight, state))
    monkeypatch.setattr(recompute, "keep_dense", lambda layers: made.clear() or keep(layers))
    qlora = ("+peft=qlora", "model.dtype=bfloat16")
    plain = trained(tmp_path, "plain", *qlora)
    times, weights = len(made), len({id(state) for state in made})
    assert times > 3 * weights
    for number, words in {"auto": (), "1": ("train.gradient_checkpointing=true",)}.items():
        other = trained(tmp_path, number, *qlora, f"quant.dense_layers={number}", *words)
        assert all(torch.equal(plain[key], other[key]) for key in plain)
        assert len(made) == weights if number == "auto" else len(made) > weights
        assert ("have a dense copy" in capsys.readouterr().out) == (number == "auto")
    with pytest.raises(UserError, match="dense_layers"):
        posttrain.run(*RUN, "+peft=qlora", "quant.dense_layers=-1")
    with pytest.raises(UserError, match="dense_layers"):
        posttrain.run(*RUN, "+peft=lora", "quant.dense_layers=1")


def test_it_is_a_number_of_layers_or_a_word() -> None:
    for word in ("0", "some"):
        with pytest.raises(UserError, match="gradient_checkpointing"):
            posttrain.run(*RUN, "+peft=lora", f"train.gradient_checkpointing={word}")
