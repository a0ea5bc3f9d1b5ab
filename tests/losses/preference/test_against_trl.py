"""Each loss that TRL 1.16 has, beside TRL's own, on log-probs that have nothing in common."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss

Ragged = tuple[Tensor, Tensor, Tensor]
OF_DPO_TRAINER = [
    ("hinge", {}), ("robust", {"label_smoothing": 0.2}), ("exo_pair", {"label_smoothing": 0.01}), ("nca_pair", {}),
    ("bco_pair", {}), ("sppo_hard", {}), ("apo_zero", {}), ("apo_down", {}), ("discopop", {}), ("sigmoid", {}), ("ipo", {}),
    ("sigmoid_norm", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), OF_DPO_TRAINER)
def test_losses_of_dpo_trainer(name: str, settings: dict[str, float], trl_loss: Callable[..., float], ragged: Ragged) -> None:
    loss = chosen_loss(name, 0.3, settings.get("label_smoothing"), None)
    others: dict[str, Any] = {"args": SimpleNamespace(discopop_tau=0.05)} if name == "discopop" else {}
    expected = trl_loss(name, *ragged, 0.3, **settings, **others)
    assert float(loss(Pairs(*ragged), torch.ones(6)).total / 6) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_sum_with_the_likelihood_of_the_chosen_answers(trl_loss: Callable[..., float], ragged: Ragged) -> None:
    """Pair by pair: TRL's mean is over the tokens of a batch, ours over those of each answer."""
    loss = chosen_loss({"sigmoid": 0.8, "sft": 0.2}, 0.3, None, None)
    for k in range(6):
        one = tuple(values[2 * k : 2 * k + 2] for values in ragged)
        both = {"loss_types": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}
        expected = trl_loss("", *one, 0.3, **both)
        assert float(loss(Pairs(*one), torch.ones(1)).total) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_losses_of_cpo_trainer(name: str, ragged: Ragged) -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    policy, _, lengths = ragged
    given = policy / lengths if name == "simpo" else policy
    trainer: Any = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), beta=0.7, label_smoothing=0.1, simpo_gamma=0.5,
        loss_type={"simpo": "simpo", "cpo": "sigmoid"}[name],
    )  # fmt: skip
    theirs: Any = CPOTrainer.cpo_loss
    expected, *rewards = theirs(trainer, given[0::2], given[1::2])
    options = {"gamma": 0.5} if name == "simpo" else {"alpha": 0.0}
    found = chosen_loss(name, 0.7, 0.1, options)(Pairs(policy, None, lengths), torch.ones(6))
    assert float(found.total) == pytest.approx(float(expected.sum()), abs=1e-5)
    assert float(found.metrics["reward_chosen"][0]) == pytest.approx(float(rewards[0].sum()), abs=1e-5)


def test_the_odds_of_orpo_trainer(ragged: Ragged) -> None:
    pytest.importorskip("trl")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    policy, _, lengths = ragged
    mean = policy / lengths
    trainer: Any = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    theirs: Any = ORPOTrainer.odds_ratio_loss
    odds, *rewards = theirs(trainer, mean[0::2], mean[1::2])
    expected = (-mean[0::2] - odds).sum()  # the likelihood of TRL's is of prompt and answer, and computed elsewhere
    found = chosen_loss("orpo", 0.4, None, None)(Pairs(policy, None, lengths), torch.ones(6))
    assert float(found.total) == pytest.approx(float(expected), abs=1e-4)
    assert float(found.metrics["reward_rejected"][0]) == pytest.approx(float(rewards[1].sum()), abs=1e-5)
