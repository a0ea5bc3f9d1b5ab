from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from tests.models.peft.plain import plain_lora
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from posttrain.errors import UserError
from posttrain.models.peft.attach import add_frozen, add_method, merge_into
from posttrain.models.peft.export import export_adapter
from posttrain.models.quantization import keep_as_quantized
from posttrain.models.quantization.nf4 import nf4

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ALL, QV = "all-linear", ["q_proj", "v_proj"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def add_lora(model: Any, r: int, alpha: float, dropout: float, targets: str | list[str], dtype: Any) -> Any:
    said = {"r": r, "alpha": alpha, "dropout": dropout, "targets": targets, "dtype": dtype}
    return add_method(
        model,
        plain_lora(**said),
    )


Shape = tuple[int, float, Any]  # r, alpha, targets


def load(base: Path, quantized: bool = False) -> Any:
    if not quantized:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=nf4(True, "float32", "cpu"))
    keep_as_quantized(model)
    return model


def train(model: PeftModel, seed: int) -> None:
    """Stands for training: every trainable number becomes another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def finished(base: Path, out: Path, r: int, alpha: float, targets: str | list[str], seed: int = 1) -> Path:
    model = add_lora(load(base), r, alpha, 0.0, targets, "float32")
    train(model, seed)
    export_adapter(model, out, str(base))
    return out


@pytest.mark.parametrize("quantized", [False, True])
def test_an_exported_adapter_is_the_live_one(base: Path, tmp_path: Path, quantized: bool) -> None:
    model = add_lora(load(base, quantized), 4, 8.0, 0.0, ALL, "float32")
    train(model, 1)
    export_adapter(model, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base, quantized), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(again), logits(load(base, quantized)), atol=1e-2)
    config: Any = again.peft_config["default"]
    assert (config.base_model_name_or_path, config.r, config.lora_alpha) == (str(base), 4, 8)
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 8.0, ALL), (4, 8.0, ALL)), ((4, 8.0, ALL), (3, 5.0, QV)), ((3, 2.0, QV), (4, 16.0, ["v_proj", "o_proj"]))],
)
def test_stacked_adapters_become_one(base: Path, tmp_path: Path, first: Shape, second: Shape, quantized: bool) -> None:
    init = finished(base, tmp_path / "init", *first)
    model = add_lora(load(base, quantized), *second[:2], 0.0, second[2], "float32")
    add_frozen(model, init)
    train(model, 2)
    export_adapter(model, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base, quantized), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_three_stages_add_up(base: Path, tmp_path: Path) -> None:
    init, model = finished(base, tmp_path / "one", 2, 4.0, ALL), load(base)
    for stage, (r, alpha) in {"two": (3, 9.0), "three": (5, 1.0)}.items():
        model = add_lora(load(base), r, alpha, 0.0, QV, "float32")
        add_frozen(model, init)
        torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(load(base), str(init))), rtol=0, atol=1e-6)
        train(model, r)
        init = tmp_path / stage
        export_adapter(model, init, str(base))
    last = PeftModel.from_pretrained(load(base), str(init))
    torch.testing.assert_close(logits(last), logits(model), rtol=0, atol=1e-5)
    layer = cast(Any, last.get_base_model()).model.layers[0].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape[0] == 10
    assert layer.o_proj.lora_A["default"].weight.shape[0] == 2


def test_an_rslora_init_keeps_its_scale(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    rs = get_peft_model(load(base), LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=QV, task_type="CAUSAL_LM"))
    train(rs, 1)
    rs.save_pretrained(str(tmp_path / "rs"))
    model = add_lora(load(base), 2, 4.0, 0.0, ALL, "float32")
    add_frozen(model, tmp_path / "rs")
    train(model, 2)
    export_adapter(model, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_conv1d_layers_export_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    gpt2.save_pretrained(tmp_path / "base")
    model = add_lora(gpt2, 4, 8.0, 0.0, ALL, "float32")
    train(model, 1)
    export_adapter(model, tmp_path / "out", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_only_the_new_adapter_trains(base: Path, tmp_path: Path) -> None:
    init = finished(base, tmp_path / "init", 4, 8.0, ALL)
    model = add_lora(load(base), 2, 4.0, 0.0, QV, "float32")
    add_frozen(model, init)
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(load(base), str(init))), rtol=0, atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers x (q, v) x (A, B)
    assert all(".default." in name for name in trained)


def test_merging_gives_plain_weights(base: Path, tmp_path: Path) -> None:
    init = finished(base, tmp_path / "init", 4, 8.0, ALL)
    live = logits(PeftModel.from_pretrained(load(base), str(init)))
    merged = merge_into(load(base), init)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logits(merged), live, rtol=0, atol=1e-5)


def test_the_adapter_depends_on_the_seed_alone(base: Path, tmp_path: Path) -> None:
    init = finished(base, tmp_path / "init", 4, 8.0, ALL)
    drawn = []
    for frozen in (False, True):
        model = load(base)
        torch.manual_seed(7)
        model = add_lora(model, 2, 4.0, 0.0, QV, "bfloat16")
        if frozen:
            add_frozen(model, init)
        drawn.append(torch.cat([p.flatten() for n, p in model.named_parameters() if p.requires_grad] + [torch.rand(3)]))
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_dtype(base: Path, dtype: str) -> None:
    model = add_lora(load(base).bfloat16(), 2, 4.0, 0.0, ALL, dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("r", "targets", "message"),
    [
        (97, ALL, r"peft\.r: 97 is above the smaller side of every layer that could be trained; 64 is the highest"),
        (2, ["q_proj", "qq"], r"peft\.targets: .*'qq'.*down_proj"),
        (2, ["lm_head"], r"peft\.targets: .*'lm_head'"),
        (2, r".*\.nothing", r"peft\.targets: .*nothing"),
        (2, "(", r"peft\.targets: .*no regular expression"),
    ],
)
def test_impossible_adapters_are_refused(base: Path, r: int, targets: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(load(base), r, 4.0, 0.0, targets, "float32")


def test_targets_by_regular_expression(base: Path, tmp_path: Path) -> None:
    model = add_lora(load(base), 2, 4.0, 0.0, r".*layers\.1\..*(q_proj|up_proj)", "float32")
    train(model, 1)
    assert sum(p.requires_grad for p in model.parameters()) == 4
    export_adapter(model, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
