"""How many bytes a run will hold, from a model without weights: counted where it can be, never guessed from a rule of thumb."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.models.checkpoints.use import NONE_HELD, HeldBytes
from posttrain.models.kernels.logprobs import chunk_logits
from posttrain.models.language.activations import Activations, activations, llama_like, model_of_shapes
from posttrain.models.layers import fused_experts
from posttrain.models.offload.store import layer_names
from posttrain.models.peft.targets import linears

SMALLEST_IN_8_BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bit
BLOCK_OF_MOMENTS = 256  # that share a constant
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adamw_bytes(numbers: float, itemsize: int = 4) -> float:
    """Full training with AdamW: weights, gradients and two moments."""
    return 4 * numbers * itemsize


@dataclass(frozen=True)
class Counted:
    """Of one device, in bytes; flops: of one forward and backward pass over `tokens` tokens."""

    parts: dict[str, float]
    activations: float
    activations_recomputed: float
    total_parameters: int
    trained_parameters: int
    flops: float
    reading: str


def count(cfg: Any, config: Any, tokens: int, sequences: int, frozen_adapter: float, held: HeldBytes = NONE_HELD) -> Counted:
    """tokens: of the largest micro-batch, in `sequences` documents. frozen_adapter: bytes of an adapter underneath. held: weights
    that stay in the checkpoint's own format."""
    model = model_of_shapes(config, DTYPES[cfg.base_dtype], cfg.peft)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    experts = [module._parameters[own] for _, module, own in fused_experts(base)] if cfg.quant.packs_experts else []
    gone = _gone(base) if cfg.train.offload == "layers" else frozenset[int]()
    found = tally(cfg, model, base, [*(_base(module).weight for module in linears(base).values()), *experts], gone)
    kept = _offloaded(cfg, _activations(cfg, model, tokens, sequences, type(base).__name__), config)
    found.parts["weights"] -= held.numbers * DTYPES[cfg.base_dtype].itemsize
    found.parts["quantized weights"] += held.codes
    found.parts["quantization constants"] += held.constants
    parts = found.parts | {"frozen adapter": frozen_adapter, "logits": head_bytes(base.get_output_embeddings().weight, tokens)}
    if (dense := cfg.quant.kept_dense) != "auto":  # which takes no more than is left
        share = min(1.0, dense / config.get_text_config().num_hidden_layers)
        parts["dense copies"] = 4.0 * found.parts["quantized weights"] * share  # of half a byte
    return Counted(parts, kept.whole, kept.recomputed, found.total, found.trained, kept.flops, kept.reading)


def _gone(base: nn.Module) -> frozenset[int]:
    """The parameters of layers that are not in memory while one computes; on CUDA the next one is on its way there."""
    layers = [base.get_submodule(name) for name in layer_names(base)]
    here = layers[: 2 if torch.cuda.is_available() else 1]
    return frozenset(id(p) for layer in layers[len(here) :] for p in layer.parameters())


def _offloaded(cfg: Any, kept: Activations, config: Any) -> Activations:
    """With `train.offload` all layers are recomputed, and where it is activations that go, their inputs are away too."""
    if cfg.train.offload == "none":
        return kept
    inside = kept.whole / config.get_text_config().num_hidden_layers
    least = inside if cfg.train.offload == "activations" else kept.recomputed
    return kept._replace(whole=least, recomputed=least)


def _activations(cfg: Any, model: Any, tokens: int, sequences: int, kind: str) -> Activations:
    """Of the model; where its class asks for values, which there are none of here, of a Llama of the same sizes."""
    try:
        return activations(model, tokens, sequences, cfg.model.kernels)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
        stand_in = model_of_shapes(llama_like(model.config), DTYPES[cfg.base_dtype], cfg.peft)
        found = activations(stand_in, tokens, sequences, cfg.model.kernels)
        return found._replace(
            reading=f"activations and operations are those of a Llama of the same sizes: {kind} asks for values"
        )


class Tally(NamedTuple):
    """Bytes of weights, gradients and optimizer by part, and how many parameters there are and are trained."""

    parts: dict[str, float]
    total: int
    trained: int


def tally(cfg: Any, model: nn.Module, base: nn.Module, quantizable: list[Any], gone: Collection[int] = frozenset()) -> Tally:
    """base: the model within, which a method may be on; quantizable: the weights that `quant=` takes. gone: ids of parameters of
    layers whose weights are elsewhere, unless they are the method's."""
    linear = {id(weight) for weight in quantizable}
    weights = quantized = constants = adapters = gradients = optimizer = 0.0
    total = trained = 0
    own = {id(p) for name, p in base.named_parameters() if not cfg.peft.owns(name)}
    for p in {id(p): p for p in model.parameters()}.values():
        numbers, size = p.numel(), p.numel() * p.element_size()
        total += numbers
        if p.requires_grad:
            trained += numbers
            gradients += size
            optimizer += moments(cfg.optim.name, numbers, p.element_size())
        if id(p) not in own:
            adapters += size
        elif id(p) in gone:
            continue
        elif id(p) in linear and (kept := cfg.quant.weight_bytes(p.shape)):
            quantized, constants = quantized + kept[0], constants + kept[1]
        else:
            weights += size
    parts = {"weights": weights, "quantized weights": quantized, "quantization constants": constants, "adapters": adapters}
    return Tally(parts | {"gradients": gradients, "optimizer": optimizer}, total, trained)


def head_bytes(weight: Tensor, tokens: int) -> float:
    """A chunk of logits (in 16 and 32 bit, and their exponentials), and the gradient of every token's log-prob."""
    vocabulary, hidden = weight.shape
    here = "cuda" if torch.cuda.is_available() else "cpu"
    return 10.0 * min(chunk_logits(here), tokens * vocabulary) + tokens * hidden * weight.element_size()


def moments(optimizer: str, numbers: int, itemsize: int) -> float:
    """Bytes of AdamW's two moments of one tensor, as `make_optimizer` will have them on this machine."""
    eight_bit = optimizer in ("adamw_8bit", "paged_adamw_8bit") and torch.cuda.is_available()
    if eight_bit and numbers >= SMALLEST_IN_8_BIT:
        return 2 * (numbers + 4 * -(-numbers // BLOCK_OF_MOMENTS))
    return 2 * numbers * (4 if eight_bit else itemsize)


def _base(module: Any) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module
