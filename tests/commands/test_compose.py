"""Composing: the sum of the changes, to the last bit that float32 has, or one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.commands.compose import compose_runs, parse_sum
from posttrain.errors import UserError
from posttrain.models.language.loading import load_model
from posttrain.models.peft.merge import Adapter

IDS = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0))
WORDS = (
    "model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=4", "eval.sets=null",
    "optim.lr=0.02",
)  # fmt: skip


def trained(folder: Path, *words: str) -> Path:
    posttrain.run("sft", *WORDS, "model.dtype=float32", *words, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "a": trained(folder / "a", "peft=lora", "peft.r=2", "peft.alpha=4", "train.seed=1"),
        "b": trained(folder / "b", "peft=lora", "peft.r=8", "peft.alpha=8", "peft.targets=[q_proj,v_proj]", "train.seed=2"),
        "c": trained(folder / "c", "peft=rslora", "peft.r=4", "peft.alpha=8", "train.seed=3"),
    }


def deltas(adapter_dir: Path) -> dict[str, torch.Tensor]:
    """(alpha / r) B A of every layer, from the files alone."""
    config = json.loads((adapter_dir / "adapter_config.json").read_text())
    tensors = load_file(adapter_dir / "adapter_model.safetensors")
    ends = ".lora_A.weight"
    adapter = Adapter(adapter_dir, "test")
    found = {}
    for name in (n.removesuffix(ends) for n in tensors if n.endswith(ends)):
        a, b = tensors[name + ends].double(), tensors[name + ".lora_B.weight"].double()
        patterns = config["alpha_pattern"]
        module = name.removeprefix("base_model.model.")
        alpha = next((v for k, v in patterns.items() if k.replace("\\", "") == module), config["lora_alpha"])
        found[module] = (b @ a) * alpha / len(a)
    assert sorted(found) == adapter.modules
    return found


def logits(run: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(run).model(IDS).logits


def test_the_change_is_the_weighted_sum(runs: dict[str, Path], tmp_path: Path) -> None:
    """Ranks 2, 8 and 4, alphas 4 and 8, other targets, and rsLoRA; and peft computes with it what the sum says."""
    compose_runs([str(runs[n]) for n in "abc"], tmp_path / "out", [0.5, -1.0, 2.0], None)
    got = deltas(tmp_path / "out" / "adapter")
    parts = {name: deltas(run / "adapter") for name, run in runs.items()}
    for module, delta in got.items():
        want = sum(w * parts[n].get(module, torch.zeros_like(delta)) for n, w in (("a", 0.5), ("b", -1.0), ("c", 2.0)))
        torch.testing.assert_close(delta, want, rtol=0, atol=1e-6)
    merged: Any = load_model(tmp_path / "out").model.merge_and_unload()
    base = load_model(runs["a"]).model.get_base_model()
    for module, delta in got.items():
        weight = base.get_submodule(module).base_layer.weight
        torch.testing.assert_close(merged.get_submodule(module).weight.double(), weight.double() + delta, rtol=0, atol=1e-6)


def test_one_adapter_with_weight_one_is_itself(runs: dict[str, Path], tmp_path: Path) -> None:
    compose_runs([str(runs["c"])], tmp_path / "same", [1.0], None)
    torch.testing.assert_close(logits(tmp_path / "same"), logits(runs["c"]), rtol=0, atol=1e-5)


def test_what_is_added_and_taken_away_is_gone(runs: dict[str, Path], tmp_path: Path) -> None:
    a, b = runs["a"], runs["b"]
    compose_runs([f"{a} + {b} - {b}"], tmp_path / "back", None, None)
    torch.testing.assert_close(logits(tmp_path / "back"), logits(a), rtol=0, atol=1e-5)


def test_expressions() -> None:
    assert parse_sum(["a-1/x + 0.5*b - 2*c"], None) == ([Path("a-1/x"), Path("b"), Path("c")], [1.0, 0.5, -2.0])
    assert parse_sum(["- a + b"], None) == ([Path("a"), Path("b")], [-1.0, 1.0])
    assert parse_sum(["a", "b"], None) == ([Path("a"), Path("b")], [1.0, 1.0])


def test_learned_weights_find_the_adapter_that_knows(runs: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "the value of the function is the list of the keys " * 3}] * 12
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    posttrain.run(
        "cpt", "model=tiny", "model.dtype=float32", "peft=lora", "train.max_steps=12", "train.batch_size=2", f"data.path={file}",
        "data.eval_share=0", "eval.sets=null", "optim.lr=0.02", f"run.dir={tmp_path}/knows",
    )  # fmt: skip
    manifest = compose_runs([str(tmp_path / "knows"), str(runs["c"])], tmp_path / "learned", None, file)
    knows, other = (each["weight"] for each in manifest["sum"])
    assert knows > 0.5 > other


def test_a_composed_adapter_is_a_run_to_start_from(runs: dict[str, Path], tmp_path: Path) -> None:
    compose_runs([str(runs["a"]), str(runs["b"])], tmp_path / "sum", [0.5, 0.5], None)
    manifest = posttrain.run("sft", *WORDS, "peft=lora", "peft.r=2", f"init={tmp_path}/sum", f"run.dir={tmp_path}/next")
    assert manifest["parents"][0]["path"] == str(tmp_path / "sum")


def test_bad_input(runs: dict[str, Path], tmp_path: Path) -> None:
    a, out = str(runs["a"]), tmp_path / "out"

    def refused(match: str, words: list[str], weights: list[float] | None = None) -> None:
        with pytest.raises(UserError, match=match):
            compose_runs(words, out, weights, None)
        assert not out.exists()

    refused(r"--weights: 1 weights for 2 runs", [a, a], [1.0])
    refused(r"did you mean 'a'", [str(runs["a"].with_name("aa"))])
    refused(r"--weights: the expression has its own", [f"{a} + {a}"], [1.0])
    for method, why in (("dora", "no sum of matrices"), ("prompt", "no sum of matrices")):
        refused(why, [a, str(trained(tmp_path / method, f"peft={method}"))])
    refused("is a whole model", [a, str(trained(tmp_path / "full"))])
    zero = trained(tmp_path / "zero", "peft=lora", "peft.r=2")
    file = zero / "adapter" / "adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(file).items()}, file)
    refused("is damaged", [a, str(zero)])
    manifest = json.loads((zero / "manifest.json").read_text())
    from posttrain.runs.files import sha256

    manifest["files"]["adapter/adapter_model.safetensors"] = sha256(file)
    (zero / "manifest.json").write_text(json.dumps(manifest))
    refused("all zero", [a, str(zero)])
    manifest["base"]["digest"] = "another"
    (zero / "manifest.json").write_text(json.dumps(manifest))
    save_file({n: t + 1 for n, t in load_file(file).items()}, file)
    manifest["files"]["adapter/adapter_model.safetensors"] = sha256(file)
    (zero / "manifest.json").write_text(json.dumps(manifest))
    refused("another base", [a, str(zero)])
