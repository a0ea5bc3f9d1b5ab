"""A head that says something: which token an answer is scored at, and what a value has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from posttrain.data.collate import pack, pack_pairs
from posttrain.data.examples import build
from posttrain.models.language.architecture import classifier_of
from posttrain.models.language.reward_model import PackedScorer, saved_head
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import METHOD as LORA
from posttrain.runs.artifact import open_artifact


@pytest.fixture
def scorer() -> PackedScorer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    found = PackedScorer(LlamaForCausalLM(config), "documents").eval()
    assert not found.score.weight.any(), "a new head has no opinion"
    torch.nn.init.normal_(found.score.weight)
    return found


def says(scorer: PackedScorer, tokens: list[int]) -> list[float]:
    """w h at every token of a sequence alone."""
    with torch.no_grad():
        hidden = scorer.causal.get_decoder()(torch.tensor([tokens])).last_hidden_state[0]
        return (hidden @ scorer.score.weight.T)[:, 0].tolist()


def test_an_answer_is_scored_at_its_last_token_that_counts(scorer: PackedScorer) -> None:
    """Of the chosen answer 3 4 5 the last one does not count (what a template puts after the end of turn)."""
    pairs = build([([11, 12, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 1], 8)], [(2, 5)])
    batch = pack_pairs(pairs, [0])
    with torch.no_grad():
        found = scorer(batch).tolist()
    chosen, rejected = says(scorer, [11, 12, 3, 4, 5]), says(scorer, [11, 12, 6, 7])
    assert found == pytest.approx([chosen[3], rejected[3]], abs=1e-5)
    assert abs(chosen[3] - chosen[4]) > 1e-2 and abs(chosen[3] - chosen[2]) > 1e-2


def test_a_value_is_of_the_state_before_each_token(scorer: PackedScorer) -> None:
    """Two answers to one prompt, and a document; the prompt's last token stands before either answer's first."""
    pairs = build([([11, 12, 3, 4, 6, 7, 8], [0, 0, 1, 1, 1, 1, 1], 8)], [(2, 4)])
    with torch.no_grad():
        found = scorer.values(pack_pairs(pairs, [0])).tolist()
        alone = scorer.values(pack(build([([21, 22, 23], [1.0, 1.0, 1.0], 0)]), [0])).tolist()
    first, second = says(scorer, [11, 12, 3, 4]), says(scorer, [11, 12, 6, 7, 8])
    assert found == pytest.approx([*first[1:3], *second[1:4]], abs=1e-5)
    assert alone == pytest.approx(says(scorer, [21, 22, 23])[:2], abs=1e-5)


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def with_opinion(config: Any, lora: bool) -> PackedScorer:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    if lora:
        method = LORA(
            method="lora",
            init="default",
            init_rows=64,
            rank_pattern=None,
            alpha_pattern=None,
            targets="all-linear",
            r=4,
            alpha=8,
            dropout=0.0,
            dtype="float32",
            lr_factor=1,
            experts=True,
            router=False,
        )
        model = add_method(model, method)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)
    found = PackedScorer(model, "documents").eval()
    torch.nn.init.normal_(found.score.weight)
    return found


def documented(model: str, base: str = "") -> torch.Tensor:
    """What docs/rlhf.md says, line by line, of the directory `model` (an adapter on `base`)."""
    text = (Path(__file__).parents[3] / "docs" / "rlhf.md").read_text()
    lines = text.split("## A reward model elsewhere")[1].split("```python\n")[1].split("```")[0]
    if base:
        lines = lines.replace('AutoModelForCausalLM.from_pretrained("rm/model")', "adapter")
    scope: dict[str, Any] = {
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "load_file": load_file,
        "input_ids": torch.tensor([TOKENS]),
    }
    if base:
        plain: Any = AutoModelForCausalLM.from_pretrained(base)
        scope["adapter"] = PeftModel.from_pretrained(plain, model).get_base_model()
    exec(lines.replace("rm/model", model), scope)
    return scope["score"][0, 0]


TOKENS = [11, 12, 3, 4, 5]


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_classifier_the_head_lies_beside_the_language_model(tmp_path: Path, lora: bool) -> None:
    """Granite has none: the lines of docs/rlhf.md give the live score, and the files say that this is a reward model."""
    config = GraniteConfig(**SIZES)
    assert classifier_of(config) is None
    scorer = with_opinion(config, lora)
    if lora:
        base: Any = scorer.causal
        clean = {n.replace(".base_layer", ""): p for n, p in base.state_dict().items() if ".lora_" not in n}
        base_model: Any = AutoModelForCausalLM.from_config(config)
        base_model.load_state_dict(clean)
        base_model.save_pretrained(tmp_path / "base")
        scorer.save_adapter(tmp_path / "rm", str(tmp_path / "base"), True)
    else:
        scorer.save(tmp_path / "rm", True)
    with torch.no_grad():
        assert documented(str(tmp_path / "rm"), str(tmp_path / "base") if lora else "").item() == pytest.approx(
            says(scorer, TOKENS)[-1], abs=1e-5
        )
    assert open_artifact(tmp_path / "rm", "init").reward_head == tmp_path / "rm"
    assert torch.equal(saved_head(tmp_path / "rm"), scorer.score.weight)


def test_with_a_classifier_it_is_saved_as_that(tmp_path: Path) -> None:
    scorer = with_opinion(LlamaConfig(**SIZES), lora=False)
    scorer.save(tmp_path, True)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        model.config.pad_token_id = None
        assert model(torch.tensor([TOKENS])).logits.item() == pytest.approx(says(scorer, TOKENS)[-1], abs=1e-5)
    assert not (tmp_path / "score.safetensors").exists()
    assert open_artifact(tmp_path, "init").reward_head == tmp_path


def test_a_classifier_is_one_only_where_its_weights_are_ours() -> None:
    """Of images and text too; not one with a head of two layers (BERT), though transformers calls it so."""
    from transformers import BertConfig

    assert type(classifier_of(Gemma3Config())).__name__ == "Gemma3ForSequenceClassification"
    assert classifier_of(BertConfig(is_decoder=True, num_hidden_layers=1)) is None
