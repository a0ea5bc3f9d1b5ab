"""The GPU benchmark runs as it is, on a toy shape."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu
import gpu_all
import gpu_goals
import gpu_limits
import gpu_model
from gpu_goals import Goal
from posttrain.runs.identity import library_versions

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
TOY = ["--shape", "toy", "--tokens", "128", "--documents", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "share"),
    [
        ([], "share_of_matmul_rate"),
        (["--quant", "nf4", "--recompute", "2", "--dense", "1"], "share_of_matmul_rate"),
        (["--full"], "share_of_matmul_rate"),
        (["--shape", "toy-moe"], "share_of_matmul_rate"),
        (["--stage", "dpo"], "share_of_matmul_rate"),
        (["--stage", "rm"], "share_of_matmul_rate"),
        (["--stage", "ppo"], "share_of_matmul_rate"),
        (["--rollout", "--new", "6"], "floor_share"),
        (["--generate", "--new", "6"], "floor_share"),
    ],
)
def test_gpu_benchmark_on_a_toy_shape(words: list[str], share: str) -> None:
    found = gpu.measure([*TOY, *words])
    assert found["tokens_per_second"] > 0 and 0 < found[share] < 1


@pytest.mark.slow
def test_the_longest_context_of_a_toy_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory ends above 200 tokens: the search goes in parts of 8, with every layer recomputed."""
    step = gpu.Ours.step

    def short(self: gpu.Ours, batch: Any) -> None:
        if batch.tokens.shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        step(self, batch)

    monkeypatch.setattr(gpu.Ours, "step", short)
    found = gpu.measure(["--shape", "toy", "--longest", "256"])
    assert (found["longest_tokens"], found["layers_recomputed"]) == (200, 4)


@pytest.mark.slow
def test_a_case_is_a_process_that_says_why_it_fails() -> None:
    found = gpu_all.run_case(f"{' '.join(TOY)} --stage dpo --peer trl", 300)
    why = "gpu.py: error: --peer: the others are asked for sft alone; say --stage sft"
    assert found["failed"] == found["said"][-1] == why and len(found["said"]) > 1


def test_pairs_have_their_prompt_once() -> None:
    batch = gpu.random_pairs(256, 2, 50)
    assert batch.tokens.shape == (1, 256) and len(batch.target) == 2 * 2 * 32 and batch.num_answers == 4


def test_the_longest_context_is_where_memory_ends() -> None:
    """Of 32 parts of 4,096 tokens 20 fit: each is tried once, and what a failed one has left is forgotten."""
    tried, forgotten = list[int](), list[int]()

    def step(tokens: int) -> None:
        tried.append(tokens // 4096)
        if tokens > 82_000:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

    assert gpu_limits.longest(step, lambda: forgotten.append(tried[-1]), 131_072) == 81_920
    assert tried == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21] and forgotten == [32, 24, 22, 21]
    assert gpu_limits.longest(lambda tokens: None, tried.clear, 131_072) == 131_072
    assert gpu_limits.longest(lambda tokens: step(10**6), tried.clear, 131_072) == 0
    with pytest.raises(ZeroDivisionError):
        gpu_limits.longest(lambda tokens: 1 / 0, tried.clear, 64)


def test_a_smaller_card_leaves_as_much_to_cuda_as_a_plan_does(monkeypatch: pytest.MonkeyPatch) -> None:
    total, left = 85e9, 24e9 - 2**30
    assert gpu_limits.share(24, total) == left / total
    with pytest.raises(SystemExit, match=r"^--cap: 90 GB, and this card has 85.0 GB, of which CUDA takes 1.1$"):
        gpu_limits.share(90, total)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^--cap: needs a CUDA card; leave it out$"):
        gpu.measure([*TOY, "--cap", "24"])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (60e9, total))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 5e9)
    assert gpu_limits.free_bytes(None) == 60e9 and gpu_limits.free_bytes(24) == pytest.approx(left - 5e9)


def test_the_share_of_a_rate_and_the_floor_of_memory_by_hand() -> None:
    """A step of 8,192 tokens, all predicted, of 7 and 0.5 billion numbers in 0.6 s: 409.6 TFLOP/s, of 800 that a card does."""
    assert gpu_model.share_of_rate(8192, 8192, (4 * 7e9, 4 * 0.5e9), 0.6, 800e12) == pytest.approx(0.512)
    # GB: weights 3.60 and 2.10, factors 0.25, inputs 0.54, a layer 0.37; of 65B 33.42, 1.05, 1.20, 2.68, 0.74
    floors = [gpu_model.floor_bytes(shape, "nf4", 16, 2048) or 0.0 for shape in ("8b", "65b")]
    assert [each / 1e9 for each in floors] == pytest.approx([6.86, 39.08], abs=0.01)
    assert gpu_model.floor_bytes("30b-moe", "none", 16, 2048) is None


def found(case: str, device: str = "NVIDIA H100 80GB HBM3", **figures: float) -> dict[str, Any]:
    return {"case": case, "contender": "posttrain", "device": device, **figures}


def test_goals_are_reached_missed_or_not_seen() -> None:
    goals = (
        Goal("fast", "a", "speed", 10, card="H100"),
        Goal("as fast as b", "a", "speed", 0.9, over=("b", "speed")),
        Goal("small", "b", "gb", 2, at_most=True),
    )
    cases = [found("a", speed=12.0), found("b", speed=16.0, gb=1.6), {"case": "a", "contender": "trl", "speed": 1.0}]
    judged = gpu_goals.judged(cases, goals)
    assert [(each["found"], each["state"]) for each in judged] == [(12.0, "reached"), (0.75, "missed"), (1.6, "reached")]
    assert [each["share"] for each in judged] == pytest.approx([1.2, 0.75 / 0.9, 1.25])
    assert judged[1]["says"] == "0.75, wanted at least 0.9" and judged[2]["wanted"] == "at most 2"
    cases = [found("a", "NVIDIA L4", speed=12.0), {**found("b"), "failed": "out of memory"}]
    assert [(each["state"], each["says"]) for each in gpu_goals.judged(cases, goals)] == [
        ("not seen", "measured on NVIDIA L4, wanted on H100"),
        ("not seen", "b failed: out of memory"),
        ("not seen", "b failed: out of memory"),
    ]
    on_cpu = gpu_goals.judged([found("b", "CPU", gb=1.0)], goals[2:])
    assert on_cpu[0]["says"] == "measured on CPU, wanted on a card" and on_cpu[0]["share"] is None
    assert gpu_goals.judged([found("b")], goals[2:])[0]["says"] == "b says no gb"


@pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
def test_the_goals_stand_in_the_page() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith(gpu_goals.page()), "write gpu_goals.page() at its end"


def test_what_is_seen_of_goals_is_the_reports() -> None:
    """Made-up figures: a share that reaches its goal; of the others it says that they were not measured."""
    made = gpu_goals.page({"date": "2030-01-02", "cases": [found("8b lora", share_of_matmul_rate=0.61)]})
    assert "| at least 0.55 | H100 | reached: 0.61, wanted at least 0.55 |" in made
    assert made.count("not seen: ") == len(gpu_goals.GOALS) - 1 and "2030-01-02" in made


def test_every_goal_has_its_case_and_every_case_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of all cases are those of gpu.py, of the shapes that the issue names."""
    named = {case for case, *_ in gpu_all.CASES}
    assert {goal.case for goal in gpu_goals.GOALS} | {goal.over[0] for goal in gpu_goals.GOALS if goal.over} <= named
    asked: list[argparse.Namespace] = []
    for name in ("run_ours", "run_rollout", "run_longest"):
        monkeypatch.setattr(gpu, name, lambda options, device: asked.append(options) or {})
    monkeypatch.setattr(gpu, "cap", lambda gigabytes: None)
    for _, words, _ in gpu_all.CASES:
        gpu.measure(words.split())
    assert len(asked) == len(gpu_all.CASES)
    assert {each.shape for each in asked} == {"1b", "8b", "30b-moe", "65b"}
    assert {each.stage for each in asked} == {"sft", "dpo", "rm", "ppo"} and any(each.full for each in asked)
    assert {each.cap for each in asked} == {None, 24, 48}


OPTIONS: dict[str, Any] = {"quant": "none", "rank": 4, "full": False}


def test_the_products_that_a_token_needs_by_hand() -> None:
    """4 a frozen number and 6 a trained one; of 8 experts a token goes to 2; nothing for the embedding and norms."""
    attention, mlp, head = 2 * 128 * 128 + 2 * 128 * 64, 3 * 128 * 384, 1024 * 128
    lora = 4 * (2 * 256 + 2 * 192 + 3 * 512)
    model, _ = gpu.adapted(argparse.Namespace(shape="toy", **OPTIONS), "cpu")
    assert gpu_model.needed(model, "toy") == (4 * 4 * (attention + mlp) + 6 * 4 * lora, 4 * head)
    full, _ = gpu.adapted(argparse.Namespace(shape="toy", **{**OPTIONS, "full": True}), "cpu")
    assert gpu_model.needed(full, "toy") == (6 * 4 * (attention + mlp), 6 * head)
    experts, router, mix = 8 * 3 * 64 * 32, 8 * 64, 2 * 64 * 64 + 2 * 64 * 32
    moe = gpu_model.random_model("toy-moe", "none", "cpu")
    assert gpu_model.needed(moe, "toy-moe") == (4 * 2 * (mix + router + experts / 4), 4 * 1024 * 64)


@pytest.mark.parametrize(("shape", "billions"), [("1b", 1.24 + 0.26), ("8b", 8.03), ("30b-moe", 30.5), ("65b", 65.3)])
def test_the_shapes_are_those_that_they_are_called_after(shape: str, billions: float) -> None:
    """In numbers, embedding and head apart: Llama 3.2 1B ties its, and has 0.26 less."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(gpu_model.config_of(shape, num_hidden_layers=1))
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - layer
    assert (gpu_model.SHAPES[shape]["num_hidden_layers"] * layer + rest) / 1e9 == pytest.approx(billions, rel=0.01)


def test_all_of_it_is_one_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails stands there with its reason, ratios are ours over theirs, and no case is begun after its time."""
    said: dict[str, dict[str, Any]] = {
        "--a": {"contender": "posttrain", "tokens_per_second": 300.0, "spread": [200.0, 400.0]},
        "--a --peer trl": {"contender": "trl", "tokens_per_second": 100.0, "spread": [50.0, 200.0]},
        "--a --peer unsloth": {"failed": "unsloth: unsloth is not installed"},
    }
    monkeypatch.setattr(gpu_all, "run_case", lambda words, timeout: said[words])
    said["--b"] = {"contender": "posttrain", "tokens_per_second": 1.0, "spread": [1.0, 1.0]}
    report = gpu_all.run_all((("a", "--a", ("trl", "unsloth")), ("b", "--b", ())), 1)
    order = [("a", "posttrain"), ("b", "posttrain"), ("a", "trl"), ("a", "unsloth")]
    assert [(each["case"], each["contender"]) for each in report["cases"]] == order
    assert report["cases"][3]["failed"] == "unsloth: unsloth is not installed" and report["left_out"] == []
    assert report["ratios"] == [{"case": "a", "peer": "trl", "ratio": 3.0, "spread": [1.0, 8.0]}]
    assert {each["state"] for each in report["goals"]} == {"not seen"} and len(report["goals"]) == len(gpu_goals.GOALS)
    assert "torch" in report["libraries"] and len(report["date"]) == 10
    again = gpu_all.run_all((("a", "--a", ("trl", "unsloth")), ("b", "--b", ())), 0, before=report["cases"][:3])
    assert again["cases"] == report["cases"][:3] and again["left_out"] == ["a: unsloth"]
    late = gpu_all.run_all((("a", "--a", ("trl",)),), 0)
    assert late["cases"] == late["ratios"] == [] and late["left_out"] == ["a: posttrain", "a: trl"]


def test_a_report_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """With what did not fail, of the same card and libraries; else all of it is measured anew."""
    assert gpu_all.measured_before(tmp_path / "gpu.json") == []
    cases = [{"case": "a", "device": "CPU"}, {"case": "b", "failed": "x"}, {"case": "c", "device": "NVIDIA H100 80GB HBM3"}]
    report = {"libraries": library_versions(), "cases": cases}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    assert gpu_all.measured_before(tmp_path / "gpu.json") == cases[:1]
    (tmp_path / "gpu.json").write_text(json.dumps(report | {"libraries": {"torch": "1.0"}}))
    assert gpu_all.measured_before(tmp_path / "gpu.json") == []


@pytest.mark.slow
def test_its_picture_names_case_contender_and_goal(tmp_path: Path) -> None:
    cases = [{"case": "a", "contender": "trl", "tokens_per_second": 3.0}, {"case": "b", "contender": "trl"}]
    gpu_all.draw({"cases": cases, "goals": gpu_goals.judged(cases)}, tmp_path / "gpu.svg")
    drawn = (tmp_path / "gpu.svg").read_text()
    assert "a: trl" in drawn and f"{gpu_goals.GOALS[0].name}: not seen" in drawn


def test_a_peer_that_is_not_installed_says_so() -> None:
    import gpu_peers

    with pytest.raises(SystemExit, match=r"^unsloth: no_such_module is not installed$"):
        gpu_peers.require("no_such_module", "unsloth")


def test_trls_best_flags_reach_its_model_and_its_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention is the model's own: TRL does not set it of a model that is there already."""
    import gpu_peers

    seen: list[Any] = []
    model = SimpleNamespace(set_attn_implementation=seen.append)
    monkeypatch.setattr(gpu_peers, "require", lambda module, peer: seen.append(module))
    monkeypatch.setattr(gpu_peers, "random_model", lambda *_, **__: model)
    monkeypatch.setattr(gpu_peers, "_by_trainer", lambda given, *_, **flags: seen.append((given is model, flags)) or {})
    gpu_peers.run_trl_best(argparse.Namespace(shape="toy", **OPTIONS), "cuda")
    flags = {"gradient_checkpointing": False, "use_liger_kernel": True, "bf16": True}
    assert seen == ["liger_kernel", "sdpa", (True, flags)]
    seen.clear()
    monkeypatch.setattr(gpu_peers, "find_spec", lambda name: name == "flash_attn")
    gpu_peers.run_trl_best(argparse.Namespace(shape="toy", **OPTIONS), "cuda")
    assert seen == ["liger_kernel", "flash_attention_2", (True, flags | {"padding_free": True})]


def test_trls_best_recomputes_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_peers

    def trains(*_: Any, gradient_checkpointing: bool = True, **__: Any) -> dict[str, Any]:
        if not gradient_checkpointing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_second": 1.0}

    monkeypatch.setattr(gpu_peers, "require", lambda *_: None)
    monkeypatch.setattr(gpu_peers, "run_trl", trains)
    found = gpu_peers.run_trl_best(argparse.Namespace(shape="toy", **OPTIONS), "cuda")
    assert found == {"tokens_per_second": 1.0, "recomputes": True, "attention": "sdpa"}
