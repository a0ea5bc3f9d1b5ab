"""What llama.cpp knows of a family: its name of the architecture, the figures that it reads, and where it computes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

from posttrain.errors import UserError
from posttrain.models.gguf import changes, odd, shapes
from posttrain.models.gguf.shapes import ATTENTION, LLM, ROPE, Figures, Own, act, head_dim, kv_heads, rope_of, rope_width, width


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's. changes: of tensors, by what is found in their names. figures: beside the usual ones. odd: why a model
    of this family is not written, '' where it is. acts: of the MLP. biases: the config's keys of BIASES that may be set. ropes:
    beside the plain one. epsilon: the config's key of that of LayerNorm, or the number; '' with RMSNorm."""

    arch: MODEL_ARCH
    changes: Callable[[Any], changes.Changes] = changes.none
    figures: Callable[[Any], Own] = shapes.plain
    odd: odd.Odd = odd.no
    acts: tuple[str, ...] = ("silu", "swish")
    biases: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ()
    epsilon: str | float = ""


_ROPE, _TANH = changes.by_rope, ("gelu_pytorch_tanh", "gelu_new")
_GELU = (*_TANH, "gelu")  # llama.cpp takes all of them as the former, and transformers does so in Gemma
_LAYER, _BIASED = "layer_norm_eps", ("attention_bias",)
BIASES = {
    "attention_bias": "in attention",
    "mlp_bias": "in the MLP",
    "attention_out_bias": "behind attention",
    "use_bias": "everywhere",
}
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, _ROPE, biases=(*_BIASED, "mlp_bias"), ropes=("llama3",)),
    "mistral": Family(MODEL_ARCH.LLAMA, _ROPE, odd=odd.slides),
    "mixtral": Family(MODEL_ARCH.LLAMA, _ROPE, shapes.experts, odd.slides),
    "qwen2": Family(MODEL_ARCH.QWEN2, odd=odd.slides, biases=_BIASED),
    "qwen3": Family(MODEL_ARCH.QWEN3, odd=odd.slides),
    "qwen2_moe": Family(
        MODEL_ARCH.QWEN2MOE, changes.shared_gate, shapes.experts, odd.any_of(odd.tied, odd.experts(False)), biases=_BIASED
    ),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, figures=shapes.experts, odd=odd.experts(True)),
    "gemma": Family(MODEL_ARCH.GEMMA, changes.norms_by_one, odd=odd.untied, acts=_GELU),
    "gemma2": Family(MODEL_ARCH.GEMMA2, changes.norms_by_one, shapes.of_gemma, odd.gemma(2), _TANH),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, changes.norms_by_one, shapes.of_gemma, odd.gemma(6), _TANH),
    "phi": Family(MODEL_ARCH.PHI2, odd=odd.any_of(odd.tied, odd.which("qk_layernorm")), acts=_TANH, epsilon=_LAYER),
    "phi3": Family(MODEL_ARCH.PHI3, odd=odd.slides),
    "olmo": Family(MODEL_ARCH.OLMO, _ROPE, shapes.of_olmo, epsilon=1e-5),
    "olmo2": Family(MODEL_ARCH.OLMO2, odd=odd.tied),
    "olmo3": Family(MODEL_ARCH.OLMO2, figures=shapes.windowed, odd=odd.olmo3),
    "olmoe": Family(MODEL_ARCH.OLMOE, figures=shapes.experts, odd=odd.olmoe),
    "granite": Family(MODEL_ARCH.GRANITE, _ROPE, shapes.of_granite, biases=("mlp_bias",)),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, _ROPE, odd=odd.smollm3),
    "gpt2": Family(MODEL_ARCH.GPT2, changes.convolved, shapes.of_gpt2, odd.gpt2, _TANH, epsilon="layer_norm_epsilon"),
    "gpt_bigcode": Family(
        MODEL_ARCH.STARCODER, figures=shapes.of_gpt2, odd=odd.bigcode, acts=_TANH, epsilon="layer_norm_epsilon"
    ),
    "gpt_neox": Family(
        MODEL_ARCH.GPTNEOX,
        changes.of_neox,
        shapes.of_neox,
        odd.any_of(odd.tied, odd.unless("attention_bias", "no biases")),
        _GELU,
        _BIASED,
        epsilon=_LAYER,
    ),
    "falcon": Family(MODEL_ARCH.FALCON, changes.of_falcon, odd=odd.falcon, acts=_GELU, epsilon="layer_norm_epsilon"),
    "cohere": Family(MODEL_ARCH.COMMAND_R, figures=shapes.of_cohere, odd=odd.cohere, epsilon=_LAYER),
    "cohere2": Family(MODEL_ARCH.COHERE2, figures=shapes.of_cohere, odd=odd.any_of(odd.untied, odd.period(4)), epsilon=_LAYER),
    "arcee": Family(MODEL_ARCH.ARCEE, _ROPE, acts=("relu2",)),
    "nemotron": Family(
        MODEL_ARCH.NEMOTRON, changes.norms_by_one, odd=odd.tied, acts=("relu2",), biases=("mlp_bias",), epsilon="norm_eps"
    ),
    "seed_oss": Family(MODEL_ARCH.SEED_OSS, biases=_BIASED),
    "ernie4_5": Family(MODEL_ARCH.ERNIE4_5),
    "glm4": Family(MODEL_ARCH.GLM4, biases=_BIASED),
    "hunyuan_v1_dense": Family(MODEL_ARCH.HUNYUAN_DENSE),
    "exaone4": Family(MODEL_ARCH.EXAONE4, odd=odd.exaone4),
    "stablelm": Family(
        MODEL_ARCH.STABLELM, odd=odd.any_of(odd.tied, odd.which("qk_layernorm", said="norms of queries and keys")), epsilon=_LAYER
    ),
    "starcoder2": Family(
        MODEL_ARCH.STARCODER2,
        odd=odd.any_of(odd.unless("use_bias", "no biases"), odd.slides),
        acts=_TANH,
        biases=("use_bias",),
        epsilon="norm_epsilon",
    ),
}


def require_family(config: Any) -> Family:
    """Of a model of transformers' config. Raises UserError for one that is not written. Loads nothing."""
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(
            f"export: no GGUF is written of {kind} models (there are: {', '.join(FAMILIES)}); --to hf writes any, which "
            "llama.cpp's own converter reads"
        )
    family, rope = FAMILIES[kind], rope_of(config)["rope_type"]
    found = family.odd(config)
    if rope not in ("default", *family.ropes):
        known = ", ".join(("default", *family.ropes))
        raise UserError(f"export: no GGUF is written of {kind} models with {rope} rope (there are: {known}); --to hf writes any")
    if act(config) not in family.acts:
        found = f"{act(config)} in the MLP"
    for key, where in BIASES.items():
        if getattr(config, key, False) and key not in family.biases:
            found = f"biases {where}"
    if found:
        raise UserError(f"export: no GGUF is written of {kind} models with {found}; --to hf writes any")
    return family


def figures_of(config: Any) -> Figures:
    """All that the file says of the model's shape, by the gguf package's names of keys, with {arch} filled in."""
    family, head = FAMILIES[config.model_type], head_dim(config)
    key = family.epsilon or "rms_norm_eps"
    found: Own = {
        LLM.VOCAB_SIZE: config.vocab_size,
        LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        LLM.EMBEDDING_LENGTH: config.hidden_size,
        LLM.BLOCK_COUNT: config.num_hidden_layers,
        LLM.FEED_FORWARD_LENGTH: width(config),
        ATTENTION.HEAD_COUNT: config.num_attention_heads,
        ATTENTION.HEAD_COUNT_KV: kv_heads(config),
        ATTENTION.KEY_LENGTH: head,
        ATTENTION.VALUE_LENGTH: head,
        ATTENTION.LAYERNORM_EPS if family.epsilon else ATTENTION.LAYERNORM_RMS_EPS: float(
            getattr(config, key) if isinstance(key, str) else key
        ),
        ROPE.DIMENSION_COUNT: rope_width(config),
        ROPE.FREQ_BASE: float(rope_of(config)["rope_theta"]),
    }
    name, found = MODEL_ARCH_NAMES[family.arch], found | family.figures(config)
    return {key.format(arch=name): value for key, value in found.items() if value is not None}
