"""A bottleneck adapter by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from posttrain.models.peft.bottleneck import BottleneckLayer


def test_what_it_adds_to_a_layers_output_by_hand() -> None:
    """h + W_up relu(W_down h + b_down) + b_up, of h = (2, -1): W_down h + b_down is (1.5, -3), of which the second is cut."""
    base = nn.Linear(2, 2, bias=False)
    layer = BottleneckLayer(base)
    layer._active_adapter = ["a"]
    layer.update_layer("a", 2, False)
    down: Any = layer.bottleneck_down["a"]
    up: Any = layer.bottleneck_up["a"]
    x = torch.tensor([[2.0, -1.0]])
    with torch.no_grad():
        base.weight.copy_(torch.eye(2))
        assert torch.equal(layer(x), x), "up is zero at the start"
        down.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        down.bias.copy_(torch.tensor([0.5, -1.0]))
        up.weight.copy_(torch.tensor([[2.0, 5.0], [-1.0, 7.0]]))
        up.bias.copy_(torch.tensor([0.25, 0.0]))
        assert layer(x).tolist() == [[2 + 2 * 1.5 + 0.25, -1 - 1.5]]
        layer.enable_adapters(False)
        assert torch.equal(layer(x), x)
