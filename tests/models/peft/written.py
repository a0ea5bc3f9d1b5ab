"""What an adapter's files say, read by plain peft and added to the base by hand."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tests.models.peft.test_methods import load, logits

from posttrain.models.peft.export import export_adapter
from posttrain.models.peft.merge import Adapter


def assert_written_is_live(model: Any, base: Path, folder: Path, atol: float) -> None:
    """Both ways give the logits of `model`, whose adapter is written to `folder`. base: its base's directory."""
    live = logits(model)
    export_adapter(model, folder, str(base))
    again = PeftModel.from_pretrained(load(base), str(folder))
    torch.testing.assert_close(logits(again), live, rtol=0, atol=atol)
    adapter, merged = Adapter(folder, "run"), load(base)
    with torch.no_grad():
        for layer in adapter.modules:
            weight = merged.get_submodule(layer).weight
            weight.copy_(adapter.applied(layer, weight))
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=atol)
