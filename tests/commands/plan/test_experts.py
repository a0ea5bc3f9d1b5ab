"""What a plan counts of a model with experts, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.models.peft.moe import CLASSES, COMMON
from transformers import CONFIG_MAPPING

from posttrain.commands.plan.memory import count
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.devices.device import Device

EXPERTS, LINEAR = 4 * 3 * 32 * 24, 2 * (2 * 32 * 32 + 2 * 32 * 16) + 3 * 32 * 48
NARROW = 2 * 2 * 32 * 16  # k and v, of 16 rows
REST = 2 * 61 * 32 + 4 * 32 + (4 * 32 + 32 + 4 * 8)  # embeddings and head, the router, norms


def counted(method: str, name: str = "qwen3_moe", *words: str) -> Any:
    cfg = typed_config(compose_run("sft", [f"+peft={method}", "optim=adamw", *words]))
    return count(cfg, Device("cpu", "a CPU", 1e12), CONFIG_MAPPING[name](**(COMMON | CLASSES[name])), 32, 2, 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_experts_are_counted(method: str, dtype: str) -> None:
    found = counted(method, "qwen3_moe", f"model.dtype={dtype}", *(["peft.r=4"] if method != "full" else []))
    plain, size = EXPERTS + LINEAR + REST, 4 if dtype == "float32" else 2
    if method == "full":
        assert (found.trained_parameters, found.total_parameters) == (plain, plain)
        assert found.parts["weights"] == size * plain
        return
    lora = 4 * (2 * (4 * 32 + 2 * 48) + 3 * 80 + 4 * (80 + 56))
    assert (found.trained_parameters, found.total_parameters) == (lora, plain + lora)
    assert found.parts["quantized weights"] == ((EXPERTS + LINEAR - NARROW) / 2 if method == "qlora" else 0)
    assert found.parts["weights"] == size * (REST + NARROW if method == "qlora" else plain)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "granitemoeshared"])
def test_other_shapes_are_counted_too(name: str) -> None:
    assert counted("qlora", name, "peft.r=4").kept.flops > 0
