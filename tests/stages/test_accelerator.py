"""The precision of what autocast leaves in float32."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.stages.accelerator import products_beside_autocast
from posttrain.stages.language.build import reader_of


@pytest.mark.parametrize(
    ("autocast", "device", "inside"),
    [("bf16", "cuda", "high"), ("no", "cuda", "highest"), ("bf16", "cpu", "highest"), ("no", "cpu", "highest")],
)
def test_tf32_stands_beside_bfloat16_alone(autocast: str, device: str, inside: str) -> None:
    """Who asks for float32 gets it, and it ends with the training."""
    before = torch.get_float32_matmul_precision()
    with products_beside_autocast(autocast, torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == before == "highest"


@pytest.mark.parametrize(("precision", "chosen_for"), [("bf16", torch.bfloat16), ("none", torch.float32)])
def test_attention_is_chosen_for_what_training_computes_in(precision: str, chosen_for: torch.dtype) -> None:
    """Weights in float32 that autocast computes with in bfloat16 can go by kernels of 16 bits."""
    seen: list[torch.dtype] = []

    class Reader:
        def __init__(self, model: torch.nn.Linear, *_: Any) -> None:
            seen.append(model(torch.zeros(1, 4)).dtype)

    model, cfg = SimpleNamespace(attention="auto", kernels="auto"), SimpleNamespace(precision=precision, packing="auto")
    given: Any = SimpleNamespace(model=model, train=cfg)
    reader_of(given, torch.nn.Linear(4, 4), torch.device("cpu"), Reader)  # pyright: ignore
    assert seen == [chosen_for]
