"""What is counted of a model, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.peft.moe import tiny
from tests.models.peft.test_experts import lora
from transformers import AutoModelForCausalLM

from posttrain.models.counting import count_parameters, in_words, left_in_16_bit, part_of, record, trained_parts
from posttrain.models.peft.attach import add_method
from posttrain.models.quantization.int8 import Int8
from posttrain.models.quantization.nf4 import nf4

# qwen3_moe: width 32; heads 4 and 2 of 8; an MLP of 48 in the first layer, 4 experts of 24 in the second; 61 words
ATTENTION, KEYS, MLP, EXPERTS = 2 * (32 + 32), 2 * (32 + 16), 3 * (32 + 48), 4 * ((32 + 48) + (24 + 32))


def test_what_is_trained_by_part() -> None:
    model = add_method(tiny("qwen3_moe"), lora(r=4))
    found = trained_parts(model)
    assert found == {"experts": 4 * EXPERTS, "attention": 4 * 2 * (ATTENTION + KEYS), "MLP": 4 * MLP}
    assert record(model)["parts"] == found and sum(found.values()) == count_parameters(model)[0]
    assert "experts 2,176, attention 1,792, MLP 960" in in_words(model)[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.1.mlp.experts.base_layer.lora_A.default.weight", "experts"),
        ("model.layers.1.mlp.gate.weight", "routers"),
        ("model.layers.1.mlp.shared_experts.gate_proj.weight", "MLP"),
        ("model.layers.0.linear_attn.in_proj_qkvz.weight", "attention"),
        ("transformer.wte.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("backbone.layers.0.mixer.in_proj.weight", "state-space layers"),
    ],
)
def test_parts_by_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_what_quantization_leaves_in_16_bit(tmp_path: Path) -> None:
    """NF4 packs linear layers and experts, half a byte each, but for k and v of 16 rows; int8 leaves experts as they are."""
    tiny("qwen3_moe").save_pretrained(tmp_path)
    plain = count_parameters(tiny("qwen3_moe"))[1]
    experts, linear = 4 * 3 * 32 * 24, 2 * (2 * 32 * 32 + 2 * 32 * 16) + 3 * 32 * 48
    narrow = 2 * 2 * 32 * 16
    int8: Any = Int8(method="int8", threshold=6.0).loading("cpu")
    for config, packed in ((nf4(True, "bfloat16", "cpu"), (experts + linear - narrow) / 2), (int8, linear)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=config)
        assert count_parameters(model)[1] == plain
        left = 2 * (plain - experts - linear) + (2 * experts if config is int8 else 2 * narrow)
        share, parts = left_in_16_bit(add_method(model, lora())) or (0.0, {})
        assert (share, sum(parts.values())) == (pytest.approx(left / (left + packed)), left)
        assert ("experts" in parts) == (config is int8)
