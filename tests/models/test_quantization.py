from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from tests.models.peft.plain import plain_lora
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.errors import UserError
from posttrain.models.counting import count_parameters
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.peft.attach import add_method
from posttrain.models.quantization.nf4 import Nf4, nf4, nf4_bytes

LORA = plain_lora()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer("tiny", None, None, None).save_pretrained(tmp_path)
    return tmp_path


def test_narrow_layers_stay_as_they_are_and_a_plan_counts_them_so(tmp_path: Path) -> None:
    """bitsandbytes' kernel for a CPU cannot have 16 rows. Log-probs of one row run through it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 72}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, **sizes)).save_pretrained(tmp_path)
    load_tokenizer("tiny", None, None, None).save_pretrained(tmp_path)
    model = load_causal(str(tmp_path), None, "bfloat16", "cpu", None, nf4(True, "bfloat16", "cpu")).eval()
    kinds = {n.rpartition(".")[2]: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    narrow, wide = ["k_proj", "v_proj", "lm_head"], ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert kinds == dict.fromkeys(narrow, "Linear") | dict.fromkeys(wide, "Linear4bit")
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5]])).logits.isfinite().all()
    quant = Nf4(method="nf4", double_quant=True, compute_dtype="bfloat16", dense_layers=0)
    assert quant.weight_bytes((16, 64)) is None and quant.weight_bytes((64, 16)) is None
    assert quant.weight_bytes((72, 64)) == nf4_bytes(64 * 72)


def test_nf4_linears_are_what_bitsandbytes_dequantises(base: Path) -> None:
    plain = load_causal(str(base), None, "float32", "cpu", None, None)
    model = load_causal(str(base), None, "float32", "cpu", None, nf4(True, "float32", "cpu"))
    linear = model.model.layers[0].mlp.down_proj
    original = plain.model.layers[0].mlp.down_proj.weight.data
    packed, state = functional.quantize_4bit(original, blocksize=64, quant_type="nf4", compress_statistics=True)
    weight = functional.dequantize_4bit(packed, state)
    x = torch.randn(5, 128)
    torch.testing.assert_close(linear(x), x @ weight.T, rtol=0, atol=1e-5)
    assert linear.weight.quant_state.nested
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_numbers_are_counted_as_if_in_16_bit(base: Path) -> None:
    expected = 2 * 64 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64  # embedding and head, attention, MLP, norms
    model = load_causal(str(base), None, "bfloat16", "cpu", None, nf4(True, "bfloat16", "cpu"))
    assert count_parameters(model)[1] == expected
    lora = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128)) // 2  # r (in + out) a matrix
    assert count_parameters(add_method(model, LORA)) == (lora, expected + lora)


def test_a_4_bit_base_packs_and_trains_its_adapter(base: Path) -> None:
    from posttrain.batch import PackedBatch, Segment

    model = load_causal(str(base), None, "bfloat16", "cpu", None, nf4(True, "bfloat16", "cpu"))
    lm = PackedLM(add_method(model, LORA), "documents")
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    batch = PackedBatch(
        tokens, torch.tensor([[0, 1, 2, 0, 1]]), (Segment(0, 3), Segment(3, 5)), torch.tensor([0, 1, 3]),
        torch.tensor([6, 7, 9]), torch.ones(3), torch.tensor([0, 0, 1]), torch.tensor([2, 4]), 2, (0, 1), 3.0,
    )  # fmt: skip
    lm(batch).sum().backward()
    learning = [p.grad is not None and bool(p.grad.any()) for n, p in lm.named_parameters() if "lora_B" in n]
    assert learning == [True] * 7


def test_evaluation_leaves_the_4_bit_weights_as_they_are(base: Path) -> None:
    model = load_causal(str(base), None, "bfloat16", "cpu", None, nf4(True, "bfloat16", "cpu"))
    linear = model.model.layers[0].mlp.down_proj
    before = linear.weight.data.clone(), linear.weight.quant_state.nested
    with torch.no_grad():
        model.eval()(torch.tensor([[5, 6, 7]]))
    assert torch.equal(linear.weight.data, before[0])
    assert linear.weight.quant_state.nested == before[1]


def test_a_device_without_a_4_bit_kernel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no kernel for this device\nlong story")

    monkeypatch.setattr(functional, "quantize_4bit", absent)
    with pytest.raises(UserError, match=r"quant\.method: .*no kernel for this device.*quant=none") as caught:
        nf4(True, "bfloat16", "cpu")
    assert "\n" not in str(caught.value)
