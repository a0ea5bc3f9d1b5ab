"""Merging by the names on disk, which are not those in memory: merged is live, and plain transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.peft.moe import CLASSES, FAST, logits, tiny
from tests.models.peft.test_experts import finished, load, lora
from transformers import AutoModelForCausalLM, Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration, GPT2Config

from posttrain.errors import RunError
from posttrain.models.peft.disk import OnDisk
from posttrain.models.peft.merge import Adapter, write_merged

EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSES if name not in FAST)]


def merged(base: Path, tmp_path: Path) -> Path:
    write_merged(base, Adapter(tmp_path / "out", "run"), tmp_path / "merged")
    return tmp_path / "merged"


@pytest.mark.parametrize("name", EVERY)
def test_merged_is_live(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(name).save_pretrained(base)
    live = finished(base, tmp_path / "out")
    found = merged(base, tmp_path)
    torch.testing.assert_close(logits(load(found)), logits(live), rtol=0, atol=2e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, found))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


def test_names_of_the_body_alone(tmp_path: Path) -> None:
    """Checkpoints of a bare body (GPT-2 as released) leave the model's own prefix off; its matrices are [in, out]."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    live = finished(tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(logits(load(merged(tmp_path / "base", tmp_path))), logits(live), rtol=0, atol=2e-5)
    # a quantized GPT-2 has Linear layers, and its adapter says so; on disk the matrices are as they are
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["fan_in_fan_out"] is True
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(said | {"fan_in_fan_out": False}))
    write_merged(tmp_path / "base", Adapter(tmp_path / "out", "run"), tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(live), rtol=0, atol=2e-5)


def test_a_layer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    tiny("qwen3_moe").save_pretrained(base)
    tiny("qwen3_moe", num_hidden_layers=1).save_pretrained(other)
    finished(base, tmp_path / "out")
    with pytest.raises(RunError, match=r"layers\.1"):
        write_merged(other, Adapter(tmp_path / "out", "run"), tmp_path / "merged")


def test_dequantized_experts_take_the_place_of_those_on_disk(tmp_path: Path) -> None:
    """Every expert's weight, twice what it was, plus its change."""
    base = tmp_path / "base"
    tiny("qwen3_moe").save_pretrained(base)
    finished(base, tmp_path / "out", lora(targets=["experts.down_proj"]))
    state: dict[str, Any] = load(base).state_dict()

    def twice(name: str) -> torch.Tensor | None:
        return 2 * state[name] if ".experts." in name else None

    adapter = Adapter(tmp_path / "out", "run")
    write_merged(base, adapter, tmp_path / "merged", twice)
    found = load(tmp_path / "merged").state_dict()
    experts = "model.layers.1.mlp.experts."
    torch.testing.assert_close(found[experts + "gate_up_proj"], 2 * state[experts + "gate_up_proj"])
    change = adapter.factors(experts + "down_proj").change()
    torch.testing.assert_close(found[experts + "down_proj"], 2 * state[experts + "down_proj"] + change)
    torch.testing.assert_close(found["lm_head.weight"], state["lm_head.weight"])


def test_weights_that_are_converted_together_are_had_one_by_one() -> None:
    """ERNIE's experts for text and for pictures lie in one list; transformers splits both of a layer at once, or none."""
    text: dict[str, Any] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "moe_intermediate_size": [16, 16], "moe_k": 2, "moe_num_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}, "bos_token_id": 1,
        "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"], "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        disk = OnDisk(Ernie4_5_VLMoeForConditionalGeneration(config), ())
    name = "model.language_model.layers.1.mlp.text_moe.experts.down_proj"
    weight = torch.randn(4, 32, 16)
    assert disk.renamed(name) is None
    found = disk.pieces({name: weight})
    assert {key.rpartition("layers.")[2]: value.tolist() for key, value in found.items()} == {
        f"1.mlp.experts.{expert}.down_proj.weight": weight[expert].tolist() for expert in range(4)
    }
