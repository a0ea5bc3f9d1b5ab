"""Merging: the merged model is the live one, the better candidate is kept, and nothing is left behind when it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.commands.merge import merge_run
from posttrain.errors import RunError, UserError
from posttrain.models.language.loading import load_model

IDS = torch.randint(5, 50, (2, 16), generator=torch.Generator().manual_seed(0))
WORDS = (
    "model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=4", "eval.sets=null",
    "optim.lr=0.02",
)  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(folder: Path, *words: str) -> Path:
    posttrain.run("sft", *WORDS, *words, f"run.dir={folder}")
    return folder


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa", "adalora", "vera"])
def test_the_merged_model_is_the_live_one(method: str, tmp_path: Path) -> None:
    run = trained(tmp_path / "run", f"peft={method}", "peft.r=4", "model.dtype=float32")
    figures = merge_run(run, tmp_path / "merged", 1e-3)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(load_model(run).model), rtol=0, atol=1e-4)
    found = figures["candidates"]["full"]
    assert (
        found["kl"] < 1e-6 and found["top1"] > 0.999 and found["perplexity"] == pytest.approx(found["perplexity_live"], rel=1e-4)
    )
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == figures


def test_after_qlora_both_candidates_are_built_and_the_nearer_is_kept(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "peft=qlora", "peft.r=4")
    figures = merge_run(run, tmp_path / "merged", 0.05)
    full, near = figures["candidates"]["full"], figures["candidates"]["dequantized"]
    assert figures["kept"] == "dequantized" and near["kl"] < full["kl"] < 1e-2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not getattr(merged.config, "quantization_config", None)
    live = logits(load_model(run).model)
    assert (logits(merged) - live).abs().max() < 0.05
    other = merge_run(run, tmp_path / "other", 1.0, onto="full")
    assert other["kept"] == "full"


def test_too_far_away_leaves_nothing(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "peft=qlora", "peft.r=4")
    with pytest.raises(RunError, match=r"more than --max-kl 1e-09"):
        merge_run(run, tmp_path / "merged", 1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    run = trained(tmp_path / "full")
    with pytest.raises(UserError, match="is a whole model already"):
        merge_run(run, tmp_path / "out", 1.0)
    for method, why in (("adapter", "not linear"), ("prefix", "no weight"), ("prompt", "no weight")):
        run = trained(tmp_path / method, f"peft={method}")
        with pytest.raises(UserError, match=f"cannot be merged.*{why}"):
            merge_run(run, tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()


def test_damaged_and_zero_adapters_and_taken_places(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "peft=lora", "peft.r=4")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match=r"--out: .* exists already"):
        merge_run(run, tmp_path / "taken", 1.0)
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    file = cut / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"run: .* is damaged"):
        merge_run(cut, tmp_path / "out", 1.0)
    file.unlink()
    with pytest.raises(UserError, match=r"run: .* is missing"):
        merge_run(cut, tmp_path / "out", 1.0)
    with pytest.raises(UserError, match="does not exist"):
        merge_run(tmp_path / "nowhere", tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()
