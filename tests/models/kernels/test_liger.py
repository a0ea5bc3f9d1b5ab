"""liger-kernel in the place of our kernels: what is given to which modules, and what is not taken.

Simulated: the package is a stand-in, for its Triton kernels run on a GPU alone.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.models.kernels import choice, liger
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora

CPU = torch.device("cpu")


class Norm:
    """As LigerRMSNormFunction, in plain torch; its gradients are autograd's."""

    calls = 0

    @classmethod
    def apply(cls, x: Tensor, weight: Tensor, eps: float, offset: float, casting: str, in_place: bool) -> Tensor:
        assert (offset, casting, in_place) == (0.0, "llama", False)
        cls.calls += 1
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel 9.9, and a CUDA device that is the CPU."""
    module: Any = ModuleType("rms_norm")
    module.LigerRMSNormFunction = Norm
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", module)
    monkeypatch.setattr(liger, "find_spec", lambda _: True)
    monkeypatch.setattr(liger, "version", lambda _: "9.9")
    monkeypatch.setattr(choice, "liger", lambda kernel, _: liger.liger(kernel, torch.device("cuda")))
    tried = liger.tried
    monkeypatch.setattr(liger, "tried", lambda _: tried(CPU))
    tried.cache_clear()
    Norm.calls = 0


def model(dtype: torch.dtype = torch.float32, adapted: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    found = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype=dtype)  # pyright: ignore
    if not adapted:
        return found
    settings: dict[str, Any] = {"dropout": 0.0, "dtype": "float32", "lr_factor": 1, "experts": True, "router": False}
    return add_method(
        found,
        Lora(
            method="lora",
            init="default",
            init_rows=64,
            rank_pattern=None,
            alpha_pattern=None,
            r=4,
            alpha=8,
            targets="all-linear",
            **settings,
        ),
    )


def logits_and_gradients(found: Any) -> list[Tensor]:
    out = found(input_ids=torch.arange(20)[None]).logits
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad for p in found.parameters() if p.grad is not None)]


def test_where_it_is_installed_it_computes_the_same_and_is_said(installed: None) -> None:
    plain, lent = model(), model()
    report = use_kernels(lent, "auto")
    assert report.taken == {"RMSNorm by liger-kernel": 5, "SwiGLU": 2} and not report.left
    assert report.lines == ["computed by an extra that is installed: RMSNorm by liger-kernel in 5 modules"]
    Norm.calls = 0
    for got, want in zip(logits_and_gradients(lent), logits_and_gradients(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert Norm.calls == 5


def test_a_norm_whose_weight_is_wider_than_its_input_stays_ours(installed: None) -> None:
    norm: Any = model().model.norm  # pyright: ignore
    use_kernels(norm, "auto")
    Norm.calls = 0
    assert norm(torch.randn(3, 32).bfloat16()).dtype == torch.float32 and Norm.calls == 0


def test_one_that_computes_something_else_is_not_taken(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norm, "apply", lambda x, weight, *_: x * weight)
    report = use_kernels(model(), "auto")
    assert report.taken == {"RMSNorm": 5, "SwiGLU": 2}
    why = {each.kernel: each.why for each in report.left}
    assert why["RMSNorm by liger-kernel"].startswith("9.9 computes something else here (relative error ")


def test_one_that_does_not_run_is_not_taken(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Tensor:
        raise RuntimeError("PTX was compiled with a newer version\nof nvcc")

    monkeypatch.setattr(Norm, "apply", fails)
    report = use_kernels(model(), "auto")
    assert report.taken == {"RMSNorm": 5, "SwiGLU": 2}
    assert {each.why for each in report.left} == {"9.9 does not run here (PTX was compiled with a newer version)"}
    assert "RMSNorm by liger-kernel of 5 LlamaRMSNorm (9.9 does not run here" in report.warning


def test_neither_on_a_cpu_nor_with_the_plain_modules(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_kernels(model(), "reference").taken == {}
    monkeypatch.undo()
    monkeypatch.setattr(liger, "find_spec", lambda _: True)
    assert use_kernels(model(), "auto").taken == {"RMSNorm": 5, "SwiGLU": 2}
