"""Checkpoints in fewer bits, written here by the formats' definitions, compute what the definitions say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.peft.plain import plain_lora
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from posttrain.errors import UserError
from posttrain.models.checkpoints.formulas import Elements
from posttrain.models.checkpoints.held import Held, carrier, elements_of
from posttrain.models.counting import count_parameters
from posttrain.models.language.pretrained import load_causal
from posttrain.models.peft.attach import add_method
from posttrain.models.quantization import keep_as_quantized
from posttrain.models.quantization.nf4 import nf4
from posttrain.models.quantization.packed import packed_of

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def llama(directory: Path, **change: Any) -> dict[str, Tensor]:
    """A plain one, enlarged so that a wrong weight shows; its tensors."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 32} | change
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(6.0) if parameter.dim() > 1 else None
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def write(directory: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> str:
    """The checkpoint as it is released."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return str(directory)


def logits(directory: str, quantization: Any = None, dtype: str = "float32") -> Tensor:
    with torch.no_grad():
        return load_causal(directory, None, dtype, "cpu", None, quantization).eval()(IDS).logits.float()


def expected(directory: Path, weights: dict[str, Tensor]) -> Tensor:
    """Of transformers, for the weights that are meant."""
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    plain = directory / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(config))
    save_file({n: w.float().contiguous() for n, w in weights.items()}, plain / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits


def is_linear(name: str) -> bool:
    return name.split(".")[-2] in LINEARS


def assert_same(found: Tensor, wanted: Tensor, plain: Tensor | None = None) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    if plain is not None:
        assert float((plain - wanted).abs().max()) > 1e-3, "the format rounds nothing, so it shows nothing"


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, the scale of each block (its largest becomes 448), and what they stand for; one block at a time."""
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    scale, quantized = torch.zeros(rows, columns), torch.zeros_like(weight)
    for i in range(rows):
        for j in range(columns):
            where = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[where].abs().max() / 448
            quantized[where] = weight[where] / scale[i, j]
    quantized = quantized.to(torch.float8_e4m3fn)
    meant = quantized.float().clone()
    for i in range(rows):
        for j in range(columns):
            meant[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale[i, j]
    return quantized, scale, meant


def nearest_fp4(values: Tensor) -> Tensor:
    """Codes of the nearest of the sixteen numbers."""
    code = (values.abs()[..., None] - NUMBERS).abs().argmin(-1)
    return (code + 8 * (values < 0)).to(torch.uint8)


def meant_by_fp4(codes: Tensor) -> Tensor:
    return NUMBERS[(codes % 8).long()] * torch.where(codes >= 8, -1.0, 1.0)


def packed(codes: Tensor) -> Tensor:
    """Two in a byte, the first in the lower half."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


@pytest.mark.parametrize("block", [(32, 32), (40, 40), (64, 16)], ids=["even", "cut", "oblong"])
def test_fp8_in_blocks(block: tuple[int, int], tmp_path: Path) -> None:
    """As DeepSeek-V3 and MiniMax-M2 are released; a block at the border may be cut."""
    tensors = llama(tmp_path)
    released, meant = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        released[name], released[f"{name}_scale_inv"], meant[name] = fp8(tensors[name], block)
    plain = expected(tmp_path, tensors)
    (tmp_path / "plain").rename(tmp_path / "other")
    wanted = expected(tmp_path, meant)
    name = write(tmp_path, released, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)})
    assert_same(logits(name), wanted, plain)
    assert_same(logits(name, "dequantize"), wanted)


def test_fp8_of_whole_tensors_and_of_rows(tmp_path: Path) -> None:
    """Ministral 3's one scale a tensor, with scales of activations beside it; FBGEMM's one a row."""
    for number, rows in enumerate((False, True)):
        home = tmp_path / str(number)
        tensors = llama(home)
        released, meant = dict(tensors), dict(tensors)
        for name in filter(is_linear, tensors):
            w = tensors[name]
            released[name], scale, meant[name] = fp8(w, (1 if rows else w.shape[0], w.shape[1]))
            released[f"{name}_scale" if rows else f"{name}_scale_inv"] = scale if rows else scale.reshape(())
            released[name.replace("weight", "activation_scale")] = torch.ones(())
        wanted = expected(home, meant)
        settings = {"quant_method": "fbgemm_fp8"} if rows else {"quant_method": "fp8", "weight_block_size": None}
        assert_same(logits(write(home, released, settings)), wanted)


def gpt_oss(directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(released, meant): experts in MXFP4 as OpenAI has written them: [experts, out, groups, 16] bytes, an exponent a group."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(6.0) if parameter.dim() > 1 else None
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    released, meant = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        groups = released.pop(name).transpose(1, 2).unflatten(-1, (-1, 32))  # experts, out, groups, 32
        exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2  # the largest of FP4 is 6 = 1.5 * 2^2
        codes = nearest_fp4(groups / torch.exp2(exponent)[..., None])
        released[f"{name}_blocks"], released[f"{name}_scales"] = packed(codes), (exponent + 127).to(torch.uint8)
        meant[name] = (meant_by_fp4(codes) * torch.exp2(exponent)[..., None]).flatten(-2).transpose(1, 2)
    return released, meant


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    released, meant = gpt_oss(tmp_path)
    wanted = expected(tmp_path, meant)
    name = write(tmp_path, released, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    assert_same(logits(name), wanted)
    in_16_bit = load_causal(name, None, "bfloat16", "cpu", None, None).model.layers[0].mlp.experts.down_proj
    key = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(in_16_bit, meant[key].bfloat16()) and in_16_bit.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bnb_4bit_is_used_as_it_is(kind: str, tmp_path: Path) -> None:
    llama(tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=kind == "nf4", bnb_4bit_compute_dtype=torch.float32
    )
    made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    made.save_pretrained(tmp_path / "made")
    keep_as_quantized(made)
    with torch.no_grad():
        wanted = made(IDS).logits
    model = load_causal(str(tmp_path / "made"), None, "float32", "cpu", None, None)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert_same(model(IDS).logits, wanted)
    plain = load_causal(str(tmp_path / "made"), None, "float32", "cpu", None, "dequantize")
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert_same(plain(IDS).logits, wanted)
    again = load_causal(str(tmp_path / "made"), None, "float32", "cpu", None, nf4(True, "float32", "cpu"))
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    if kind == "nf4":
        assert_same(again(IDS).logits, wanted)


def test_bnb_8bit_is_used_as_it_is(tmp_path: Path) -> None:
    llama(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_8bit=True)
    made: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    made.save_pretrained(tmp_path / "made")
    model = load_causal(str(tmp_path / "made"), None, "float32", "cpu", None, None)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    with torch.no_grad():
        assert_same(model(IDS).logits, made(IDS).logits)
    made = load_file(tmp_path / "made" / "model.safetensors")
    stem = "model.layers.0.mlp.up_proj"
    meant = made[f"{stem}.weight"].float() * (made[f"{stem}.SCB"] / 127)[:, None]
    plain = load_causal(str(tmp_path / "made"), None, "float32", "cpu", None, "dequantize")
    torch.testing.assert_close(plain.model.layers[0].mlp.up_proj.weight, meant, rtol=0, atol=1e-7)


def test_another_format_is_quantized_again(tmp_path: Path) -> None:
    """quant=nf4 over fp8: what bitsandbytes makes of the weights that are meant."""
    tensors = llama(tmp_path)
    released, meant = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        released[name], released[f"{name}_scale_inv"], meant[name] = fp8(tensors[name], (32, 32))
    expected(tmp_path, meant)
    name = write(tmp_path, released, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    model = load_causal(name, None, "float32", "cpu", None, nf4(True, "float32", "cpu"))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert_same(model(IDS).logits, logits(str(tmp_path / "plain"), nf4(True, "float32", "cpu")))


def test_nvfp4(tmp_path: Path) -> None:
    """Groups of 16 with a scale in FP8 each, and one of the tensor: divided by in compressed-tensors, multiplied in ModelOpt."""
    for number, settings in enumerate(
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        )
    ):
        home = tmp_path / str(number)
        tensors = llama(home)
        released, meant = dict(tensors), dict(tensors)
        for name in filter(is_linear, tensors):
            groups = released.pop(name).unflatten(-1, (-1, 16))
            second = groups.abs().max() / (6 * 448)
            scale = (groups.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
            codes = nearest_fp4(groups / (scale.float() * second)[..., None])
            meant[name] = (meant_by_fp4(codes) * (scale.float() * second)[..., None]).flatten(-2)
            released[f"{name}_packed" if number == 0 else name] = packed(codes).flatten(-2)
            released[f"{name}_scale"] = scale
            released[f"{name}_global_scale" if number == 0 else f"{name}_scale_2"] = (
                1 / second if number == 0 else second
            ).reshape(1)
        wanted = expected(home, meant)
        assert_same(logits(write(home, released, settings)), wanted)


def words(values: Tensor, bits: int) -> Tensor:
    """Integers along the last dimension into 32-bit words, the first in the lowest bits; one at a time."""
    count = 32 // bits
    padded = torch.nn.functional.pad(values.long(), (0, -values.shape[-1] % count))
    total = sum((padded[..., i::count] << (bits * i)) for i in range(count))
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)  # pyright: ignore


def integers(weight: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(0 ... 2^bits - 1, zero and scale of each group of a row, and what they stand for)."""
    groups = weight.unflatten(-1, (-1, size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    value = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return value.flatten(-2), zero[..., 0], scale[..., 0], ((value - zero) * scale).flatten(-2)


@pytest.mark.parametrize("kind", ["gptq", "gptq with an order", "awq", "compressed-tensors"])
def test_packed_integers(kind: str, tmp_path: Path) -> None:
    tensors = llama(tmp_path)
    released, meant = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        stem, weight = name.removesuffix(".weight"), released.pop(name)
        order = torch.randperm(weight.shape[1]) if "order" in kind else torch.arange(weight.shape[1])
        value, zero, scale, stood_for = integers(weight[:, order], 4, 32)
        back = order.argsort()
        meant[name] = stood_for[:, back]
        if kind.startswith("gptq"):
            released[f"{stem}.qweight"] = words(value[:, back], 4).T  # along the inputs
            released[f"{stem}.qzeros"] = words(zero.T - 1, 4)
            released[f"{stem}.scales"], released[f"{stem}.g_idx"] = scale.T, (back // 32).int()
        elif kind == "awq":
            mixed = [0, 2, 4, 6, 1, 3, 5, 7]
            released[f"{stem}.qweight"] = words(value.T.unflatten(-1, (-1, 8))[..., mixed].flatten(-2), 4)
            released[f"{stem}.qzeros"] = words(zero.T.unflatten(-1, (-1, 8))[..., mixed].flatten(-2), 4)
            released[f"{stem}.scales"] = scale.T
        else:
            released[f"{name}_packed"], released[f"{name}_scale"] = words(value, 4), scale
            released[f"{name}_zero_point"] = words(zero.T, 4).T  # along the outputs
            released[f"{name}_shape"] = torch.tensor(weight.shape)
    wanted = expected(tmp_path, meant)
    settings: dict[str, Any] = {"quant_method": kind.split()[0], "bits": 4, "group_size": 32}
    if kind == "compressed-tensors":
        settings |= {"format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    assert_same(logits(write(tmp_path, released, settings)), wanted)


def test_a_format_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    name = write(tmp_path, llama(tmp_path), {"quant_method": "aqlm"})
    with pytest.raises(
        UserError, match=r"model\.name: .*format 'aqlm', which cannot be read here \(there are: awq, bitsandbytes"
    ):
        logits(name)


def held(model: Any) -> dict[str, Any]:
    """By name, what the packed weights of a model are read through."""
    found = {(name, own): packed_of(module, own) for name, module in model.named_modules() for own in ("weight", *EXPERTS)}
    return {f"{name}.{own}": packed for (name, own), packed in found.items() if packed}


EXPERTS = ("gate_up_proj", "down_proj")


def trained(model: Any) -> tuple[float, Tensor]:
    """Loss and gradients of LoRA on all linear layers and experts, the same for models of the same weights."""
    said: dict[str, Any] = {"dropout": 0.0, "targets": "all-linear", "dtype": "float32", "lr_factor": 1.0}
    model = add_method(
        model,
        plain_lora(r=2, alpha=4.0, **said),
    )
    torch.manual_seed(1)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data.normal_(std=0.05)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainable])


def mixed_experts(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Mixtral in fp8 as such are released: each expert by itself, whose gates and ups the model keeps in one tensor."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(directory)
    released = load_file(directory / "model.safetensors")
    for name in [name for name in released if is_linear(name) or ".experts." in name]:
        released[name], released[f"{name}_scale_inv"], _ = fp8(released[name], (32, 32))
    return released, {"quant_method": "fp8", "weight_block_size": [32, 32]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt-oss", "mixtral"])
def test_held_experts_train_as_dequantized_ones_to_the_last_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    released, settings = (gpt_oss(tmp_path)[0], {"quant_method": "mxfp4"}) if kind == "gpt-oss" else mixed_experts(tmp_path)
    name = write(tmp_path, released, settings)
    as_it_is, once = (load_causal(name, None, dtype, "cpu", None, way) for way in (None, "dequantize"))
    packed = held(as_it_is)
    assert len([full for full in packed if full.endswith(EXPERTS)]) == 2 * as_it_is.config.num_hidden_layers
    assert not held(once) and count_parameters(as_it_is)[1] == count_parameters(once)[1]
    loss, gradients = trained(as_it_is)
    same_loss, same_gradients = trained(once)
    assert loss == same_loss and float(gradients.abs().max()) > 0
    assert torch.equal(gradients, same_gradients)


@pytest.mark.parametrize("order", [False, True], ids=["blocks", "an order"])
def test_scales_are_kept_once_each(order: bool) -> None:
    """[8, 6] in groups of 3 inputs, which an activation order spreads: 8 x 2 scales and zeros, and codes in half a byte."""
    group = torch.tensor([0, 1, 1, 0, 1, 0] if order else [0, 0, 0, 1, 1, 1])
    scale = torch.arange(1.0, 17.0).reshape(8, 2)[:, group]
    codes = torch.arange(48, dtype=torch.uint8).reshape(8, 6) % 16
    found = Held(elements_of(carrier(Elements("unsigned 4", codes, scale, scale + 3))), torch.float32)
    assert found.scale.cells.shape == (8, 2) and found.scale.cells.dtype == torch.bfloat16
    assert found.zero is not None and found.zero.cells.dtype == torch.uint8
    assert torch.equal(found.decode(found.pack(codes)), (codes - (scale + 3)) * scale)
    assert found.pack(codes).shape == (8, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_held_layer_with_a_bias_gives_the_bits_of_a_plain_one(dtype: str, tmp_path: Path) -> None:
    """Qwen2's queries have one: it is added before the product is rounded, as torch does it."""
    tensors = llama(tmp_path, attention_bias=True)
    for name in filter(is_linear, list(tensors)):
        if name.endswith("weight"):
            tensors[name], tensors[f"{name}_scale_inv"], _ = fp8(tensors[name], (32, 32))
        else:
            tensors[name].uniform_()
    name = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    kept, once = (load_causal(name, None, dtype, "cpu", None, way) for way in (None, "dequantize"))
    assert held(kept) and torch.equal(kept(IDS).logits, once(IDS).logits)


def test_what_cannot_be_held_is_dequantized_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head's weight is asked for by itself."""
    tensors = llama(tmp_path)
    for name in [*filter(is_linear, tensors), "lm_head.weight"]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = fp8(tensors[name], (32, 32))
    name = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    model = load_causal(name, None, "bfloat16", "cpu", None, None)
    assert (
        "1 quantized weights are dequantized at load, for they cannot be held as they are: lm_head.weight"
        in capsys.readouterr().out
    )
    assert type(model.lm_head) is torch.nn.Linear and "lm_head.weight" not in held(model)


def test_what_waits_for_the_backward_is_no_weight(tmp_path: Path) -> None:
    """A held linear layer keeps nothing of the size of its weight: it is made again."""
    tensors = llama(tmp_path)
    for name in filter(is_linear, list(tensors)):
        tensors[name], tensors[f"{name}_scale_inv"], _ = fp8(tensors[name], (32, 32))
    model = load_causal(
        write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]}), None, "float32", "cpu", None, None
    )
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert not kept
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("which", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_another_shape_than_the_configs_is_refused(which: str, tmp_path: Path) -> None:
    """A plain weight, one that would be held, and a quantized one that is dequantized at load."""
    tensors = llama(tmp_path)
    tensors[which] = torch.cat([tensors[which]] * 2)
    for name in [*filter(is_linear, list(tensors)), "lm_head.weight"]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = fp8(tensors[name], (32, 32))
    name = write(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    with pytest.raises(UserError, match=rf"1 .*of another shape than its config.json says \({which} is"):
        load_causal(name, None, "bfloat16", "cpu", None, None)


def test_experts_of_which_some_are_quantized_are_refused(tmp_path: Path) -> None:
    tensors, settings = mixed_experts(tmp_path)
    one = next(name for name in tensors if ".experts.1." in name and name.endswith("weight"))
    del tensors[f"{one}_scale_inv"]
    tensors[one] = tensors[one].bfloat16()
    with pytest.raises(UserError, match=r"only a part of model\.layers\.0\.mlp\.experts\.\w+ is quantized .*quant=dequantize"):
        load_causal(write(tmp_path, tensors, settings), None, "bfloat16", "cpu", None, None)
