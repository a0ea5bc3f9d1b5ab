"""Tiny models with experts, of transformers' own classes, with random weights that are large enough to show a fault."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

V, D, E = 61, 32, 4
COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ROUTED = {"n_routed_experts": E, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1,
          "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
LOCAL = {"num_local_experts": E, "num_experts_per_tok": 2}
SHARED = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
CLASSES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**SHARED, "head_dim": 8, "mlp_only_layers": [0]},
    "deepseek_v3": {**ROUTED, **MLA},
    "gpt_oss": {**LOCAL, "head_dim": 8, "sliding_window": 16},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "qwen2_moe": {**SHARED, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "llama4_text": {**LOCAL, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 16,
                    "moe_layers": [1]},
    "mixtral": LOCAL,
    "deepseek_v2": {**ROUTED, **MLA},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "dots1": {**ROUTED, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": E, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1,
                     "moe_layer_start_index": 1, "head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": E, "moe_topk": 2, "head_dim": 8},
    "olmoe": {"num_experts": E, "num_experts_per_tok": 2},
    "granitemoe": LOCAL,
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "phimoe": LOCAL,
    "qwen3_next": {**SHARED, **DELTA, "shared_expert_intermediate_size": 24},
    "qwen3_5_moe_text": {**SHARED, **DELTA, "shared_expert_intermediate_size": 24},
    "jamba": {"num_experts": E, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {**LOCAL, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention"]},
    "nemotron_h": {"head_dim": 8, "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
                   "n_routed_experts": E, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
                   "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4},
}  # fmt: skip
FAST = ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoeshared"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]])


def tiny(name: str, **more: Any) -> Any:
    """A model in evaluation mode, in float32."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**COMMON, **CLASSES.get(name, {}), **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def train(model: Any, seed: int = 1) -> None:
    """Stands for training: every trained number becomes another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits
