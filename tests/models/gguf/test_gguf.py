"""A GGUF file: transformers' own reader finds the same model in it, and the tokenizer stands there token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig

from posttrain.errors import RunError, UserError
from posttrain.models.builtin import tiny_tokenizer
from posttrain.models.gguf.families import FAMILIES, require_family
from posttrain.models.gguf.read import OTHERS, check_vocabulary, load_gguf, read_gguf
from posttrain.models.gguf.vocabulary import vocabulary_of
from posttrain.models.gguf.write import write_gguf

IDS = torch.randint(5, 800, (2, 16), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {
    "vocab_size": 896, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "gemma": {"head_dim": 32},
    "gemma2": WINDOWS,
    "gemma3_text": {**WINDOWS, "num_hidden_layers": 7},
    "phi3": {"sliding_window": None, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "stablelm": {"use_qkv_bias": True, "layer_norm_eps": 1e-4},
    "starcoder2": {"sliding_window": None, "norm_epsilon": 1e-4, "tie_word_embeddings": True},
    "phi": {"pad_token_id": 0, "partial_rotary_factor": 0.5},
    "olmo": {"clip_qkv": 0.9, "pad_token_id": 0},
    "olmo3": {"sliding_window": 8, "num_hidden_layers": 5, "pad_token_id": 0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "pad_token_id": 0},
    "smollm3": {"num_hidden_layers": 5, "pad_token_id": 0},
    "gpt2": {"n_inner": 96},
    "gpt_bigcode": {"n_inner": 96, "multi_query": True},
    "gpt_neox": {"rotary_pct": 0.25},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 5, "logit_scale": 0.25},
    "arcee": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "seed_oss": {"head_dim": 32},
    "ernie4_5": {"head_dim": 16},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.1, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
}


def made(folder: Path, kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, **OWN[kind], **more}), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder)
    return model


def written(folder: Path, model: Any, dtype: str = "f32", tokenizer: Any = None) -> Path:
    tokenizer = tokenizer or tiny_tokenizer()
    vocabulary = vocabulary_of(tokenizer, [2, 0], model.config.vocab_size)
    write_gguf(folder, model.config, vocabulary, dtype, folder / "m.gguf", "m")
    check_vocabulary(folder / "m.gguf", vocabulary)
    return folder / "m.gguf"


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_what_is_read_is_the_same_model(kind: str, tmp_path: Path) -> None:
    """By transformers' reader where it has the family, and by ours: KL, top token and greedy answers."""
    model = made(tmp_path, kind)
    require_family(model.config)
    file = written(tmp_path, model)
    with torch.no_grad():
        want = model(IDS).logits
        for read in (load_gguf, *([read_gguf] if kind in OTHERS else [])):
            back = read(file, model.config)
            logits = back(IDS).logits
            torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
            gap = want.log_softmax(-1) - logits.log_softmax(-1)
            assert float((want.softmax(-1) * gap).sum(-1).mean()) < 1e-6
            greedy = [each.generate(IDS[:1, :8], max_new_tokens=8, do_sample=False) for each in (model, back)]
            assert torch.equal(*greedy)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text", "nemotron"])
def test_gemma_s_norms_are_written_as_llama_cpp_multiplies(kind: str, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    tensors = {t.name: t for t in GGUFReader(written(tmp_path, model)).tensors}
    want = 1 + model.model.layers[0].input_layernorm.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_norm.weight"].data, want)


def test_experts_lie_together_and_their_router_in_32_bits(tmp_path: Path) -> None:
    model = made(tmp_path, "mixtral", hidden_size=64, intermediate_size=96)
    tensors = {t.name: t for t in GGUFReader(written(tmp_path, model, "q8_0")).tensors}
    assert list(tensors["blk.1.ffn_gate_exps.weight"].shape) == [64, 96, 4]  # the innermost first
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize(
    ("kind", "key", "want"),
    [
        ("granite", "granite.attention.scale", 0.1),
        ("granite", "granite.logit_scale", 4.0),
        ("gemma2", "gemma2.attn_logit_softcapping", 50.0),
        ("gemma3_text", "gemma3.attention.sliding_window", 8),
        ("qwen2_moe", "qwen2moe.expert_shared_feed_forward_length", 64),
        ("phi3", "phi3.rope.dimension_count", 8),
        ("stablelm", "stablelm.rope.dimension_count", 4),
        ("stablelm", "stablelm.attention.layer_norm_epsilon", 1e-4),
        ("starcoder2", "starcoder2.attention.layer_norm_epsilon", 1e-4),
        ("mixtral", "llama.expert_used_count", 2),
        ("gpt_neox", "gptneox.use_parallel_residual", True),
        ("gpt_neox", "gptneox.rope.dimension_count", 4),
        ("falcon", "falcon.attention.head_count_kv", 2),
        ("gpt_bigcode", "starcoder.attention.head_count_kv", 1),
        ("olmo", "olmo.attention.clamp_kqv", 0.9),
        ("olmo", "olmo.attention.layer_norm_epsilon", 1e-5),
        ("cohere2", "cohere2.attention.sliding_window", 8),
        ("cohere", "command-r.logit_scale", 0.25),
        ("olmo3", "olmo2.attention.sliding_window", 8),
    ],
)
def test_what_a_family_computes_with_is_said(kind: str, key: str, want: float, tmp_path: Path) -> None:
    fields = GGUFReader(written(tmp_path, made(tmp_path, kind))).fields
    assert fields[key].contents() == pytest.approx(want)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("mistral", {"sliding_window": 16}, "a sliding window"),
        ("phi3", {"sliding_window": 16}, "a sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "a sliding window"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "layers without experts"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar=32"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "one in 6"),
        ("olmo2", {"attention_bias": True}, "biases in attention"),
        ("granite", {"hidden_act": "relu"}, "relu in the MLP"),
        ("stablelm", {"qk_layernorm": True}, "norms of queries and keys"),
        ("stablelm", {"tie_word_embeddings": True}, "a head that is the embedding"),
        ("starcoder2", {"use_bias": False}, "no biases"),
        ("gpt_neox", {"attention_bias": False}, "no biases"),
        ("gpt_neox", {"tie_word_embeddings": True}, "a head that is the embedding"),
        ("qwen2_moe", {"tie_word_embeddings": True}, "a head that is the embedding"),
        ("olmo2", {"tie_word_embeddings": True}, "a head that is the embedding"),
        ("gemma", {"tie_word_embeddings": False}, "a head of its own"),
        ("gemma2", {"tie_word_embeddings": False}, "a head of its own"),
        ("cohere", {"tie_word_embeddings": False}, "a head of its own"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm=True in 2 layers"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", {"bias": True}, "biases"),
        ("falcon", {"new_decoder_architecture": False, "multi_query": False}, "keys of their own for all heads"),
        ("falcon", {"new_decoder_architecture": False, "parallel_attn": False}, "attention before its MLP"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "another scale of attention"),
        ("gpt_bigcode", {"multi_query": False}, "keys of their own for all heads"),
        ("smollm3", {"no_rope_layers": [1] * 5}, "another order of layers without rope than one in 4"),
        ("olmo3", {"layer_types": ["full_attention"] * 5}, "one in 4"),
        ("olmoe", {"num_key_value_heads": 2}, "keys that heads share"),
        ("olmoe", {"clip_qkv": 1.0}, "clip_qkv=1.0"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("arcee", {"mlp_bias": True}, "biases in the MLP"),
        ("ernie4_5", {"use_bias": True}, "biases everywhere"),
        ("seed_oss", {"attention_out_bias": True}, "biases behind attention"),
        ("exaone4", {"sliding_window": 16}, "a sliding window"),
        ("starcoder2", {"sliding_window": 16}, "a sliding window"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear rope"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(kind: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        require_family(CONFIG_MAPPING[kind](**{**SHAPE, **OWN[kind], **more}))


def test_rows_of_q_are_in_the_order_of_llama_cpp(tmp_path: Path) -> None:
    """By hand: of a head of 16, rows 0 and 8 turn together in transformers; in the file they are neighbours."""
    model = made(tmp_path, "llama")
    tensors = {t.name: t for t in GGUFReader(written(tmp_path, model)).tensors}
    rows = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"].data[:4], rows[[0, 8, 1, 9]])
    assert tensors["blk.0.attn_v.weight"].data[1].tolist() == model.model.layers[0].self_attn.v_proj.weight[1].tolist()


def test_queries_keys_and_values_of_falcon_and_gpt_neox_by_hand(tmp_path: Path) -> None:
    """Falcon: two queries, a key and a value a group of heads of 16; GPT-NeoX: one of each. There all queries come first."""
    for kind, queries in (("falcon", [0, 16, 64, 80]), ("gpt_neox", [0, 48, 96, 144])):
        (tmp_path / kind).mkdir()
        model = made(tmp_path / kind, kind)
        tensors = {t.name: t for t in GGUFReader(written(tmp_path / kind, model)).tensors}
        rows = next(p for n, p in model.named_parameters() if "0." in n and n.endswith("query_key_value.weight")).detach().numpy()
        found = tensors["blk.0.attn_qkv.weight"].data
        np.testing.assert_array_equal(found[[0, 16, 32, 48]], rows[queries])
        np.testing.assert_array_equal(found[64], rows[32 if kind == "falcon" else 16])
        np.testing.assert_array_equal(found[-1], rows[-1])


def test_gpt_2_s_layers_lie_the_other_way_round_and_its_positions_in_32_bits(tmp_path: Path) -> None:
    model = made(tmp_path, "gpt2")
    file = written(tmp_path, model, "q8_0")
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [64, 96]  # the innermost first
    assert tensors["position_embd.weight"].tensor_type.name == "F32"
    assert "gpt2.rope.freq_base" not in GGUFReader(file).fields


def test_every_dtype_is_as_near_as_its_bits(tmp_path: Path) -> None:
    model = made(tmp_path, "llama")
    weight, far = model.model.layers[0].mlp.up_proj.weight.detach(), dict[str, float]()
    for dtype in ("f16", "bf16", "q8_0", "q5_1", "q4_0"):
        back = load_gguf(written(tmp_path, model, dtype), model.config)
        far[dtype] = float((back.model.layers[0].mlp.up_proj.weight.detach() - weight).norm() / weight.norm())
        assert torch.equal(back.model.norm.weight, model.model.norm.weight)  # vectors stay in 32 bits
    assert far["f16"] < 3e-4 < far["bf16"] < 3e-3 < far["q8_0"] < 8e-3 < far["q5_1"] < 0.05 < far["q4_0"] < 0.12


def test_llama_3_rope_has_its_factors(tmp_path: Path) -> None:
    """By the paper's rule: high frequencies as they are (1), low ones divided by the factor (8)."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = made(tmp_path, "llama", rope_parameters={**rope, "original_max_position_embeddings": 64})
    factors = {t.name: t for t in GGUFReader(written(tmp_path, model)).tensors}["rope_freqs.weight"].data
    assert factors.shape == (8,) and factors[0] == 1.0 and factors[-1] == pytest.approx(8.0, rel=1e-5)


def test_the_tokenizer_token_by_token(tmp_path: Path) -> None:
    model, tokenizer = made(tmp_path, "llama"), tiny_tokenizer()
    fields = GGUFReader(written(tmp_path, model)).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    texts = found["tokenizer.ggml.tokens"]
    assert texts[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert texts[-1] == "[PAD895]" and len(texts) == 896
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1] and found["tokenizer.ggml.token_type"][-1] == 5
    assert found["tokenizer.ggml.merges"][0] == "e r" and found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.eos_token_id"] == 2 and found["tokenizer.ggml.eot_token_id"] == 0
    assert found["tokenizer.chat_template"] == tokenizer.chat_template and not found["tokenizer.ggml.add_bos_token"]


def test_a_file_of_another_shape_or_vocabulary_is_seen(tmp_path: Path) -> None:
    model = made(tmp_path, "llama")
    file = written(tmp_path, model)
    other = LlamaConfig(**{**SHAPE, "num_key_value_heads": 4, "rms_norm_eps": 1e-5})
    with pytest.raises(RunError, match=r"says llama\.attention\.head_count_kv 2, and the model has 4"):
        load_gguf(file, other)
    with pytest.raises(RunError, match=r"tokenizer\.ggml\.eos_token_id"):
        check_vocabulary(file, vocabulary_of(tiny_tokenizer(), [1], 896))


def test_what_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no GGUF is written of gemma3 models \(there are: llama, .*gpt_neox, falcon, .*starcoder2\)"
    ):
        require_family(_of("gemma3"))
    with pytest.raises(UserError, match="yarn rope"):
        require_family(LlamaConfig(**SHAPE, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}))
    tokenizer = tiny_tokenizer()
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="cuts texts by a rule"):
        vocabulary_of(tokenizer, [2], 896)


def _of(kind: str) -> Any:
    config = LlamaConfig(**SHAPE)
    object.__setattr__(config, "model_type", kind)
    return config
