"""Figures of transformers' configs, whatever each family calls them."""

from __future__ import annotations

from typing import Any

from gguf import Keys

Figures = dict[str, int | float]
Own = dict[str, int | float | None]  # of one family; None: that figure is not written
LLM, ATTENTION, ROPE = Keys.LLM, Keys.Attention, Keys.Rope


def head_dim(config: Any) -> int:
    """Of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    if getattr(config, "new_decoder_architecture", False):
        return config.num_kv_heads
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def width(config: Any) -> int:
    """Of the MLP."""
    found = (getattr(config, key, None) for key in ("intermediate_size", "n_inner", "ffn_hidden_size"))
    return next((size for size in found if size), 4 * config.hidden_size)


def act(config: Any) -> str:
    """Of the MLP."""
    keys = ("hidden_activation", "hidden_act", "activation_function", "activation")
    return next((found for key in keys if (found := getattr(config, key, None))), "silu")


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """rope_type, rope_theta and what else there is, of one kind of layers. transformers before 5 kept it in two keys."""
    found = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    found = dict(found.get(layers, found))
    found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    return found


def rope_width(config: Any) -> int:
    """How many of a head's figures turn."""
    part = rope_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return round(head_dim(config) * float(part or getattr(config, "rotary_pct", None) or 1.0))


def plain(config: Any) -> Own:
    """Nothing beside the usual ones."""
    return {}


def experts(config: Any) -> Own:
    """How many there are and work, and their width."""
    count = getattr(config, "num_experts", None) or config.num_local_experts
    own = getattr(config, "moe_intermediate_size", None)
    shared = getattr(config, "shared_expert_intermediate_size", None)
    found: Own = {LLM.EXPERT_COUNT: count, LLM.EXPERT_USED_COUNT: config.num_experts_per_tok}
    return found | {LLM.EXPERT_FEED_FORWARD_LENGTH: own, LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: shared}


def of_gemma(config: Any) -> Own:
    """The window, and what bounds scores and logits."""
    return {
        ATTENTION.SLIDING_WINDOW: config.sliding_window,
        LLM.ATTN_LOGIT_SOFTCAPPING: config.attn_logit_softcapping or None,
        LLM.FINAL_LOGIT_SOFTCAPPING: config.final_logit_softcapping or None,
    }


def of_granite(config: Any) -> Own:
    """Its four multipliers."""
    return {
        ATTENTION.SCALE: config.attention_multiplier,
        LLM.EMBEDDING_SCALE: config.embedding_multiplier,
        LLM.RESIDUAL_SCALE: config.residual_multiplier,
        LLM.LOGIT_SCALE: config.logits_scaling,
    }


def of_cohere(config: Any) -> Own:
    """The scale of its logits, and the window where it has one."""
    return {LLM.LOGIT_SCALE: config.logit_scale, ATTENTION.SLIDING_WINDOW: getattr(config, "sliding_window", None)}


def windowed(config: Any) -> Own:
    """The window alone."""
    return {ATTENTION.SLIDING_WINDOW: config.sliding_window}


def of_olmo(config: Any) -> Own:
    """What bounds queries, keys and values."""
    return {ATTENTION.CLAMP_KQV: config.clip_qkv}


def of_neox(config: Any) -> Own:
    """Whether attention and MLP read the same."""
    return {LLM.USE_PARALLEL_RESIDUAL: config.use_parallel_residual, ATTENTION.HEAD_COUNT_KV: config.num_attention_heads}


def of_gpt2(config: Any) -> Own:
    """Positions are learned; keys are one a head, or one for all."""
    heads = 1 if getattr(config, "multi_query", False) else config.num_attention_heads
    return {ROPE.DIMENSION_COUNT: None, ROPE.FREQ_BASE: None, ATTENTION.HEAD_COUNT_KV: heads}
