"""With weights for inference a model is the same function, is itself again afterwards, and draws as chances say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models.kernels.test_fused import FAMILIES, SHAPE, with_lora
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, Gemma2Config, LlamaConfig

from posttrain.models.kernels import inference_weights as weights
from posttrain.models.kernels.choice import use_kernels
from posttrain.models.language.drawing import draw
from posttrain.models.language.kv_cache import RoomyLayer, roomy_cache
from posttrain.models.quantization import keep_as_quantized
from posttrain.models.quantization.nf4 import keep_dense

TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))


def forwards(model: Any) -> list[Any]:
    return [vars(module).get("forward") for module in model.modules()]


def inference_logits(model: Any) -> torch.Tensor:
    before = forwards(model)
    with torch.no_grad(), weights.inference_weights(model):
        assert forwards(model) != before
        found = model(input_ids=TOKENS, use_cache=False).logits
    assert forwards(model) == before
    return found


@pytest.mark.parametrize("lays_out", [True, False])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_function(family: str, adapters: int, lays_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARE", 0.25 if lays_out else 0.0)
    model = with_lora(FAMILIES[family], adapters=adapters).eval()
    use_kernels(model, "auto")
    with torch.no_grad():
        plain = model(input_ids=TOKENS, use_cache=False).logits
    assert float((inference_logits(model) - plain).abs().max() / plain.abs().max()) < 1e-5


def test_in_bfloat16_it_differs_by_rounding_of_the_adapters_part() -> None:
    """Without adapters bit for bit; with them by no more than the plain path does from float32."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.bfloat16).eval()
    use_kernels(base, "auto")
    with torch.no_grad():
        assert torch.equal(inference_logits(base), base(input_ids=TOKENS, use_cache=False).logits)
    model = with_lora(LlamaConfig(**SHAPE), torch.bfloat16).eval()
    exact = with_lora(LlamaConfig(**SHAPE)).eval()
    exact.load_state_dict(model.state_dict())
    use_kernels(model, "auto")
    with torch.no_grad():
        plain, right = (m(input_ids=TOKENS, use_cache=False).logits.float() for m in (model, exact))
    assert float((inference_logits(model).float() - right).abs().mean()) < 1.05 * float((plain - right).abs().mean())


def test_with_biases_with_dora_and_with_adapters_that_are_off() -> None:
    biased = LlamaConfig(**SHAPE, attention_bias=True)
    every: tuple[dict[str, Any], ...] = ({}, {"use_dora": True})
    for options in every:
        model = with_lora(biased, **options).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.bias"):
                parameter.data = torch.randn(parameter.shape)
        use_kernels(model, "auto")
        with torch.no_grad():
            plain = model(input_ids=TOKENS, use_cache=False).logits
            assert float((inference_logits(model) - plain).abs().max()) < 1e-5
            with model.disable_adapter():
                base = model(input_ids=TOKENS, use_cache=False).logits
                assert float((inference_logits(model) - base).abs().max()) < 1e-5
        assert float((plain - base).abs().max()) > 1e-2


@pytest.mark.parametrize("computes_in", [torch.bfloat16, torch.float32])
def test_a_base_in_four_bits(computes_in: torch.dtype, tmp_path: Path) -> None:
    """Also where the base computes in another format than its inputs have, which is left to peft; with adapters off; and with
    dense copies of the base, which change no bit."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes_in)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options, dtype=torch.bfloat16, device_map="cpu")
    keep_as_quantized(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    use_kernels(model, "auto")
    with torch.no_grad():
        plain = model(input_ids=TOKENS, use_cache=False).logits
    within = 1e-2 if computes_in == torch.bfloat16 else 1e-9

    def apart(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().mean() / other.abs().mean())

    once = inference_logits(model)
    assert apart(once, plain) < within
    with model.disable_adapter(), torch.no_grad():
        bare = model(input_ids=TOKENS, use_cache=False).logits
        assert torch.equal(inference_logits(model), bare) and apart(bare, plain) > 0.1
    keep_dense([base])
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, plain)
    assert torch.equal(inference_logits(model), once)


def test_a_failure_inside_leaves_the_model_as_it_was() -> None:
    model = with_lora(FAMILIES["llama"]).eval()
    use_kernels(model, "auto")
    before = forwards(model)
    with pytest.raises(ZeroDivisionError), weights.inference_weights(model):
        raise ZeroDivisionError
    assert forwards(model) == before


def test_a_draw_is_the_first_word_that_the_sum_reaches() -> None:
    """Sums 0, 1, 1, 4, 4: of (0, 1] the second word, of (1, 4] the fourth, and never one of chance 0."""
    chances = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).expand(6, -1)
    numbers = torch.tensor([0.0, 0.5, 0.7499, 0.75, 0.9, 1 - 2.0**-53], dtype=torch.float64)[:, None]
    assert draw(chances, numbers)[:, 0].tolist() == [3, 3, 3, 1, 1, 1]


def test_draws_come_as_often_as_their_chances_say() -> None:
    """Pearson's statistic of 40,000 draws among 50 words has mean 49 and standard deviation 9.9."""
    torch.manual_seed(0)
    chances = torch.rand(50) ** 3
    chances[7] = 0
    drawn = draw(chances.expand(40_000, -1), torch.rand(40_000, 1, dtype=torch.float64))[:, 0].bincount(minlength=50)
    expected = chances / chances.sum() * 40_000
    assert drawn[7] == 0
    likely = expected > 5
    assert float(((drawn - expected) ** 2 / expected)[likely].sum()) < 49 + 3 * 9.9


def test_a_cache_with_room_holds_what_transformers_cache_holds() -> None:
    """Over a prompt, answers that share it, tokens one by one, and answers that end."""
    ours, theirs = RoomyLayer(), cast(Any, DynamicCache()).layer_class_to_replicate()
    generator, n, rooms = torch.Generator().manual_seed(0), 2, set[int]()
    for step in range(150):
        length = 5 if step == 0 else 1
        key, value = (torch.randn(n, 3, length, 4, generator=generator) for _ in range(2))
        found, expected = ours.update(key, value), theirs.update(key, value)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length() and ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        rooms.add(found[0].data_ptr())
        if step in (0, 60):
            n = 6 if step == 0 else 3
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(3) if step == 0 else layer.batch_select_indices(torch.tensor([5, 0, 2]))
    assert len(rooms) <= 5  # made anew after the prompt, after rows were chosen, and when it was full


def test_layers_with_a_window_keep_their_cache() -> None:
    config = Gemma2Config(**SHAPE, sliding_window=8, head_dim=16)
    kinds = [type(layer).__name__ for layer in roomy_cache(config).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "RoomyLayer"]
