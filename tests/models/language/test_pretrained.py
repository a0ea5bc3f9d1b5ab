"""A checkpoint's weights are all read, or the load is refused by their names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from posttrain.errors import UserError
from posttrain.models.language.pretrained import check_whole, load_causal

SHAPE: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}
UP = "model.layers.1.mlp.up_proj.weight"


def llama(directory: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None, **config: Any) -> str:
    """A tiny llama's directory, its tensors changed."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **config)).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def load(name: str, **options: Any) -> Any:
    return load_causal(name, None, "float32", "cpu", None, None, **options)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    name = llama(tmp_path, lambda tensors: tensors.pop(UP))
    with pytest.raises(UserError, match=rf"model\.name: .* lacks 1 tensor, .*random.* \({UP}\); give the whole") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_the_first_of_many_missing_are_named(tmp_path: Path) -> None:
    name = llama(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1" in n])
    with pytest.raises(UserError, match=r"lacks 9 tensors.*model\.layers\.1\.input_layernorm\.weight, .* and 6 more"):
        load(name)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    model = load(llama(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_head_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks 1 tensor.*lm_head\.weight"):
        load(llama(tmp_path, lambda tensors: tensors.pop("lm_head.weight")))


def test_another_shape_is_named(tmp_path: Path) -> None:
    name = llama(tmp_path, lambda tensors: tensors.update({UP: torch.zeros(10, 8)}))
    with pytest.raises(UserError, match=rf"1 tensor of another shape .*\({UP} is 10x8, not 12x8\)"):
        load(name)


def test_what_the_model_has_no_place_for_is_refused_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = llama(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.sinks": torch.zeros(2)}))
    with pytest.raises(UserError, match=r"holds 1 tensor .*no place for .*sinks.*model\.ignore_unexpected=true"):
        load(name)
    model = load(name, unexpected="say")
    assert model.config.num_hidden_layers == 2 and "1 tensor that the model has no place for" in capsys.readouterr().out


def test_old_rotary_tables_are_no_weights(tmp_path: Path) -> None:
    load(llama(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})))


def test_layers_for_further_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek's and GLM's last layer, which config.json counts apart from the others."""
    further = {"model.layers.2.eh_proj.weight": torch.zeros(8, 16)}
    name = llama(tmp_path, lambda tensors: tensors.update(further))
    with pytest.raises(UserError, match=r"model\.layers\.2\.eh_proj"):
        load(name)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load(name)


def test_a_reward_models_head_is_read_elsewhere(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE)
    config.num_labels = 1
    scorer = LlamaForSequenceClassification(config)
    scorer.save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, scorer.model.layers[1].mlp.up_proj.weight)


def test_the_headers_alone_tell_what_is_missing(tmp_path: Path) -> None:
    """Before any data is read."""
    name = llama(tmp_path, lambda tensors: tensors.pop(UP))
    with pytest.raises(UserError, match=rf"lacks 1 tensor, .*\({UP}\)"):
        check_whole(tmp_path, name, None, "refuse")
    name = llama(tmp_path, lambda tensors: tensors.update({UP: torch.zeros(10, 8)}))
    with pytest.raises(UserError, match=rf"\({UP} is 10x8, not 12x8\)"):
        check_whole(tmp_path, name, None, "refuse")


def test_headers_of_a_whole_checkpoint_are_taken(tmp_path: Path) -> None:
    check_whole(tmp_path, llama(tmp_path), None, "refuse")


def test_weights_that_stay_as_stored_are_the_same_once_they_are_cast(tmp_path: Path) -> None:
    """Gemma's scale of embeddings, no weight, is 2.83 in float32 and 2.83 in 16 bit only roughly; its head is tied."""
    torch.manual_seed(0)
    Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=4)).bfloat16().save_pretrained(tmp_path)
    plain, stored = load(str(tmp_path)), load(str(tmp_path), stored=True)
    named = dict(stored.named_parameters(remove_duplicate=False))
    assert {p.dtype for p in named.values()} == {torch.bfloat16} and all(type(p) is torch.nn.Parameter for p in named.values())
    assert all(p.requires_grad for p in named.values()) and stored.config.dtype == plain.config.dtype == torch.float32
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    buffers = dict(stored.named_buffers())
    assert buffers and all(torch.equal(buffers[name], value) for name, value in plain.named_buffers())
    assert {value.dtype for value in buffers.values()} == {torch.float32}
    ids = torch.arange(12)[None]
    for p in stored.parameters():
        p.data = p.data.float()
    assert torch.equal(stored(ids).logits, plain(ids).logits)
    assert (stored(ids).logits - load_causal(str(tmp_path), None, "bfloat16", "cpu", None, None)(ids).logits).abs().max() > 0
