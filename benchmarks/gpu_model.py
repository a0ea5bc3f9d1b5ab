"""The shapes of benchmarks/gpu.py with random weights, and how many operations a token of them needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA = {"architecture": "llama", "tie_word_embeddings": False}
MOE = {"architecture": "qwen3_moe", "head_dim": 128, "norm_topk_prob": True, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "30b-moe": {**MOE, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                "vocab_size": 151936},
    "65b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 64, "vocab_size": 32000},
    "toy": {**LLAMA, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1024},
    "toy-moe": {**MOE, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
                "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
                "vocab_size": 1024},
}  # fmt: skip

OF_WEIGHT = {"none": 2.0, "nf4": 0.516}  # bytes of a linear layer's number


def config_of(shape: str, **other: Any) -> Any:
    """transformers' config of a shape."""
    settings = {**SHAPES[shape], **other}
    return AutoConfig.for_model(settings.pop("architecture"), **settings, max_position_embeddings=8192, pad_token_id=0)


def random_model(shape: str, quant: str, device: str, trained: bool = False) -> Any:
    """Layer by layer, so that no more than one of them is ever there in 16 bit on the way to NF4. trained: in float32."""
    config = config_of(shape)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config)
        config.num_hidden_layers = layers
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config_of(shape, num_hidden_layers=1)).model.layers[0])
        for i in range(layers):
            with torch.device(device):
                layer = kind(config, i)
                for weight in layer.parameters():  # experts have none of their own
                    if weight.ndim > 1:
                        weight.data.normal_(std=0.02)
            if quant == "nf4":
                _to_nf4(layer, device)
            model.model.layers.append(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.num_hidden_layers = layers
    model.is_loaded_in_4bit = quant == "nf4"
    return model.requires_grad_(trained)


def _to_nf4(layer: nn.Module, device: str) -> None:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for part in layer.children():
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                small = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                    device="meta",  # else random numbers are drawn on the CPU first, for minutes
                )  # fmt: skip
                dense: Any = linear.weight.data
                small.weight = Params4bit(dense, requires_grad=False, quant_type="nf4", module=small)  # pyright: ignore
                setattr(part, name, small.to(device))


def needed(model: Any, shape: str) -> tuple[float, float]:
    """Operations of products that a token needs in the layers, and that a prediction needs in the head: 2 a number forward and 2
    backward through it, 2 more where it is trained. Of experts those that a token goes to; the embedding is none."""
    settings, found = SHAPES[shape], {True: 0.0, False: 0.0}
    share = settings["num_experts_per_tok"] / settings["num_experts"] if "num_experts" in settings else 1.0
    for name, p in model.named_parameters():
        if "embed_tokens" in name or _numbers(p) == max(p.shape, default=0):  # a norm's
            continue
        found["layers" in name] += (6.0 if p.requires_grad else 4.0) * _numbers(p) * (share if ".experts." in name else 1.0)
    return found[True], found[False]


def share_of_rate(tokens: int, predictions: int, needs: tuple[float, float], seconds: float, rate: float) -> float:
    """Of so many operations a second, the share that is needed ones. needs: as `needed` has them. Attention's own products, which
    grow with the length, are not counted, so it is a little more."""
    return (tokens * needs[0] + predictions * needs[1]) / seconds / rate


def floor_bytes(shape: str, quant: str, rank: int, tokens: int) -> float | None:
    """The least that LoRA on all linear layers can do with, for one micro-batch of so many tokens: weights in 2 bytes or in NF4
    with double quantization, 6 bytes a trained number (16 bit, moments in 8), each layer's input, and all that one layer keeps.
    None for experts, of which nobody has reckoned it."""
    known = SHAPES[shape]
    if known["architecture"] != "llama":
        return None
    width, inner, layers = known["hidden_size"], known["intermediate_size"], known["num_hidden_layers"]
    keys = width // known["num_attention_heads"] * known["num_key_value_heads"]
    linear = layers * (2 * width * width + 2 * width * keys + 3 * width * inner)
    trained = layers * rank * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inner))
    inputs, inside = 2 * tokens * width * layers, 2 * tokens * (2 * width + 2 * (width + 2 * keys) + 3 * width + 4 * inner)
    return OF_WEIGHT[quant] * linear + 4 * known["vocab_size"] * width + 6 * trained + inputs + inside


def _numbers(p: torch.Tensor) -> int:
    state = getattr(p, "quant_state", None)
    return state.shape.numel() if state is not None else p.numel()
