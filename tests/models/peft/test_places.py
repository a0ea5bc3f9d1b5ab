"""What plain peft would put elsewhere by its name in the model: it stands in a file under its name on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.models.peft.moe import logits, train
from tests.models.peft.test_experts import SAID, finished, load, lora
from transformers import DeepseekOcr2Config, DeepseekOcr2ForConditionalGeneration, LagunaConfig, LagunaForCausalLM

from posttrain.models.peft import places
from posttrain.models.peft.attach import add_frozen, add_method, load_adapter
from posttrain.models.peft.export import export_adapter
from posttrain.models.peft.merge import Adapter, write_merged
from posttrain.models.peft.methods.dora import Dora

FILE = "adapter_model.safetensors"
SHARED = "mlp.shared_expert."  # on disk; shared_experts in memory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LagunaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        num_attention_heads_per_layer=[2, 2], layer_types=["full_attention"] * 2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("laguna")
    LagunaForCausalLM(config).save_pretrained(folder)
    return folder


def test_it_is_written_by_its_name_on_disk(base: Path, tmp_path: Path) -> None:
    """Plain peft, our own loading and merging all find it."""
    live = finished(base, tmp_path)
    assert any(SHARED in key for key in load_file(tmp_path / FILE))
    write_merged(base, Adapter(tmp_path, "run"), tmp_path / "merged")
    plain = PeftModel.from_pretrained(load(base), str(tmp_path))
    for found in (plain, load_adapter(load(base), tmp_path), load(tmp_path / "merged")):
        torch.testing.assert_close(logits(found), logits(live), rtol=0, atol=2e-5)


@pytest.mark.parametrize("experts", [True, False])
def test_stacked(experts: bool, base: Path, tmp_path: Path) -> None:
    finished(base, tmp_path / "init", lora(experts=experts))
    model: Any = add_method(load(base), lora(r=3, alpha=9.0, experts=experts))
    add_frozen(model, tmp_path / "init")
    train(model, 2)
    export_adapter(model, tmp_path / "out", str(base))
    for read in (PeftModel.from_pretrained(load(base), str(tmp_path / "out")), load_adapter(load(base), tmp_path / "out")):
        torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=5e-5)
    adapter = Adapter(tmp_path / "out", "run")
    adapter.name_by(load(base))
    assert "model.layers.1.mlp.shared_experts.up_proj" in adapter.modules


@pytest.mark.parametrize("method", [lora(), Dora(**(SAID | {"method": "dora", "r": 4, "alpha": 8.0}))], ids=["lora", "dora"])
def test_what_has_no_name_that_leads_there_is_left_out(
    method: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As peft writes DoRA, by its names in memory; of a LoRA where the name on disk leads elsewhere too."""
    monkeypatch.setattr(places, "_on_disk", lambda model, place: place)
    live = finished(base, tmp_path, method)
    assert (
        "no adapter on 3 linear layers (down_proj, gate_proj, up_proj): plain peft takes their names for"
        in capsys.readouterr().out
    )
    assert not any("shared" in key for key in load_file(tmp_path / FILE))
    again = PeftModel.from_pretrained(load(base), str(tmp_path))
    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-5)


def test_a_whole_language_model_inside_another_and_its_experts() -> None:
    text = {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}
    with torch.device("meta"):
        model = DeepseekOcr2ForConditionalGeneration(DeepseekOcr2Config(text_config=text))
    layer = "model.language_model.layers.1"
    asked = [f"{layer}.self_attn.q_proj", f"{layer}.mlp.experts", f"{layer}.mlp.experts.base_layer"]
    assert places.places_written(model, asked) == {name: name.replace(".language_model", "") for name in asked}
    tensor = torch.zeros(1)
    found = places.as_read(model, {f"{name.replace('.language_model', '')}.lora_A.weight": tensor for name in asked})
    assert list(found) == [f"{name}.lora_A.weight" for name in asked]
