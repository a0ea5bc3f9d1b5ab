"""The lean forwards equal transformers' and peft's own, keep less, and step aside for what they do not do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from posttrain.models.kernels import fused
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.fused import OWN
from posttrain.training.at_rest import weights_at_rest

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {"llama": LlamaConfig(**SHAPE), "qwen3": Qwen3Config(**SHAPE, head_dim=16), "mistral": MistralConfig(**SHAPE)}


def with_lora(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, adapters: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    base, model = AutoModelForCausalLM.from_config(config, dtype=dtype), None
    for i in range(adapters):
        lora = LoraConfig(r=4 + 4 * i, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        model: Any = get_peft_model(base, lora, "a0") if i == 0 else model
        if i:
            model.add_adapter(f"a{i}", lora)
    model.base_model.set_adapter([f"a{i}" for i in range(adapters)])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
            parameter.requires_grad_(adapters == 1 or f".a{adapters - 1}." in name)  # the first of two is frozen
    return model.train()


def logits_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    (logits.log_softmax(-1)[..., 3].sum()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(plain: dict[str, Tensor], lean: dict[str, Tensor]) -> float:
    """The largest, relative to the largest number of each gradient."""
    assert plain.keys() == lean.keys() and plain
    return max(float((plain[n] - lean[n]).abs().max() / plain[n].abs().max().clamp(min=1e-12)) for n in plain)


@pytest.mark.parametrize(("adapters", "dropout"), [(1, 0.0), (2, 0.0), (1, 0.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_it_equals_the_plain_path(family: str, adapters: int, dropout: float) -> None:
    plain = with_lora(FAMILIES[family], adapters=adapters, lora_dropout=dropout)
    lean = copy.deepcopy(plain)
    use_kernels(lean, "auto")
    counted = [type(m).__name__ for m in lean.modules() if hasattr(m, OWN)]
    assert counted.count("Linear") == 14 and any("MLP" in name for name in counted) and any("Norm" in name for name in counted)
    (logits, gradients), (lean_logits, lean_gradients) = logits_and_gradients(plain), logits_and_gradients(lean)
    assert float((logits - lean_logits).abs().max()) < 1e-5
    assert difference(gradients, lean_gradients) < 2e-5  # rounding; 1.08e-5 was seen on one kind of processor
    assert max(float((gradients[n] - lean_gradients[n]).norm() / gradients[n].norm()) for n in gradients) < 1e-5


def test_in_bfloat16_it_is_as_near_to_float32_as_autocast() -> None:
    """A and B are rounded to bfloat16 for the products, as autocast does it, which TRL trains adapters under."""
    exact_logits, exact = logits_and_gradients(with_lora(FAMILIES["llama"]))
    plain = with_lora(FAMILIES["llama"], torch.bfloat16)
    lean = copy.deepcopy(plain)
    use_kernels(lean, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = logits_and_gradients(plain)
    lean_logits, lean_gradients = logits_and_gradients(lean)
    assert (lean_logits - exact_logits).norm() < 1.2 * (logits - exact_logits).norm()

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact)

    assert error(lean_gradients) < 1.2 * error(gradients)


def kept_bytes(model: nn.Module) -> int:
    kept: dict[int, tuple[int, Any]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(input_ids=torch.zeros(1, 64, dtype=torch.int64), use_cache=False)  # pyright: ignore
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_less_than_half_is_kept_for_the_backward(dropout: float) -> None:
    plain = with_lora(FAMILIES["llama"], torch.bfloat16, lora_dropout=dropout)
    lean = copy.deepcopy(plain)
    use_kernels(lean, "auto")
    assert kept_bytes(lean) < 0.5 * kept_bytes(plain)


@pytest.mark.parametrize(
    "change",
    [
        lambda: with_lora(FAMILIES["llama"], adapters=2, lora_dropout=0.5),
        lambda: with_lora(FAMILIES["llama"], use_dora=True),
        lambda: with_lora(FAMILIES["llama"], lora_bias=True),
        lambda: with_lora(FAMILIES["llama"], torch.bfloat16).float(),
    ],
    ids=["two dropouts", "dora", "bias", "cast"],
)
def test_what_it_does_not_do_is_left_to_peft(change: Callable[[], Any]) -> None:
    plain = change()
    lean = copy.deepcopy(plain)
    use_kernels(lean, "auto")
    (logits, gradients), (lean_logits, lean_gradients) = logits_and_gradients(plain), logits_and_gradients(lean)
    assert float((logits - lean_logits).abs().max()) < 1e-5 and difference(gradients, lean_gradients) < 1e-5


def test_adapters_that_are_off_or_merged_are_not_heard() -> None:
    plain = with_lora(FAMILIES["llama"])
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        on = plain(input_ids=tokens).logits
        use_kernels(plain, "auto")
        with plain.disable_adapter():
            off = plain(input_ids=tokens).logits
        plain.base_model.merge_adapter()
        merged = plain(input_ids=tokens).logits
        plain.base_model.unmerge_adapter()
        bare = with_lora(FAMILIES["llama"]).unload()(input_ids=tokens).logits
    assert torch.equal(off, bare) and float((merged - on).abs().max()) < 1e-5 and float((off - on).abs().max()) > 1e-2


def test_with_recomputation_it_is_the_same() -> None:
    plain = with_lora(FAMILIES["llama"])
    use_kernels(plain, "auto")
    lean = copy.deepcopy(plain)
    lean.gradient_checkpointing_enable({"use_reentrant": False})
    (logits, gradients), (again, recomputed) = logits_and_gradients(plain), logits_and_gradients(lean)
    assert torch.equal(logits, again) and difference(gradients, recomputed) == 0.0


def test_recomputation_leaves_out_the_last_product_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an MLP with LoRA all that the backward asks for is there before `down` is computed: seven products with weights in the
    forward, six when a layer is computed again."""
    model = with_lora(FAMILIES["llama"])
    use_kernels(model, "auto")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    counts, plain = list[int](), fused.linear
    monkeypatch.setattr(fused, "linear", lambda x, weight, bias: counts.append(len(weight)) or plain(x, weight, bias))
    logits = model(input_ids=torch.arange(24)[None], use_cache=False).logits
    assert len(counts) == 2 * 7
    counts.clear()
    logits.float().sum().backward()
    assert len(counts) == 2 * 6


def test_on_nf4_it_equals_peft_over_bitsandbytes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    weight = torch.randn(128, 64) / 8
    base = bitsandbytes.nn.Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    base.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=base)
    base = base.to("cpu")
    layer: Any = Linear4bit(base, "default", config=LoraConfig(r=4), r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    holder = nn.ModuleDict({"plain": layer, "lean": copy.deepcopy(layer)})
    holder.train()
    use_kernels(holder["lean"], "auto")
    assert hasattr(holder["lean"], OWN)
    found = {}
    for name in ("plain", "lean"):
        x = torch.linspace(-1, 1, 6 * 64).view(6, 64).requires_grad_()
        y = holder[name](x)
        (y**2).sum().backward()
        part: Any = holder[name]
        found[name] = {
            "y": y.detach(),
            "x": x.grad,
            "a": part.lora_A["default"].weight.grad,
            "b": part.lora_B["default"].weight.grad,
        }
        with torch.no_grad():
            assert float((part(x) - y).abs().max()) < 1e-5  # a rollout's way
    assert difference(found["plain"], found["lean"]) < 1e-5


def queries(kernels: Any) -> Any:
    """A layer with LoRA, of a model that goes these ways."""
    model = with_lora(FAMILIES["llama"])
    use_kernels(model, kernels)
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_a_model_may_write_into_a_layers_output() -> None:
    """As Gemma 3n does: in place, and the backward is that of the plain path."""
    found = []
    for kernels in ("reference", "auto"):
        layer = queries(kernels)
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        y[0] += 1.0
        y.mul_(2.0)
        y.square().sum().backward()
        found.append((x.grad, layer.lora_A["a0"].weight.grad, layer.lora_B["a0"].weight.grad))
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-4)


def test_what_goes_in_may_lie_in_memory_in_any_order() -> None:
    """As Griffin's recurrent layers give it, a transposed one."""
    found = []
    for kernels in ("reference", "auto"):
        layer = queries(kernels)
        x = torch.randn(64, 5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x.transpose(0, 2))
        y.transpose(0, 1).square().sum().backward()
        found.append((y, x.grad, layer.lora_A["a0"].weight.grad, layer.lora_B["a0"].weight.grad))
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-4, atol=1e-4)


def test_factors_are_joined_once_while_weights_are_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both passes of every micro-batch, with recomputation too; afterwards from the weights as they have become, though
    nothing has told torch that they changed, as by bitsandbytes' optimizers."""
    joins: list[int] = []
    join = fused._join
    monkeypatch.setattr(fused, "_join", lambda factors, *rest: (joins.append(len(factors)), join(factors, *rest))[1])
    model = with_lora(FAMILIES["llama"], dtype=torch.bfloat16, adapters=2)
    use_kernels(model, "auto")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    once = logits_and_gradients(model)
    model.zero_grad()
    assert len(joins) == 28  # 14 layers, in the forward and again in the recomputed one
    joins.clear()
    with weights_at_rest():
        logits_and_gradients(model)
        model.zero_grad()
        again = logits_and_gradients(model)
    assert joins == [4] * 14
    assert torch.equal(once[0], again[0]) and all(torch.equal(again[1][name], value) for name, value in once[1].items())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with weights_at_rest(), model.disable_adapter():
        bare = logits_alone(model)
    with weights_at_rest():
        assert torch.equal(logits_and_gradients(model)[0], bare)


def logits_alone(model: Any) -> Tensor:
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()
