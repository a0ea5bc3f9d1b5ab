"""The precision of what autocast leaves in float32."""

import pytest
import torch

from posttrain.stages.accelerator import products_beside_autocast


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
