"""A head that says something: which token an answer is scored at, and what a value has seen."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.data.collate import pack, pack_pairs
from posttrain.data.examples import build
from posttrain.models.language.reward_model import PackedScorer


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
