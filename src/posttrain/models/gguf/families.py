"""What llama.cpp knows of a family: its name of the architecture, the figures that it reads, and where it computes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gguf import MODEL_ARCH, Keys

from posttrain.errors import UserError

Figures = dict[str, int | float]
LLM, ATTENTION = Keys.LLM, Keys.Attention


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's. turns: q's and k's rows go into the order of its own rope. adds_one: norms are written as 1 + w.
    figures: beside the usual ones. odd: why a model of this family is not written, '' where it is. acts: of the MLP. biases:
    attention may have them. ropes: beside the plain one. epsilon: where the config keeps that of LayerNorm, '' with RMSNorm."""

    arch: MODEL_ARCH
    turns: bool = False
    adds_one: bool = False
    figures: Callable[[Any], Figures] = lambda config: {}
    odd: Callable[[Any], str] = lambda config: ""
    acts: tuple[str, ...] = ("silu", "swish")
    biases: bool = False
    ropes: tuple[str, ...] = ()
    epsilon: str = ""


def _experts(config: Any) -> Figures:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    own = getattr(config, "moe_intermediate_size", None)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    found: Figures = {LLM.EXPERT_COUNT: count, LLM.EXPERT_USED_COUNT: config.num_experts_per_tok}
    found |= {LLM.EXPERT_FEED_FORWARD_LENGTH: own} if own else {}
    return found | ({LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: shared} if shared else {})


def _of_gemma(config: Any) -> Figures:
    found: Figures = {ATTENTION.SLIDING_WINDOW: config.sliding_window}
    caps = {
        LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping,
        LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping,
    }
    return found | {key: value for key, value in caps.items() if value}


def _of_granite(config: Any) -> Figures:
    return {
        ATTENTION.SCALE: config.attention_multiplier,
        LLM.EMBEDDING_SCALE: config.embedding_multiplier,
        LLM.RESIDUAL_SCALE: config.residual_multiplier,
        LLM.LOGIT_SCALE: config.logits_scaling,
    }


def _slides(config: Any) -> str:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return "a sliding window" if window and window < config.max_position_embeddings else ""


def _odd_experts(normed: bool) -> Callable[[Any], str]:
    def odd(config: Any) -> str:
        if bool(config.norm_topk_prob) != normed:
            return f"norm_topk_prob={config.norm_topk_prob}"
        if config.decoder_sparse_step != 1 or config.mlp_only_layers:
            return "layers without experts"
        return _slides(config)

    return odd


def _odd_gemma(period: int) -> Callable[[Any], str]:
    """period: every so manieth layer sees everything, the others a window."""

    def odd(config: Any) -> str:
        head = config.head_dim
        largest = {2: 46, 6: 62}[period]  # layers of the model of 27B, for which llama.cpp divides by another width
        scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == largest else head
        if config.query_pre_attn_scalar != scale:
            return f"query_pre_attn_scalar={config.query_pre_attn_scalar}"
        kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
        if list(config.layer_types) != kinds:
            return f"another order of layers than one in {period} that sees everything"
        if period == 6 and rope_of(config, "sliding_attention")["rope_theta"] != 10000.0:
            return "another rope of its windows than theta 10000"
        return "attention in both directions" if getattr(config, "use_bidirectional_attention", False) else ""

    return odd


def _odd_stablelm(config: Any) -> str:
    if config.tie_word_embeddings:
        return "a head that is the embedding"
    return "norms of queries and keys" if config.qk_layernorm else ""


def _odd_starcoder2(config: Any) -> str:
    return _slides(config) if config.use_bias else "no biases"


_GELU = ("gelu_pytorch_tanh",)
FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, turns=True, biases=True, ropes=("llama3",)),
    "mistral": Family(MODEL_ARCH.LLAMA, turns=True, odd=_slides),
    "mixtral": Family(MODEL_ARCH.LLAMA, turns=True, figures=_experts, odd=_slides),
    "qwen2": Family(MODEL_ARCH.QWEN2, odd=_slides, biases=True),
    "qwen3": Family(MODEL_ARCH.QWEN3, odd=_slides),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, figures=_experts, odd=_odd_experts(False), biases=True),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, figures=_experts, odd=_odd_experts(True)),
    "gemma": Family(MODEL_ARCH.GEMMA, adds_one=True, acts=(*_GELU, "gelu")),  # transformers and llama.cpp take both as the former
    "gemma2": Family(MODEL_ARCH.GEMMA2, adds_one=True, figures=_of_gemma, odd=_odd_gemma(2), acts=_GELU),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, adds_one=True, figures=_of_gemma, odd=_odd_gemma(6), acts=_GELU),
    "phi3": Family(MODEL_ARCH.PHI3, odd=_slides),
    "olmo2": Family(MODEL_ARCH.OLMO2),
    "granite": Family(MODEL_ARCH.GRANITE, turns=True, figures=_of_granite),
    "stablelm": Family(MODEL_ARCH.STABLELM, odd=_odd_stablelm, epsilon="layer_norm_eps"),
    "starcoder2": Family(MODEL_ARCH.STARCODER2, odd=_odd_starcoder2, acts=_GELU, epsilon="norm_epsilon"),
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
    odd = family.odd(config)
    if rope not in ("default", *family.ropes):
        known = ", ".join(("default", *family.ropes))
        raise UserError(f"export: no GGUF is written of {kind} models with {rope} rope (there are: {known}); --to hf writes any")
    if (act := _act(config)) not in family.acts:
        odd = f"{act} in the MLP"
    if getattr(config, "attention_bias", False) and not family.biases:
        odd = "biases in attention"
    if odd:
        raise UserError(f"export: no GGUF is written of {kind} models with {odd}; --to hf writes any")
    return family


def figures_of(config: Any) -> Figures:
    """All that the file says of the model's shape, by the gguf package's names of keys, with {arch} filled in."""
    family, head = FAMILIES[config.model_type], head_dim(config)
    rope = rope_of(config)
    found: Figures = {
        LLM.VOCAB_SIZE: config.vocab_size,
        LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        LLM.EMBEDDING_LENGTH: config.hidden_size,
        LLM.BLOCK_COUNT: config.num_hidden_layers,
        LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        ATTENTION.HEAD_COUNT: config.num_attention_heads,
        ATTENTION.HEAD_COUNT_KV: config.num_key_value_heads,
        ATTENTION.KEY_LENGTH: head,
        ATTENTION.VALUE_LENGTH: head,
        ATTENTION.LAYERNORM_EPS if family.epsilon else ATTENTION.LAYERNORM_RMS_EPS: float(
            getattr(config, family.epsilon or "rms_norm_eps")
        ),
        Keys.Rope.DIMENSION_COUNT: round(head * float(rope.get("partial_rotary_factor") or 1.0)),
        Keys.Rope.FREQ_BASE: float(rope["rope_theta"]),
    }
    from gguf import MODEL_ARCH_NAMES

    return {key.format(arch=MODEL_ARCH_NAMES[family.arch]): value for key, value in (found | family.figures(config)).items()}


def head_dim(config: Any) -> int:
    """Of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """rope_type, rope_theta and what else there is, of one kind of layers. transformers before 5 kept it in two keys."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found = dict(found.get(layers, found))
    found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return found


def _act(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
