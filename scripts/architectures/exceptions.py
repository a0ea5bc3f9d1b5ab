"""What of a tiny config its keys' names do not tell, by model_type."""

from __future__ import annotations

from typing import Any

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
HALF = MROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BY_LAYER = {"full_attention": PLAIN, "sliding_attention": PLAIN}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = ["conv", "full_attention"] * 2
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_encoder": {"vocab_size": 512, "hidden_size_global": 64},
    "blt_local_decoder": {"hidden_size_global": 64},
    "blt_global_transformer": {"hidden_size": 64, "head_dim": 32},
    "blt_patcher": {"vocab_size": 512},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": BY_LAYER},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {"head_dim": 32},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}, "moe_intermediate_size": [32, 32]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {"intermediate_size": 128, "activation_sparsity_pattern": [0.0] * 4},
    "glm46v_text": {"rope_parameters": HALF},
    "glm4v_text": {"rope_parameters": HALF},
    "glm4v_moe_text": {"rope_parameters": HALF},
    "glm_ocr_text": {"rope_parameters": HALF},
    "glm5_next_text": {"index_kpool": 4},
    "hunyuan_vl_text": {"rope_parameters": MROPE},
    "chameleon_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "janus_vqgan": {
        "num_embeddings": 64,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_patches": 4,
    },
    "kosmos_2_text_model": {"embed_dim": 64},
    "kosmos_2_5_text_model": {"embed_dim": 64},
    "lfm2": {"layer_types": LINEAR, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": LINEAR},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mistral4": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}, "head_dim": 32},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_spark_audio": {
        "hidden_sizes": [32, 32, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_hidden_layers": 4,
        "patch_sizes": [4, 4, 4, 4],
    },
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_omni_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attention_head_size": 16},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8},
}

_PICTURE = "its forward asks for a picture"
_PREDICTS = "a part of speculative decoding: it reads the keys and values of another model"
# What is not made, by name or class, and why
NOT_MADE: dict[str, str] = {
    "blip": _PICTURE,
    "blip-2": _PICTURE,
    "diffusion_gemma": "a diffusion language model: it fills blocks, and predicts no next token",
    "evolla": "its forward asks for a protein",
    "fast_vlm": "its tower needs the package timm",
    "florence2": "an encoder-decoder that reads pictures",
    "gemma3n": "its tower needs the package timm; its text is gemma3n_text",
    "gemma4_assistant": _PREDICTS,
    "gemma4_unified_assistant": _PREDICTS,
    "idefics": _PICTURE,
    "inkling_mm_model": "its tower needs the package scipy; its text is inkling_text",
    "instructblip": _PICTURE,
    "instructblipvideo": _PICTURE,
    "kosmos-2": _PICTURE,
    "shieldgemma2": "a classifier of pictures",
    "musicgen": "reads and writes codes of sound, four at a time",
    "musicgen_melody": "reads and writes codes of sound, four at a time",
    "perception_lm": "its tower needs the package timm",
    "pi0": "moves a robot: its forward asks for a state",
    "pix2struct": _PICTURE,
    "pp_formulanet": _PICTURE,
    "t5gemma2": "an encoder-decoder",
    "udop": "an encoder-decoder that reads pages",
    "vision-encoder-decoder": _PICTURE,
}
