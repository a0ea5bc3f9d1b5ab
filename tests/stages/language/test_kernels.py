"""model.kernels: with the kernels and without, a run is the same within rounding; and what cannot be is refused first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import posttrain
from posttrain.commands.chat import Conversation
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.models.kernels.attention import ways_of_attention
from posttrain.models.kernels.fused import OWN
from posttrain.models.language import packed_lm
from posttrain.models.language.loading import load_model

SMALL = ["model=tiny", "model.dtype=float32", "train.max_steps=3", "train.batch_size=2", "data.max_rows=12", "data.eval_rows=4"]
SMALL += ["eval.sets=null", "train.max_length=192", "optim.lr=1e-3", "optim.warmup_ratio=0", "train.log_steps=1"]
PPO = ["reward.function=posttrain.rewards:brevity", "rollout.max_new_tokens=8", "train.grad_accum=4"]
RUNS = {
    "sft": ["sft", "+peft=lora", "peft.r=4", "peft.dropout=0.1"],
    "sft in full": ["sft"],
    "dpo": ["dpo", "+peft=lora", "peft.r=4"],
    "ppo": ["ppo", "+peft=lora", "peft.r=4", *PPO],
}


def result(directory: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((directory / "manifest.json").read_text())
    (file,) = (directory / manifest["weights"]["path"]).glob("*.safetensors")
    return lines, load_file(file), manifest


def first(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the first step, at which nothing has been learnt."""
    return next(line for line in lines if line["step"] == 1 and "train/loss" in line)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "ppo" else name for name in RUNS])
def test_both_ways_give_the_same_run_within_rounding(name: str, tmp_path: Path) -> None:
    found = {}
    for kernels in ("auto", "reference"):
        posttrain.run(*RUNS[name], *SMALL, f"model.kernels={kernels}", f"run.dir={tmp_path / kernels}")
        found[kernels] = result(tmp_path / kernels)
    (lines, weights, manifest), (plain_lines, plain_weights, plain_manifest) = found["auto"], found["reference"]
    figures = [key for key in lines[-1] if key.split("/")[-1] in ("loss", "grad_norm", "margin", "reward", "value_loss")]
    assert len(lines) == len(plain_lines) and any(key.endswith("loss") for line in lines for key in line)
    for line, plain in zip(lines, plain_lines, strict=True):
        for key in line.keys() & set(figures):
            assert line[key] == pytest.approx(plain[key], abs=1e-5), (line["step"], key)
    if name == "dpo":  # each way has a reference of its own
        assert [first(run)["train/margin"] for run in (lines, plain_lines)] == [0.0, 0.0]
    assert weights.keys() == plain_weights.keys()
    apart = max(float((weights[key] - plain_weights[key]).abs().max()) for key in weights)
    assert apart < 1e-4
    taken = {"RMSNorm": 5, "SwiGLU": 2} | ({"LoRA linear": 14} if "peft.r=4" in RUNS[name] else {})
    assert manifest["kernels"] == {"choice": "auto", "taken_over": taken, "left": []}
    assert plain_manifest["kernels"] == {"choice": "reference", "taken_over": {}, "left": []}


def test_reference_calls_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_lm, "token_logprobs", lambda *_: pytest.fail("log-probs tile by tile"))
    monkeypatch.setattr(packed_lm, "use_kernels", seen := Seen(packed_lm.use_kernels))
    monkeypatch.setattr("posttrain.models.kernels.choice.inference_weights", lambda _: pytest.fail("weights for inference"))
    posttrain.run(*RUNS["ppo"], *SMALL, "train.max_steps=1", "model.kernels=reference", f"run.dir={tmp_path / 'run'}")
    assert set(seen.kernels) == {"reference"}


class Seen:
    """A function, and the last argument of each call."""

    def __init__(self, function: Any) -> None:
        self.function, self.kernels = function, list[Any]()

    def __call__(self, *args: Any) -> Any:
        self.kernels.append(args[-1])
        return self.function(*args)


def test_a_plan_counts_what_the_plain_modules_keep() -> None:
    words = ["model=tiny", "+peft=lora", "data.max_rows=12", "eval.sets=null", "train.max_length=192", "train.max_steps=1"]
    lean, plain = (make_plan("sft", [*words, f"model.kernels={kernels}"]) for kernels in ("auto", "reference"))
    assert plain["memory"]["activations"] > 1.2 * lean["memory"]["activations"]
    assert {**plain["memory"], "activations": 0} == {**lean["memory"], "activations": 0}


def test_what_is_not_taken_over_is_said_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sft", *SMALL, "train.max_steps=1"]
    posttrain.run(*words, f"run.dir={tmp_path / 'as it is'}")
    assert "kernels" not in capsys.readouterr().out
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    manifest = posttrain.run(*words, f"run.dir={tmp_path / 'changed'}")
    said = capsys.readouterr().out
    assert said.index("SwiGLU of 2 LlamaMLP") < said.index("training 475,392 of")
    assert [each["module"] for each in manifest["kernels"]["left"]] == ["LlamaMLP"]


def test_what_reads_a_run_computes_as_it_did(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.run(*RUNS["sft"], *SMALL, "train.max_steps=1", "model.kernels=reference", f"run.dir={run}")
    live = load_model(run)
    assert live.kernels == "reference"
    Conversation(live, 0.0, 1.0, 2).answer("hello")
    assert not any(hasattr(module, OWN) for module in live.model.modules())
    child = compose_run("dpo", [f"init={run}"])
    assert child["model"]["kernels"] == "reference"


def test_a_run_of_a_version_without_the_key_still_begins_another(tmp_path: Path) -> None:
    run = tmp_path / "run"
    posttrain.run("sft", *SMALL, "train.max_steps=1", f"run.dir={run}")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  kernels: auto\n", ""))
    assert "kernels" not in (run / "config.yaml").read_text()
    assert compose_run("dpo", [f"init={run}"])["model"]["kernels"] == "auto"


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_kernel_of_a_gpu_is_refused_without_one_before_anything_loads(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.stages.language.build.load_causal", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("posttrain.stages.language.prepare.read_mixture", lambda *_: pytest.fail("read"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expected = rf"^model.attention: {kernel} needs a CUDA device, and this one is cpu; say documents or auto$"
    with pytest.raises(UserError, match=expected):
        posttrain.run("sft", *SMALL, f"model.attention={kernel}", f"run.dir={tmp_path / 'run'}")


@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_plan_may_be_of_another_machines_attention(kernel: str) -> None:
    words = ["model=tiny", "data.max_rows=12", "eval.sets=null", "train.max_steps=1", f"model.attention={kernel}"]
    assert make_plan("sft", words)


def test_attention_by_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:1")
    assert ways_of_attention("auto", cpu) == ("documents", "dense")
    assert ways_of_attention("auto", cuda) == ("varlen", "flex", "documents", "dense")
    assert ways_of_attention("dense", cuda) == ("dense",)


def test_dense_copies_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(UserError, match=r"^quant.dense_layers: model.kernels=reference reads no dense copies"):
        compose_run("sft", ["model=tiny", "peft=qlora", "quant.dense_layers=1", "model.kernels=reference"])
    compose_run("sft", ["model=tiny", "peft=qlora", "quant.dense_layers=auto", "model.kernels=reference"])
