"""chain.mode: the same function as doing it by hand with peft, and the right reference in each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import posttrain
from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.prepare import prepare
from posttrain.errors import UserError
from posttrain.models.quantization import keep_as_quantized
from posttrain.runs.cache_place import cache_root
from posttrain.stages.spec import row_uses

IDS = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0))
TINY = (
    "model=tiny", "model.dtype=float32", "train.max_steps=3", "train.batch_size=2", "optim.lr=0.01", "data.max_rows=40",
    "data.eval_rows=4", "eval.sets=null", "peft.r=4",
)  # fmt: skip
METHODS = {"lora": ("peft=lora",), "qlora": ("peft=qlora", "quant.compute_dtype=float32")}


def run(stage: str, *words: str) -> dict[str, Any]:
    return posttrain.run(stage, *words)


def base_of(directory: Path, quantized: bool) -> Any:
    named = json.loads((directory / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32, quantization_config=config if quantized else None)
    keep_as_quantized(model)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def logp_chosen(model: Any, run_dir: Path, words: tuple[str, ...]) -> float:
    """Mean log-prob of the held-out chosen answers, each read alone after its prompt."""
    config = validate(compose_run("dpo", list(words)))
    encoder = Encoder(AutoTokenizer.from_pretrained(run_dir / "adapter"))
    held_out = prepare(config.data, row_uses()["dpo"], encoder, config.train.max_length, cache_root())[0].held_out
    found = []
    for unit in range(len(held_out)):
        tokens, weights = (torch.from_numpy(each.copy()) for each in held_out.sequence(unit))
        prompt, border = (int(each) for each in held_out.splits[unit])
        ids = tokens[:border].long()
        with torch.no_grad():
            logps = model.eval()(ids[None]).logits[0].float().log_softmax(-1)
        own = logps[prompt - 1 : border - 1].gather(1, ids[prompt:, None])[:, 0]
        found.append(float(own[weights[prompt:border] != 0].sum()))
    assert len(found) == 4
    return sum(found) / len(found)


@pytest.mark.parametrize("method", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["stack", pytest.param("merge", marks=pytest.mark.slow), "continue"])
def test_three_stages_by_plain_peft(mode: str, method: str, tmp_path: Path) -> None:
    words, quantized = (*TINY, *METHODS[method]), method == "qlora"
    run("cpt", *words, f"run.dir={tmp_path}/cpt")
    run("sft", *words, f"init={tmp_path}/cpt", f"chain.mode={mode}", f"run.dir={tmp_path}/sft")
    manifest = run("dpo", *words, f"init={tmp_path}/sft", f"chain.mode={mode}", f"run.dir={tmp_path}/dpo")
    assert manifest["chain"] == mode
    lines = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/margin"] == 0.0 and lines[1]["train/margin"] == 0.0 and lines[-1]["eval/margin"] != 0.0
    ranks = {"stack": 12, "merge": 4, "continue": 4}
    config = json.loads((tmp_path / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == ranks[mode]
    # by hand: the adapter on the base that it names is what the run measured
    final = PeftModel.from_pretrained(base_of(tmp_path / "dpo", quantized), str(tmp_path / "dpo" / "adapter"))
    measured, before = (manifest["metrics"][f"eval/logp_chosen{when}"] for when in ("", "_before"))
    assert logp_chosen(final, tmp_path / "dpo", words) == pytest.approx(measured, abs=1e-3 if quantized else 1e-4)
    assert abs(measured - before) > 0.1 and lines[0]["eval/logp_chosen"] == before
    if mode != "merge":
        return
    # merge: its base is the earlier base with the earlier adapter in it, merged by peft in 32 bit, never in 4
    earlier = PeftModel.from_pretrained(base_of(tmp_path / "sft", False), str(tmp_path / "sft" / "adapter"))
    merged = logits(earlier.merge_and_unload())  # pyright: ignore
    torch.testing.assert_close(logits(base_of(tmp_path / "dpo", False)), merged, rtol=0, atol=1e-4)


def test_a_stack_is_the_sum_of_what_each_stage_learned(tmp_path: Path) -> None:
    words = (*TINY, *METHODS["lora"])
    run("sft", *words, f"run.dir={tmp_path}/a")
    run("sft", *words, f"init={tmp_path}/a", "train.seed=5", f"run.dir={tmp_path}/b")
    from posttrain.models.peft.merge import Adapter

    first, both = (Adapter(tmp_path / name / "adapter", "test") for name in "ab")
    for module in both.modules:
        a, b, _ = both.factors(module)
        torch.testing.assert_close(b[:, :4] @ a[:4], first.factors(module).b @ first.factors(module).a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("parent", "words", "match"),
    [
        ("lora", ("peft=dora", "chain.mode=stack"), "chain.mode: stack needs changes that are sums, which peft=dora is not"),
        ("dora", ("peft=lora", "chain.mode=stack"), "which init's dora adapter is not"),
        ("lora", ("peft=dora", "chain.mode=continue"), "peft=dora cannot go on with init's lora adapter"),
        ("lora", ("peft=lora", "peft.r=2", "chain.mode=continue"), "peft.r: the adapter .* has 4, not 2"),
        ("adapter", ("peft=adapter", "peft.r=8", "chain.mode=continue"), "peft.r: the adapter .* has 4, not 8"),
        ("lora", ("peft=pissa", "peft.r=4", "chain.mode=continue"), "peft=pissa cannot go on with init's lora adapter"),
        ("prompt", ("peft=lora", "peft.r=4"), "init: its adapter cannot be merged"),
    ],
)
def test_what_does_not_go_together(parent: str, words: tuple[str, ...], match: str, tmp_path: Path) -> None:
    common = [word for word in TINY if word != "peft.r=4"]
    run("sft", *common, f"peft={parent}", *([] if parent == "prompt" else ["peft.r=4"]), f"run.dir={tmp_path}/parent")
    with pytest.raises(UserError, match=match):
        run("sft", *common, *words, f"init={tmp_path}/parent", f"run.dir={tmp_path}/child")


@pytest.mark.parametrize("method", ["dora", "prefix", "adapter"])
def test_a_method_goes_on_with_its_own_adapter(method: str, tmp_path: Path) -> None:
    common = [word for word in TINY if word != "peft.r=4"]
    first = run("sft", *common, f"peft={method}", f"run.dir={tmp_path}/a")
    again = run("sft", *common, f"peft={method}", f"init={tmp_path}/a", "chain.mode=continue", f"run.dir={tmp_path}/b")
    assert again["metrics"]["eval/loss_before"] == pytest.approx(first["metrics"]["eval/loss"], abs=1e-5)
    assert again["metrics"]["eval/loss"] != again["metrics"]["eval/loss_before"]


@pytest.mark.slow
def test_other_methods_start_from_the_merged_model(tmp_path: Path) -> None:
    """auto: DoRA, a prefix and full training on a LoRA run begin where that run ended."""
    common = [word for word in TINY if word != "peft.r=4"]
    parent = run("sft", *common, "peft=lora", f"run.dir={tmp_path}/lora")
    for method in ("dora", "prefix", "none", "partial"):
        child = run("sft", *common, f"peft={method}", f"init={tmp_path}/lora", f"run.dir={tmp_path}/{method}")
        assert child["chain"] == "merge"
        assert child["metrics"]["eval/loss_before"] == pytest.approx(parent["metrics"]["eval/loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "pissa", "prefix", "adapter", "dora"])
def test_a_killed_run_of_any_method_goes_on_bit_identically(method: str, tmp_path: Path) -> None:
    words = ["model=tiny", f"peft={method}", "train.max_steps=14", "train.batch_size=2", "train.save_steps=2", "data.max_rows=40",
             "data.eval_rows=4", "eval.sets=null", "optim.lr=0.005"]  # fmt: skip
    whole = run("sft", *words, f"run.dir={tmp_path}/whole")
    command = [sys.executable, "-m", "posttrain", "sft", *words, f"run.dir={tmp_path}/cut"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    end = time.monotonic() + 60
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*")) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    again = run("sft", *words, f"run.dir={tmp_path}/cut")
    for name in ("adapter/adapter_model.safetensors",):
        assert again["files"][name] == whole["files"][name]
