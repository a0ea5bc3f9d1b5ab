"""NF4 over fused experts: what they are quantized to, LoRA on top, and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from tests.models.peft.moe import CLASSES, FAST, IDS, logits, tiny, train
from tests.models.peft.test_experts import load, lora
from transformers import AutoModelForCausalLM

from posttrain.models.layers import fused_experts
from posttrain.models.peft.attach import add_frozen, add_method, load_adapter
from posttrain.models.peft.export import export_adapter
from posttrain.models.quantization import keep_as_quantized
from posttrain.models.quantization.nf4 import nf4

EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSES if name not in FAST)]


def quantized(base: Path) -> Any:
    config = nf4(True, "float32", "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    keep_as_quantized(model)
    return model


@pytest.mark.parametrize("name", EVERY)
def test_experts_are_what_bitsandbytes_makes_of_them(name: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "base")
    plain, model = load(tmp_path / "base"), quantized(tmp_path / "base")
    found = list(fused_experts(model))
    assert found
    for full, module, own in found:
        weight = plain.state_dict()[full]
        packed, state = quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        assert getattr(module, own).equal(dequantize_4bit(packed, state))
        held: Any = module.parametrizations
        assert held[own].original.dtype is torch.uint8
        assert held[own].original.numel() * 2 == weight.numel()


@pytest.mark.parametrize("name", EVERY)
def test_lora_on_quantized_experts_trains_and_loads_on_either_base(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(name).save_pretrained(base)
    model: Any = add_method(quantized(base), lora())
    torch.testing.assert_close(logits(model), logits(quantized(base)), rtol=0, atol=1e-5)
    train(model)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    reached = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and ".experts." in n}
    assert reached and all(grad is not None and float(grad.abs().sum()) > 0 for grad in reached.values())
    export_adapter(model, tmp_path / "out", str(base))
    torch.testing.assert_close(logits(load_adapter(quantized(base), tmp_path / "out")), logits(model), rtol=0, atol=2e-5)
    ours, plain = load_adapter(load(base), tmp_path / "out"), PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(ours), logits(plain), rtol=0, atol=1e-5)
    stacked: Any = add_method(quantized(base), lora(r=2))
    add_frozen(stacked, tmp_path / "out")
    torch.testing.assert_close(logits(stacked), logits(model), rtol=0, atol=2e-5)


def test_the_change_of_a_step_is_gone_after_it(tmp_path: Path) -> None:
    """Twice the same forward pass is twice the same; what is read outside of it is the base's."""
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    model: Any = add_method(quantized(tmp_path / "base"), lora())
    train(model)
    first = logits(model)
    assert logits(model).equal(first) and logits(model).equal(first)
    experts = [(module, own) for _, module, own in fused_experts(model.get_base_model())]
    plain = [(module, own) for _, module, own in fused_experts(quantized(tmp_path / "base"))]
    assert all(getattr(*one).equal(getattr(*other)) for one, other in zip(experts, plain, strict=True))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(quantized(tmp_path / "base")), rtol=0, atol=1e-6)
