"""Why a model of a family is not written: what llama.cpp would compute otherwise. '' where nothing is in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.models.gguf.shapes import rope_of

Odd = Callable[[Any], str]
_WINDOW = "a sliding window"


def no(config: Any) -> str:
    """Nothing is."""
    return ""


def slides(config: Any) -> str:
    """A window, where llama.cpp has none."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return _WINDOW if window and window < config.max_position_embeddings else ""


def which(*keys: str, said: str = "") -> Odd:
    """Any of these keys of the config is set. said: what that is; '' for the keys themselves."""
    return lambda config: next((said or f"{key}={getattr(config, key)}" for key in keys if getattr(config, key, None)), "")


def unless(key: str, said: str) -> Odd:
    """This key of the config is not set."""
    return lambda config: "" if getattr(config, key) else said


def any_of(*odds: Odd) -> Odd:
    """The first that is in the way."""
    return lambda config: next((found for odd in odds if (found := odd(config))), "")


tied, untied = (
    which("tie_word_embeddings", said="a head that is the embedding"),
    unless("tie_word_embeddings", "a head of its own"),
)


def experts(normed: bool) -> Odd:
    """normed: the weights of the chosen experts are made to sum to 1."""

    def odd(config: Any) -> str:
        if bool(config.norm_topk_prob) != normed:
            return f"norm_topk_prob={config.norm_topk_prob}"
        if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
            return "layers without experts"
        return slides(config)

    return odd


def period(count: int) -> Odd:
    """Every so manieth layer sees everything, the others a window."""

    def odd(config: Any) -> str:
        kinds = ["full_attention" if (i + 1) % count == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
        return "" if list(config.layer_types) == kinds else f"another order of layers than one in {count} that sees everything"

    return odd


def gemma(count: int) -> Odd:
    """count: as of `period`."""

    def odd(config: Any) -> str:
        head = config.head_dim
        if count == 2 and not config.tie_word_embeddings:
            return untied(config)
        largest = {2: 46, 6: 62}[count]  # layers of the model of 27B, for which llama.cpp divides by another width
        scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == largest else head
        if config.query_pre_attn_scalar != scale:
            return f"query_pre_attn_scalar={config.query_pre_attn_scalar}"
        if found := period(count)(config):
            return found
        if count == 6 and rope_of(config, "sliding_attention")["rope_theta"] != 10000.0:
            return "another rope of its windows than theta 10000"
        return "attention in both directions" if getattr(config, "use_bidirectional_attention", False) else ""

    return odd


def falcon(config: Any) -> str:
    """llama.cpp's Falcon is that of 7B and 40B."""
    if config.alibi:
        return "ALiBi"
    if config.bias or not config.parallel_attn:
        return "biases" if config.bias else "attention before its MLP"
    return "" if config.multi_query or config.new_decoder_architecture else "keys of their own for all heads"


def gpt2(config: Any) -> str:
    """Scores are divided by the root of a head's width, and by nothing else."""
    plain = config.scale_attn_weights and not getattr(config, "scale_attn_by_inverse_layer_idx", False)
    return "another scale of attention" if not plain else "attention to another model" if config.add_cross_attention else ""


def bigcode(config: Any) -> str:
    """All queries share one key and one value."""
    return gpt2(config) if config.multi_query else "keys of their own for all heads"


def smollm3(config: Any) -> str:
    """Every fourth layer has no rope."""
    turns = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    return slides(config) if list(config.no_rope_layers) == turns else "another order of layers without rope than one in 4"


def olmo3(config: Any) -> str:
    """One rope for all layers."""
    ropes = [rope_of(config, kind) for kind in ("sliding_attention", "full_attention")]
    return tied(config) or period(4)(config) or ("" if ropes[0] == ropes[1] else "two ropes")


def olmoe(config: Any) -> str:
    """Norms are over all heads together, and as wide for keys as for queries."""
    shared = config.num_key_value_heads != config.num_attention_heads
    return "keys that heads share" if shared else any_of(experts(False), tied, which("clip_qkv"))(config)


def cohere(config: Any) -> str:
    """llama.cpp has norms of queries and keys in models of 64 layers and more, and in no other."""
    large = config.num_hidden_layers >= 64
    if bool(config.use_qk_norm) != large:
        return f"use_qk_norm={config.use_qk_norm} in {config.num_hidden_layers} layers"
    return untied(config)


def exaone4(config: Any) -> str:
    """llama.cpp has windows in the model of 64 layers alone."""
    return "64 layers" if config.num_hidden_layers == 64 else slides(config)
