"""The GPU benchmark runs as it is, on a toy shape."""

import argparse
from pathlib import Path
from typing import Any

import pytest

import gpu
import gpu_all
import gpu_model

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
def test_a_case_is_a_process_that_says_why_it_fails() -> None:
    found = gpu_all.run_case(f"{' '.join(TOY)} --stage dpo --peer trl", 300)
    assert found == {"failed": "gpu.py: error: --peer: the others are asked for sft alone; say --stage sft"}


def test_pairs_have_their_prompt_once() -> None:
    batch = gpu.random_pairs(256, 2, 50)
    assert batch.tokens.shape == (1, 256) and len(batch.target) == 2 * 2 * 32 and batch.num_answers == 4


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
    import torch
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
    report = gpu_all.run_all((("a", "--a", ("trl", "unsloth")),), 1)
    assert [each["contender"] for each in report["cases"]] == ["posttrain", "trl", "unsloth"]
    assert report["cases"][2]["failed"] == "unsloth: unsloth is not installed" and report["left_out"] == []
    assert report["ratios"] == [{"case": "a", "peer": "trl", "ratio": 3.0, "spread": [1.0, 8.0]}]
    late = gpu_all.run_all((("a", "--a", ("trl",)),), 0)
    assert late == {"cases": [], "left_out": ["a: posttrain", "a: trl"], "ratios": []}


@pytest.mark.slow
def test_its_picture_names_case_and_contender(tmp_path: Path) -> None:
    gpu_all.draw({"cases": [{"case": "a", "contender": "trl", "tokens_per_second": 3.0}, {"case": "b"}]}, tmp_path / "gpu.svg")
    assert "a: trl" in (tmp_path / "gpu.svg").read_text()


def test_a_peer_that_is_not_installed_says_so() -> None:
    import gpu_peers

    with pytest.raises(SystemExit, match=r"^unsloth: no_such_module is not installed$"):
        gpu_peers.require("no_such_module", "unsloth")
