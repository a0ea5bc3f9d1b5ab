"""From a config class of transformers to a config a few layers deep and 64 wide.

The class's own defaults tell which keys there are; a key whose name says a size gets a small one that goes with the others.
What names do not tell is in exceptions.py, by model_type.
"""

from __future__ import annotations

import re
from typing import Any

from architectures.exceptions import EXCEPTIONS
from architectures.tokens import END, PAD, SPARE, token_ids

MROPE = [2, 3, 3]  # of half a head of 16: time, height, width
LAYERS, TOWER_LAYERS, HEADS, EXPERTS, WINDOW = 4, 2, 4, 4, 16
# the sizes of a language model, by the whole name of their key; the first pattern that matches is taken
TEXT_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size|d_model|n_embd|emb_dim|lru_width|word_embed_proj_dim|embedding_size|input_embedding_size", 64),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|layers|num_blocks", LAYERS),
    (r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|attention_heads", HEADS),
    (r"num_(en|de)coder_attention_heads|swa_num_attention_heads", HEADS),
    (r"(intermediate|inner|ffn|feed_forward)_(size|dim)(_mlp)?|(en|de)coder_ffn_dim|d_?ff|dim_ff|ffn_hidden_size", 128),
    (r"dense_intermediate_size|ffn_intermediate_size|feed_forward_proj_size", 128),
    (r"(moe|expert|shared|shared_expert|shared_experts|moe_shared_expert)_(intermediate_size|ffn_hidden_size)", 32),
    (r"head_dim|global_head_dim|swa_head_dim|(qk_rope|qk_nope|v)_head_dim|kv_channels|dim_head|d_kv", 16),
    (r"query_pre_attn_scalar", 16),
    (r"attention_head_dim", 32),
    (r"rotary_dim", 8),
    (r"(num|moe_num|n)_(local_|routed_|real_)?experts", EXPERTS),
    (r"num_experts_per_(tok|token)|num_selected_experts|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"n_groups?|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(kv|q|o)_lora_rank|laurel_rank|hc_lowrank", 16),
    (r"sliding_window(_size)?|(attention_)?window_size|attention_chunk_size|local_attention|block_size", WINDOW),
    (r"num_sliding_attention_heads|linear_num_heads", HEADS),
    (r"linear_head_dim|kv_channels", 16),
    (r"(.*_)?(projector|projection|adapter|alignment|out|merged)_(hidden|intermediate|output)?_?(size|dim)|out_hidden_size", 64),
    (r"moe_hidden_size|share_expert_dim|backbone_hidden_size|moe_latent_size", 64),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length", 1024),
    (r"(mamba_d_|ssm_)?state(_size)?|mamba_d_state", 16),
    (r"mamba_n_heads|mamba_num_heads", HEADS),
    (r"mamba_d_head|mamba_head_?dim", 32),
    (r"mamba_d_ssm", 128),
    (r"mamba_n_groups", 1),
    (r"time_step_rank|mamba_dt_rank", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", HEADS),
    (r"linear_(key|value)_head_dim", 16),
    (r"index_(n|num)_heads|index_heads", 16),  # few would all be 0 behind their relu, and equal scores make top-k arbitrary
    (r"index_head_dim", 32),
    (r"index_topk", 8),
    (r"hidden_size_per_layer_input", 16),
    (r"max_window_layers", 2),
    (r"num_kv_shared_layers", 0),
    (r"num_nextn_predict_layers", 0),
)  # fmt: skip
TOWER_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size|d_model|embed_dim|encoder_hidden_size|width", 32),
    (r"num_hidden_layers|num_layers|depth|layers|encoder_layers|n_layers?|num_blocks", TOWER_LAYERS),
    (r"num_attention_heads|num_heads|attention_heads|heads|encoder_attention_heads|num_key_value_heads|n_heads?", 2),
    (r"intermediate_size|encoder_ffn_dim|mlp_dim|ffn_dim", 64),
    (r"head_dim|attention_head_dim", 16),
    (r"image_size", 28),
    (r"patch_size", 14),
    (r"out_hidden_size|text_hidden_size|vision_output_dim|output_dim|projector_(input|output)_dim", 64),
    (r"vocab_size", 64),
    (r"\w*(size|dim|channels|width|factor|heads_dim)", 64),
)  # fmt: skip
KEPT = ("video_temporal_patch_size",)  # what a config asks of one inside it
_WANTED = {"head_dim": 16, "num_experts_per_tok": 2, "n_routed_experts": EXPERTS}
KEY_VALUE_HEADS = re.compile(
    r"(swa_|global_)?(num_)?(key_value|kv)_heads|kv_n_heads|num_global_key_value_heads|swa_num_key_value_heads"
)
VOCABULARIES = re.compile(r"(unpadded_)?vocab_size(_per_layer_input)?|text_vocab_size")
TOKEN = re.compile(r"\w+_(id|index|ids)$")


def tiny_keywords(config_class: Any, tower: bool = False) -> dict[str, Any]:
    """What to give to `config_class` so that it is tiny. tower: it reads pictures or sound, beside a language model."""
    kind = config_class.model_type
    defaults = defaults_of(config_class)
    found: dict[str, Any] = {}
    for key, value in defaults.items():
        if (small := _small(key, value, defaults, tower)) is not None:
            found[key] = small
    rope = defaults.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        found["rope_parameters"] = rope | {"mrope_section": MROPE}
    for key in config_class.sub_configs:
        nested = defaults.get(key)
        if isinstance(nested, dict):
            found[key] = _nested(nested, _is_text(key))
    found |= EXCEPTIONS.get(kind, {})
    if "per_layer_config" in defaults:  # sizes of single layers, by their old numbers
        found["per_layer_config"] = {}
    return found


def defaults_of(config_class: Any) -> dict[str, Any]:
    """Keys and values of a config that nobody has set anything of."""
    try:
        return config_class().to_dict()
    except Exception:  # its defaults do not go together: those of its fields, one by one
        return {name: getattr(config_class, name, None) for name in config_class.__dataclass_fields__}


def _is_text(key: str) -> bool:
    return key in ("text_config", "llm_config", "language_config", "thinker_config", "decoder", "decoder_config")


def _nested(defaults: dict[str, Any], text: bool) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    kind = defaults.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        return {}
    return {
        "model_type": kind,
        **{key: defaults[key] for key in KEPT if key in defaults},
        **tiny_keywords(CONFIG_MAPPING[kind], tower=not text),
    }


def _small(key: str, value: Any, defaults: dict[str, Any], tower: bool) -> Any:
    """The small value of one key; None: leave it."""
    if isinstance(value, list | tuple) and (short := _fewer(key, list(value), defaults, tower)) is not None:
        return short
    if isinstance(value, bool) or not isinstance(value, int | None):
        return None
    if key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        return {"pad": token_ids()[PAD]}.get(key[:3], token_ids()[END])
    if value is None:  # which some classes make up for and some do not
        return _WANTED.get(key)
    if value < 0:
        return None
    if VOCABULARIES.fullmatch(key) and not tower:
        return len(token_ids())
    if KEY_VALUE_HEADS.fullmatch(key) and not tower:
        alike = value == next((defaults[name] for name in ("num_attention_heads", "n_heads") if defaults.get(name)), None)
        return HEADS if alike else 1 if value == 1 else 2
    for pattern, size in TOWER_SIZES if tower else TEXT_SIZES:
        if re.fullmatch(pattern, key):
            return min(size, value) if value else None
    if TOKEN.fullmatch(key) and value >= len(token_ids()) - len(SPARE):
        return token_ids()[SPARE[value % len(SPARE)]]
    return None


def _fewer(key: str, values: list[Any], defaults: dict[str, Any], tower: bool) -> list[Any] | None:
    """A list with a value for each layer, for as many as there are now: every kind of layer in turn."""
    named = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
    count = next((defaults[name] for name in named if isinstance(defaults.get(name), int)), None)
    if count is None or len(values) != count:
        return None
    kinds = list(dict.fromkeys(values))
    layers = TOWER_LAYERS if tower else LAYERS
    return (kinds * layers)[:layers]
