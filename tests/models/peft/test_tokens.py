"""Rows that are trained beside an adapter: gradients as in full training, and what plain peft makes of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from posttrain.models.language.new_tokens import NewToken, give_rows
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.attach import add_frozen, add_method, load_adapter, merge_into
from posttrain.models.peft.merge import Adapter, write_merged
from posttrain.models.peft.methods.lora import METHOD as LORA
from posttrain.models.peft.tokens import inherit, size_of

NEW = [NewToken("a", 41, (3, 5)), NewToken("b", 40, (7,)), NewToken("c", 9, ())]
IDS = torch.tensor([[3, 41, 5, 40, 9, 41, 8]])
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=request.param, initializer_range=0.5, **SIZES))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def lora() -> Any:
    values: dict[str, Any] = {
        "method": "lora",
        "init": "default",
        "init_rows": 64,
        "rank_pattern": None,
        "alpha_pattern": None,
        "targets": ["q_proj"],
        "r": 4,
        "alpha": 8,
        "dropout": 0.0,
        "dtype": "float32",
    }
    return LORA(**values, lr_factor=1, experts=True, router=False)


def adapted(base: Path) -> Any:
    model = loaded(base)
    give_rows(model, NEW)
    return add_method(model, lora())


@torch.no_grad()
def moved(model: Any) -> Any:
    """As after some training."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def saved(base: Path) -> tuple[Any, Path]:
    model, out = moved(adapted(base)), base.parent / "adapter"
    PackedLM(model).save_adapter(out, str(base), True)
    return model, out


def test_rows_get_the_gradients_of_full_training(base: Path) -> None:
    """Through the packs' own log-probs, whose backward is written by hand; nothing else of the embedding is trained."""
    full, part = loaded(base), adapted(base)
    give_rows(full, NEW)
    for model in (full, part):
        lm = PackedLM(model)
        hidden = lm.causal.get_decoder()(IDS).last_hidden_state[0, :-1]
        lm.logprobs(hidden, IDS[0, 1:], 1.0).sum().backward()
    tuned = part.get_base_model()
    ids = [9, 40, 41]
    for layer, own in ((full.model.embed_tokens, tuned.model.embed_tokens), (full.lm_head, tuned.lm_head)):
        assert torch.allclose(own.token_adapter.trainable_tokens_delta["default"].grad, layer.weight.grad[ids], atol=1e-5)
        assert layer.weight.grad[ids].abs().min(dim=1).values.max() > 0
    rows = [parameter for name, parameter in part.named_parameters() if parameter.requires_grad and "lora_" not in name]
    assert [tuple(row.shape) for row in rows] == [(3, 16)] * (1 if full.config.tie_word_embeddings else 2)


def test_plain_peft_loads_them_over_a_base_that_is_large_enough(base: Path) -> None:
    live, out = saved(base)
    assert size_of(out) == 42
    plain = loaded(base)
    plain.resize_token_embeddings(42)
    plain: Any = PeftModel.from_pretrained(plain, str(out)).eval()
    assert float((logits(plain) - logits(live)).abs().max()) < 1e-5
    ours = load_adapter(loaded(base), out)
    assert float((logits(ours) - logits(live)).abs().max()) < 1e-5
    untrained = adapted(base).eval()
    assert float((logits(untrained) - logits(live)).abs().max()) > 0.1


def test_a_stack_trains_them_on_and_is_one_adapter_again(base: Path) -> None:
    first, out = saved(base)
    plain = loaded(base)
    inherit(plain, out)
    give_rows(plain, [NewToken("d", 42, (41,))])
    model: Any = add_method(plain, lora())
    add_frozen(model, out)
    assert float((logits(model.eval())[..., :42] - logits(first)).abs().max()) < 1e-5
    live = moved(model)
    PackedLM(live).save_adapter(base.parent / "both", str(base), True)
    config = json.loads((base.parent / "both" / "adapter_config.json").read_text())
    assert config["r"] == 8 and set(map(tuple, config["trainable_token_indices"].values())) == {(9, 40, 41, 42)}
    ours = load_adapter(loaded(base), base.parent / "both")
    assert float((logits(ours) - logits(live)).abs().max()) < 1e-5


def test_they_are_merged_in_files_and_in_memory(base: Path) -> None:
    live, out = saved(base)
    adapter = Adapter(out, "run")
    adapter.require_mergeable("run", "")
    write_merged(base, adapter, base.parent / "merged")
    merged = loaded(base.parent / "merged").eval()
    assert merged.config.vocab_size == 42 and merged.get_output_embeddings().weight.shape == (42, 16)
    assert float((logits(merged) - logits(live)).abs().max()) < 1e-5
    model = merge_into(loaded(base), out).eval()
    assert float((logits(model) - logits(live)).abs().max()) < 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_reward_model_has_rows_of_the_embedding_alone(base: Path) -> None:
    scorer = PackedScorer(moved(adapted(base))).eval()
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_adapter(base.parent / "rm", str(base), True)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    plain.resize_token_embeddings(42)
    plain = PeftModel.from_pretrained(plain, str(base.parent / "rm")).eval()
    plain.config.pad_token_id = None
    with torch.no_grad():
        hidden = scorer.causal.get_decoder()(IDS).last_hidden_state[0, -1]
        assert plain(input_ids=IDS).logits.item() == pytest.approx(scorer.score(hidden).item(), abs=1e-5)
