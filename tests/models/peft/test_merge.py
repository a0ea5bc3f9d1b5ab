"""What an adapter's files say of a layer, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from posttrain.models.peft.merge import Adapter

A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])  # rank 4
B = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 0.0, -1.0]])
PRODUCT = torch.tensor([[5.0, 6.0, 9.0], [-1.0, 0.0, -1.0]])


def adapter(folder: Path, **config: Any) -> Adapter:
    """One layer `q` of rank 4."""
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    tensors = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
    save_file(tensors, folder / "adapter_model.safetensors")
    return Adapter(folder, "test")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / 2),  # over the root of the rank
        ({"alpha_pattern": {"q": 8}}, 8 / 4),
        ({"alpha_pattern": {"k": 8}}, 6 / 4),
    ],
)
def test_the_scale_of_a_change(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    found = adapter(tmp_path, **config)
    assert found.modules == ["q"]
    factors = found.factors("q")
    torch.testing.assert_close(factors.b @ factors.a, scale * PRODUCT)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    torch.testing.assert_close(found.applied("q", weight), weight + scale * PRODUCT)


def test_a_weight_that_is_kept_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 has [in, out]."""
    weight = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    found = adapter(tmp_path, fan_in_fan_out=True).applied("q", weight)
    torch.testing.assert_close(found, weight + 1.5 * PRODUCT.T)
