"""A weight that two layers share (Zamba's): it has one adapter, which is merged into it once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.models.peft.moe import logits
from tests.models.peft.test_experts import SAID, finished, load, lora
from transformers import ZambaConfig, ZambaForCausalLM

from posttrain.errors import RunError, UserError
from posttrain.models.peft.attach import add_method, merge_into
from posttrain.models.peft.merge import Adapter, write_merged
from posttrain.models.peft.methods.dora import Dora
from posttrain.models.peft.methods.pissa import Pissa

FILE = "adapter_model.safetensors"
SHARED = "model.layers.{}.shared_transf.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ZambaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        attention_hidden_size=64, attention_head_dim=16, n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=8,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("zamba")
    ZambaForCausalLM(config).save_pretrained(folder)
    return folder


def merged(base: Path, out: Path) -> Any:
    write_merged(base, Adapter(out, "run"), out / "merged")
    return load(out / "merged")


@pytest.mark.parametrize("method", [lora(), Dora(**(SAID | {"method": "dora", "r": 4, "alpha": 8.0}))], ids=["lora", "dora"])
def test_merged_is_live(base: Path, tmp_path: Path, method: Any) -> None:
    live = finished(base, tmp_path, method)
    tensors = load_file(tmp_path / FILE)
    for half in "AB":
        first, second = (tensors[f"base_model.model.{SHARED.format(place)}.lora_{half}.weight"] for place in (1, 3))
        assert torch.equal(first, second)
    plain = PeftModel.from_pretrained(load(base), str(tmp_path))
    for found in (plain, merged(base, tmp_path), merge_into(load(base), tmp_path)):
        torch.testing.assert_close(logits(found), logits(live), rtol=0, atol=2e-5)


def test_it_is_trained_on_as_one(base: Path, tmp_path: Path) -> None:
    live = finished(base, tmp_path)
    again = lora().continue_from(load(base), tmp_path)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (live, again)]
    assert counts[0] == counts[1]
    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-5)


def test_two_changes_of_one_weight_are_refused(base: Path, tmp_path: Path) -> None:
    """As plain peft trains them."""
    finished(base, tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors[f"base_model.model.{SHARED.format(3)}.lora_B.weight"] *= 2
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="share a weight"):
        lora().continue_from(load(base), tmp_path)
    with pytest.raises(RunError, match=r"layers\.1\.shared.* and .*layers\.3\.shared.* share one weight"):
        merged(base, tmp_path)
    with pytest.raises(UserError, match="share a weight"):
        merge_into(load(base), tmp_path)


def test_what_writes_into_the_base_leaves_them_out(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PiSSA would take two parts out of the one weight, and give one back."""
    before = load(base)
    said: dict[str, Any] = lora().model_dump() | {"method": "pissa", "init": "pissa"}
    made = add_method(load(base), Pissa(**said))
    assert any("lora_A" in name for name, _ in made.named_parameters())
    assert "other layers share" in capsys.readouterr().out
    torch.testing.assert_close(logits(made), logits(before), rtol=0, atol=1e-4)
