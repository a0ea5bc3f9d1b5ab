"""What doctor says of the kernels: which of the installed libraries' modules are taken over, and of extras."""

from typing import Any

import pytest
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from posttrain.commands import doctor
from posttrain.console import console


def test_all_kernels_are_used_with_the_installed_libraries() -> None:
    rows = dict(doctor._kernels())
    assert rows["kernel RMSNorm"] == "used for llama, mistral, qwen2, qwen3, smollm3, phi3"
    assert rows["kernel SwiGLU"] == "used for llama, mistral, qwen2, qwen3, smollm3"  # Phi 3 has an MLP of another make
    assert rows["kernel LoRA linear"].startswith("used for plain weights")
    assert rows["kernel for sampling on a CPU"] in ("used", "not used: torch has no oneDNN")


def test_a_module_that_has_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Qwen3RMSNorm.forward

    def doubled(self: Any, hidden_states: Tensor) -> Tensor:
        return 2 * own(self, hidden_states)

    monkeypatch.setattr(Qwen3RMSNorm, "forward", doubled)
    monkeypatch.setattr(doctor, "FAMILIES", ("llama", "qwen3"))
    said = dict(doctor._kernels())["kernel RMSNorm"]
    assert said.startswith("used for llama; not for qwen3: transformers ") and said.endswith("the kernel was written for")


def test_an_extra_is_named_with_its_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_machine", list)
    monkeypatch.setattr(doctor, "_places", list)
    monkeypatch.setattr(doctor, "_kernels", list)
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_module": "ray"})
    with console.capture() as said:
        doctor.examine()
    assert "pip install 'posttrain[ray]'" in " ".join(said.get().split())
