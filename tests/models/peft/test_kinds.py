"""Adapters that nobody here has made, or of which more is said than a merge knows, are refused by name, never merged in part."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import FourierFTConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.commands.compose import compose_runs
from posttrain.commands.merge import merge_run
from posttrain.errors import UserError
from posttrain.models.peft.kinds import is_plain_sum, kind_of
from posttrain.models.peft.merge import Adapter

WORDS = ("model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=4", "eval.sets=null")
KNOWN = "c3a, dora, gralora, hira, ia3, loha, lokr, lora, miss, oft, shira, vera"
UNKNOWN = rf"its adapter is of peft's type FOURIERFT, which is not known here \(what can be merged: {KNOWN}\)"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    posttrain.run("sft", *WORDS, "peft=lora", "peft.r=4", f"run.dir={run}")
    return run


def altered(run: Path, out: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a finished run with another adapter, which its manifest vouches for."""
    shutil.copytree(run, out)
    change(out / "adapter")
    manifest = json.loads((out / "manifest.json").read_text())
    for name in manifest["files"]:
        if name.startswith("adapter/"):
            manifest["files"][name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def into_fourierft(adapter: Path) -> None:
    """The files that plain peft writes of a FourierFT, which is no method here, and whose change is no zero."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    torch.manual_seed(0)
    config = FourierFTConfig(n_frequency=9, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(adapter))


def test_fourierft_files_are_refused_everywhere(lora: Path, tmp_path: Path) -> None:
    strange = altered(lora, tmp_path / "strange", into_fourierft)
    assert set(load_file(strange / "adapter" / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=f"run: {UNKNOWN}"):
        merge_run(strange, tmp_path / "merged", 1e9)
    with pytest.raises(UserError, match=f"compose: {UNKNOWN}"):
        compose_runs([str(strange), str(lora)], tmp_path / "composed", None, None)
    for mode in ("auto", "merge", "continue", "stack"):
        for method in ("lora", "none"):
            with pytest.raises(UserError, match=f"init: {UNKNOWN}"):
                posttrain.run(
                    "sft", *WORDS, f"peft={method}", f"init={strange}", f"chain.mode={mode}", f"run.dir={tmp_path}/{mode}{method}"
                )
    assert not (tmp_path / "merged").exists() and not (tmp_path / "composed").exists()


def setting(**more: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))

    return change


def with_tensor(name: str) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file(load_file(file) | {name: torch.ones(2, 2)}, file)

    return change


def without_layers(adapter: Path) -> None:
    save_file({}, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (setting(use_qalora=True), "use_qalora=True"),
        (setting(bias="all"), "bias=all"),
        (setting(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (setting(modules_to_save=["embed_tokens"]), "modules_to_save"),
        (setting(a_key_of_a_peft_to_come={"x": 1}), "a_key_of_a_peft_to_come"),
        (with_tensor("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens.lora_embedding_A"),
        (without_layers, "it changes no layer"),
    ],
)
def test_a_lora_that_is_more_than_one_is_not_merged_in_part(
    lora: Path, tmp_path: Path, change: Callable[[Path], None], why: str
) -> None:
    run = altered(lora, tmp_path / "odd", change)
    with pytest.raises(UserError, match=f"run: its adapter cannot be merged .*{why}"):
        merge_run(run, tmp_path / "merged", 1e9)
    with pytest.raises(UserError, match=f"init: its adapter cannot be merged .*{why}"):
        posttrain.run("sft", *WORDS, "peft=dora", f"init={run}", f"run.dir={tmp_path}/child")
    assert not (tmp_path / "merged").exists()


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj"]),
    "rslora": LoraConfig(r=4, use_rslora=True, lora_dropout=0.1, rank_pattern={"q_proj": 2}),
    "dora": LoraConfig(use_dora=True),
    "vera": VeraConfig(),
    "fourierft": FourierFTConfig(),
}


@pytest.mark.parametrize(
    ("name", "kind", "is_sum"),
    [
        ("lora", "lora", True),
        ("rslora", "lora", True),
        ("dora", "dora", False),
        ("vera", "vera", False),
        ("fourierft", None, False),
    ],
)
def test_kinds_of_what_peft_writes(name: str, kind: str | None, is_sum: bool, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    found = kind_of(config)
    assert (found.name if found else None) == kind and is_plain_sum(config) is is_sum
    assert not found or found.objection(config) == ""


def test_a_reward_models_head_is_left_out_of_a_merge(lora: Path, tmp_path: Path) -> None:
    """Its body is a LoRA like any other; the head is no part of the language model."""

    def into_scorer(adapter: Path) -> None:
        setting(task_type="SEQ_CLS", modules_to_save=["score"])(adapter)
        with_tensor("base_model.model.score.weight")(adapter)

    run = altered(lora, tmp_path / "rm", into_scorer)
    found = Adapter(run / "adapter", "run")
    assert found.kind.objection(found.config, found.tensors) == ""
    assert found.modules == Adapter(lora / "adapter", "run").modules


def test_a_value_model_cannot_start_from_what_does_not_merge(tmp_path: Path) -> None:
    """A reward model on bottleneck adapters: its scores can be had, but no base that a value model could begin with."""
    posttrain.run("rm", *WORDS, "peft=adapter", "peft.r=4", f"run.dir={tmp_path}/rm")
    words = ["model=tiny", "peft=lora", "train.max_steps=1", "train.batch_size=2", "train.grad_accum=4", "data.max_rows=20"]
    with pytest.raises(UserError, match=r"init_reward: its adapter cannot be merged \(bottleneck adapters are not linear\)"):
        posttrain.run("ppo", *words, f"init_reward={tmp_path}/rm", f"run.dir={tmp_path}/ppo")
