"""What of a model is taken over is what computes the same, and what is not is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners import lora
from tests.models.kernels.test_fused import FAMILIES, SHAPE, logits_and_gradients, with_lora
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from posttrain.models.kernels import candidates, choice
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.fused import OWN


@pytest.fixture(autouse=True)
def _asked_anew() -> Any:
    candidates.peft_differs.cache_clear()
    yield
    candidates.peft_differs.cache_clear()


def bare(config: Any, device: str = "cpu") -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


def replaced(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, OWN)]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_known_model_is_taken_over_without_a_word(family: str) -> None:
    report = use_kernels(with_lora(FAMILIES[family]), "auto")
    norms = 9 if family == "qwen3" else 5  # two a layer and the last one; Qwen 3 has two more for queries and keys
    assert report.taken == {"LoRA linear": 14, "RMSNorm": norms, "SwiGLU": 2}
    assert report.left == {} and report.warning == ""
    assert report.record() == {"choice": "auto", "taken_over": report.taken, "left": []}


def test_reference_leaves_the_modules_as_they_are() -> None:
    model = with_lora(FAMILIES["llama"])
    report = use_kernels(model, "reference")
    assert replaced(model) == [] and report.warning == ""
    assert report.record() == {"choice": "reference", "taken_over": {}, "left": []}
    with choice.for_inference(model, "reference"):
        assert "forward" not in vars(model.get_base_model().lm_head)


def test_a_second_time_it_counts_the_same_and_changes_nothing() -> None:
    model = with_lora(FAMILIES["llama"])
    first, own = use_kernels(model, "auto"), [vars(module).get(OWN) for module in model.modules()]
    assert use_kernels(model, "auto") == first and [vars(module).get(OWN) for module in model.modules()] == own


def test_it_needs_no_weights_and_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    report = use_kernels(bare(FAMILIES["llama"], "meta"), "auto")
    assert report.taken == {"RMSNorm": 5, "SwiGLU": 2} and report.warning == ""
    use_kernels(with_lora(FAMILIES["llama"]), "reference")
    torch.manual_seed(3)
    model = copy.deepcopy(with_lora(FAMILIES["llama"]))
    torch.manual_seed(3)
    use_kernels(model, "auto")
    assert torch.equal(torch.rand(1), expected)


def test_comments_and_formatting_upstream_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """Rewritten, and the same."""
        wide = hidden_states.to(torch.float32)  # another comment
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (wide * scale).to(hidden_states.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    report = use_kernels(bare(FAMILIES["llama"]), "auto")
    assert report.taken == {"RMSNorm": 5, "SwiGLU": 2} and report.left == {}


def in_float32(self: Any, hidden_states: Tensor) -> Tensor:
    """The product with the weight before the cast, as Gemma has it: other bits in 16-bit formats alone."""
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight.float() * wide).to(hidden_states.dtype)


def gate_alone(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)))


def swapped(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def under_another_name(self: Any, hidden_states: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@pytest.mark.parametrize(
    ("kind", "kernel", "forward"),
    [
        (LlamaRMSNorm, "RMSNorm", in_float32),
        (LlamaMLP, "SwiGLU", gate_alone),
        (LlamaMLP, "SwiGLU", swapped),
        (LlamaMLP, "SwiGLU", under_another_name),
    ],
)
def test_a_formula_that_changes_upstream_is_left_alone_and_said(
    kind: Any, kernel: str, forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(candidates, "version", lambda name: "9.9")
    model = bare(FAMILIES["llama"])
    report, count = use_kernels(model, "auto"), 5 if kernel == "RMSNorm" else 2
    assert kernel not in report.taken and len(report.taken) == 1
    why = "transformers 9.9 computes it otherwise than the versions that the kernel was written for"
    assert report.warning == f"kernels not used, which costs time and memory: {kernel} of {count} {kind.__name__} ({why})"
    assert report.record()["left"] == [{"kernel": kernel, "module": kind.__name__, "modules": count, "why": why}]
    assert not any(type(module) is kind and hasattr(module, OWN) for module in model.modules())


def test_a_module_that_was_rebuilt_upstream_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Joined(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
            self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(nn.functional.silu(gate) * up)

    Joined.__name__ = "LlamaMLP"
    monkeypatch.setattr(modeling_llama, "LlamaMLP", Joined)
    report = use_kernels(bare(FAMILIES["llama"]), "auto")
    assert "SwiGLU of 2 LlamaMLP (transformers" in report.warning and report.taken == {"RMSNorm": 5}


def test_peft_that_adds_up_otherwise_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    own = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *args, **kwargs: 2 * own(self, x, *args, **kwargs))
    report = use_kernels(with_lora(FAMILIES["llama"]), "auto")
    assert "LoRA linear" not in report.taken
    assert "LoRA linear of 14 Linear (peft" in report.warning and "computes it otherwise" in report.warning


def test_torch_without_the_layout_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "missing", lambda: "torch.ops.mkldnn._linear_pointwise")
    report = use_kernels(bare(FAMILIES["llama"]), "auto")
    assert "weights for writing answers of 15 Linear (torch" in report.warning
    monkeypatch.setattr("posttrain.models.kernels.inference_weights.missing", lambda: "torch.ops.mkldnn._linear_pointwise")
    model = bare(FAMILIES["llama"]).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        with choice.for_inference(model, "auto"):
            assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4), {}),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), {("SwiGLU", "LlamaMLP"): 2}),
        (Gemma3TextConfig(**SHAPE, head_dim=16), {("RMSNorm", "Gemma3RMSNorm"): 13, ("SwiGLU", "Gemma3MLP"): 2}),
    ],
    ids=["no such modules", "GeGLU", "Gemma"],
)
def test_what_an_architecture_has_otherwise_stands_in_the_record_alone(config: Any, left: dict[Any, int]) -> None:
    report = use_kernels(bare(config, "meta"), "auto")
    assert {(each.kernel, each.module): count for each, count in report.left.items()} == left
    assert report.warning == "" and all(each["why"] == "it is another function" for each in report.record()["left"])


def test_dora_stands_in_the_record_alone() -> None:
    report = use_kernels(with_lora(FAMILIES["llama"], use_dora=True), "auto")
    assert "LoRA linear" not in report.taken and report.warning == ""
    assert [(each.module, each.why, count) for each, count in report.left.items()] == [
        ("Linear", "its adapters do more than add a product", 14)
    ]


def test_both_ways_give_the_same_logits_and_gradients() -> None:
    plain, lean = with_lora(FAMILIES["qwen3"]), with_lora(FAMILIES["qwen3"])
    use_kernels(plain, "reference")
    use_kernels(lean, "auto")
    (logits, gradients), (lean_logits, lean_gradients) = logits_and_gradients(plain), logits_and_gradients(lean)
    assert torch.allclose(logits, lean_logits, atol=1e-5)
    assert all(torch.allclose(gradients[name], lean_gradients[name], atol=1e-4) for name in gradients)
