"""Models of images and text, trained on text: which class loads them, what is trained of them, and what lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    ModernBertConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    T5Config,
)

from posttrain.models.language.architecture import classifier_of, model_class, outside_text, towers
from posttrain.models.language.decoder import decoder_of
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.layers import Kind, layers_of
from posttrain.models.peft.methods.none import METHOD as FULL

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES: dict[str, Any] = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
IDS = torch.tensor([[11, 12, 3, 4, 5, 6, 7]])


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        text = TEXT | {"rope_parameters": SECTIONS}
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **PICTURES)).eval()
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    text = TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}
    pictures: dict[str, Any] = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, **pictures)).eval()


def on_disk(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


def test_the_class_is_that_of_the_whole_checkpoint() -> None:
    """Qwen3.5's config is of three classes: for text alone, for all, and for a score."""
    assert model_class(LlamaConfig(architectures=["LlamaForCausalLM"])) is AutoModelForCausalLM
    assert model_class(LlamaConfig(architectures=["LlamaForSequenceClassification"])) is AutoModelForCausalLM
    classes = {"ForCausalLM": AutoModelForCausalLM}
    for kind in ("ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification"):
        expected = classes.get(kind, AutoModelForMultimodalLM)
        assert model_class(Qwen3_5Config(architectures=[f"Qwen3_5{kind}"])) is expected


def test_full_training_leaves_out_what_reads_no_text() -> None:
    """By hand: projections, two norms and MLP of a layer, and what comes before and after the layers."""
    model = FULL(method="none", lr_factor=1).attach(tiny("qwen2_vl"), 1, None)
    attention = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32
    layer = attention + 3 * 32 * 48 + 2 * 32
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * layer + 2 * 64 * 32 + 32
    assert towers(model) == {"model.visual": sum(p.numel() for p in model.model.visual.parameters())}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(outside_text(model))
    assert towers(AutoModelForCausalLM.from_config(LlamaConfig(**TEXT))) == {}


def test_layers_that_attend_to_pictures_alone_are_left_out_too() -> None:
    """Text skips them, and packs are as exact as without them."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = TEXT | {"bos_token_id": 2, "cross_attention_layers": [1], "rope_parameters": rope}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2}
    size: dict[str, Any] = {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0], "vision_output_dim": 32}
    del text["head_dim"]
    model = MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision | size, image_token_index=60))
    crossing = sum(p.numel() for p in model.model.language_model.layers[1].parameters())
    assert towers(model)["cross-attention layers"] == crossing > 5 * 32 * 32
    assert set(towers(model)) == {"cross-attention layers", "model.vision_model", "model.multi_modal_projector"}
    kinds = {name: layer.kind for name, layer in layers_of(model).items()}
    assert {kind for name, kind in kinds.items() if ".layers.1." in name} == {Kind.TOWER}
    assert Kind.TOWER not in {kind for name, kind in kinds.items() if ".language_model.layers.0." in name}
    assert PackedLM(model).reading.way == "packed"


def test_a_whole_causal_model_may_lie_within() -> None:
    """Llama 4's: last hidden states come from the decoder within that."""
    text = TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": 16}
    size = {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=VISION | size))
    assert decoder_of(model) is model.language_model.model
    assert set(towers(model)) == {"vision_model", "multi_modal_projector"}


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3"])
def test_it_is_saved_under_the_names_of_the_checkpoint(tmp_path: Path, kind: str) -> None:
    """The names in files differ from those in memory; transformers loads the result and gives the live logits."""
    before = tiny(kind)
    before.save_pretrained(tmp_path / "base")
    lm = PackedLM(load_causal(str(tmp_path / "base"), None, "float32", "cpu", None, None), "documents").eval()
    assert type(lm.causal) is type(before)
    with torch.no_grad():
        for parameter in lm.causal.get_decoder().parameters():
            parameter.mul_(1.1)
        lm.save(tmp_path / "model", True)
        plain: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
        logits = lm.causal(input_ids=IDS).logits
        assert float((plain(input_ids=IDS).logits - logits).abs().max()) < 1e-6
        assert float((before(input_ids=IDS).logits - logits).abs().max()) > 1e-2
    assert on_disk(tmp_path / "model") == on_disk(tmp_path / "base")
    assert on_disk(tmp_path / "model") != set(lm.causal.state_dict())


def test_a_reward_model_of_images_and_text_is_a_class_of_transformers(tmp_path: Path) -> None:
    scorer = PackedScorer(tiny("gemma3"), "documents").eval()
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save(tmp_path, True)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    plain.config.get_text_config().pad_token_id = plain.config.pad_token_id = None
    with torch.no_grad():
        score = scorer.score(scorer.causal.get_decoder()(IDS).last_hidden_state[0, -1])
        assert plain(input_ids=IDS).logits.item() == pytest.approx(score.item(), abs=1e-5)


def test_what_writes_no_text_has_no_class_for_a_reward_model() -> None:
    """It is refused as what it is, a little later, where the same line stands for every stage."""
    assert classifier_of(T5Config()) is None and classifier_of(ModernBertConfig(pad_token_id=0)) is None
