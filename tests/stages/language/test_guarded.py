"""Tiny runs that mind what they forget: EWC, a curriculum, and a mixture with self-replay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import posttrain
from posttrain.batch import LossOutput
from posttrain.data.examples import build, group
from posttrain.errors import RunError, Stopped
from posttrain.losses.tokens import token_loss
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.objectives import TOKENS
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.stages.language.curriculum import perplexities
from posttrain.stages.language.ewc import EwcPenalty, fisher

TINY = ["model=tiny", "train.max_steps=4", "train.batch_size=2", "train.grad_accum=1", "train.max_length=128"]
TINY += ["eval.rows=4", "eval.max_length=64", "data.eval_rows=4", "optim.lr=0.01", "optim.schedule=constant"]


def run(tmp_path: Path, name: str, *words: str, stage: str = "cpt") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manifest = posttrain.run(stage, *TINY, *words, f"run.dir={tmp_path / name}")
    return manifest, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def general(tmp_path: Path) -> str:
    path = tmp_path / "general.jsonl"
    texts = [f"The {i}th thing to say is that {i} follows {i - 1}." for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def tiny() -> PackedLM:
    directory, _ = builtin_directory("tiny")
    return PackedLM(load_causal(str(directory), None, "float32", "cpu", None, None), "documents")


def test_fisher_is_per_sample(tiny: PackedLM) -> None:
    examples = group(build([([5, 6, 7, 8], [1.0] * 4, 1), ([9, 10, 11], [1.0] * 3, 2)]), 16)
    assert len(examples) == 1  # both in one pack, yet two samples
    found = fisher(tiny, examples, torch.device("cpu"), lambda: None)
    params = dict(tiny.named_parameters())
    name = max(params, key=lambda n: params[n].numel())
    total = torch.zeros_like(params[name])
    for i in range(2):
        batch = TOKENS.pack(examples.only(i), [0])
        (gradient,) = torch.autograd.grad(tiny(batch).sum(), [params[name]])
        total += gradient**2
    torch.testing.assert_close(found[name], total / 2)
    anchor = EwcPenalty(tiny, found, 2.0)
    assert float(anchor.penalty().detach()) == 0.0
    with torch.no_grad():
        params[name].add_(0.1)
    assert float(anchor.penalty().detach()) == pytest.approx(0.01 * float(found[name].sum()), rel=1e-4)
    with torch.no_grad():
        params[name].sub_(0.1)


def test_fisher_in_float16_is_that_of_float32(tiny: PackedLM) -> None:
    """A sequence's log-likelihood times 65,536 overflows: the scale is halved on the way."""
    examples = group(build([([5, 6, 7, 8], [1.0] * 4, 1), ([9, 10, 11], [1.0] * 3, 2)]), 16)
    expected = fisher(tiny, examples, torch.device("cpu"), lambda: None)
    directory, _ = builtin_directory("tiny")
    half = PackedLM(load_causal(str(directory), None, "float16", "cpu", None, None), "documents")
    found = fisher(half, examples, torch.device("cpu"), lambda: None, in_float16=True)
    off = sum(float((found[name] - value).abs().sum()) for name, value in expected.items())
    assert off < 0.02 * sum(float(value.sum()) for value in expected.values())


def test_difficulty_is_the_mean_loss_of_each_unit(tiny: PackedLM) -> None:
    examples = group(build([([5, 6, 7, 8], [1.0] * 4, 1), ([9, 10, 11], [1.0] * 3, 2), (list(range(9)), [1.0] * 9, 3)]), 9)
    found = perplexities(tiny, examples, TOKENS, torch.device("cpu"), lambda: None)
    for unit in range(len(examples)):
        with torch.no_grad():
            assert found[unit] == pytest.approx(float(-tiny(TOKENS.pack(examples, [unit])).mean()), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "partial", "lora"])
def test_ewc_holds_a_run_back(tmp_path: Path, general: str, peft: str) -> None:
    run(tmp_path, "free", f"peft={peft}")
    _, lines = run(tmp_path, "held", f"peft={peft}", "ewc.lambda=1e4", f"ewc.path={general}", "ewc.rows=8")
    penalties = [line["train/penalty"] for line in lines if "train/penalty" in line]
    assert penalties[0] == 0.0 and penalties[-1] > 0
    run(tmp_path, "l2", f"peft={peft}", "ewc.lambda=1e3", "ewc.importance=l2")

    moved = {name: distance(tmp_path / name) for name in ("free", "held", "l2")}
    assert moved["held"] < moved["free"] and moved["l2"] < 0.9 * moved["free"]


def distance(directory: Path) -> float:
    """How far a run has moved: the norm of B, which starts at zero, or of the difference from the base."""
    if (directory / "adapter").exists():
        found = load_file(directory / "adapter" / "adapter_model.safetensors")
        return sum(float((value.float() ** 2).sum()) for name, value in found.items() if "lora_B" in name) ** 0.5
    base = load_file(builtin_directory("tiny")[0] / "model.safetensors")
    found = load_file(directory / "model" / "model.safetensors")
    return sum(float(((value.float() - base[name].float()) ** 2).sum()) for name, value in found.items() if name in base) ** 0.5


@pytest.mark.slow
def test_a_curriculum_shows_in_the_metrics_and_goes_on(tmp_path: Path) -> None:
    words = ["+peft=lora", "curriculum.by=perplexity", "curriculum.beta_start=8", "train.max_steps=8"]
    _, lines = run(tmp_path, "whole", *words, stage="sft")
    drawn = [line["train/difficulty"] for line in lines if "train/difficulty" in line]
    assert sum(drawn[:4]) < sum(drawn[4:])
    with pytest.raises(Stopped):
        run(tmp_path, "parts", *words, "run.stop_after=3", stage="sft")
    run(tmp_path, "parts", *words, stage="sft")
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_mixture_with_self_replay_says_what_it_did(tmp_path: Path) -> None:
    words = ["+peft=lora", "data.alpha=0.4", "data.replay.tokens=500", "data.replay.max_new_tokens=32", "train.max_steps=12"]
    manifest, _ = run(tmp_path, "mix", *words)
    domain, general = manifest["data"]
    assert (domain["share"], general["share"]) == (0.4, 0.6) and general["source"].endswith("self_replay.jsonl")
    assert "self_replay.jsonl" in manifest["files"]
    assert domain["share_seen"] == pytest.approx(0.4, abs=128 / manifest["tokens"])  # a unit at most
    assert domain["tokens_seen"] + general["tokens_seen"] == manifest["tokens"]
    with pytest.raises(Stopped):
        run(tmp_path, "parts", *words, "run.stop_after=5")
    again, _ = run(tmp_path, "parts", *words)
    assert again["data"][0]["tokens_seen"] == domain["tokens_seen"]
    weights = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("mix", "parts")]
    assert weights[0] == weights[1]


def test_rows_of_a_mixture_that_are_left_out_are_named_with_their_source(
    tmp_path: Path, general: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(logps: torch.Tensor, weight: torch.Tensor) -> LossOutput:
        output = token_loss(logps, weight)
        return replace(output, total=output.total * float("nan")) if torch.is_grad_enabled() else output

    monkeypatch.setattr("posttrain.models.language.objectives.token_loss", spoilt)
    (tmp_path / "domain.jsonl").write_text("".join(json.dumps({"text": f"zz {i}"}) + "\n" for i in range(9)))
    words = ["data.alpha=0.5", f"data.path={tmp_path}/domain.jsonl", f"data.general.path={general}", "data.eval_share=0"]
    with pytest.raises(RunError, match=rf"Rows of the batch: .*{tmp_path}/\w+.jsonl, row \d+;.* more \(all of them in left_out"):
        run(tmp_path, "run", *words)
    (entry,) = json.loads((tmp_path / "run" / "left_out.json").read_text())
    for source, file, count in (("domain", tmp_path / "domain.jsonl", 9), ("general", general, 60)):
        rows = [row.removeprefix(f"{source}: {file}, row ") for row in entry["rows"] if row.startswith(f"{source}: ")]
        assert rows and {int(row) for row in rows} <= set(range(1, count + 1)) and len(rows) < len(entry["rows"])


@pytest.mark.slow
def test_a_budget_ends_a_run_with_what_is_within_it(tmp_path: Path) -> None:
    """Training hard on a few rows forgets the rest: past the budget the run ends, with the last checkpoint within it."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "zz zz zz zz zz zz zz zz"}) + "\n")
    words = [
        f"data.path={tmp_path}/rows.jsonl",
        "data.eval_share=0",
        "optim.lr=0.003",
        "train.max_steps=12",
        "train.save_steps=2",
    ]
    free, lines = run(tmp_path, "free", *words, "forgetting.budget=1%")
    course = {line["step"]: line["forgetting/percent"] for line in lines if "forgetting/percent" in line}
    assert "ended" not in free and free["steps"] == 12 and free["metrics"]["forgetting/percent"] > 1
    last = max([step for step, percent in course.items() if percent <= 1], default=0)
    kept = {path.name for path in (tmp_path / "free" / "checkpoints").iterdir()}
    assert last == 6 and kept == {"step-000006", "step-000010", "step-000012"}, "the newest two, and the last within the budget"
    first_over = min(step for step, percent in course.items() if percent > 1)
    stopped, _ = run(tmp_path, "stopped", *words, "forgetting.budget=1", "forgetting.action=stop")
    assert stopped["ended"] == {"step": first_over, "back_to": first_over - 2} and stopped["steps"] == first_over - 2
    assert stopped["metrics"]["forgetting/percent"] <= 1
    assert stopped["tokens"] == sum(entry["tokens_seen"] for entry in stopped["data"])
