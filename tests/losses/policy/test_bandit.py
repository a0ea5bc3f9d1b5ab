"""Each loss on a bandit whose best policy is known in closed form: answers of one token, drawn as often as they are likely."""

import math

import pytest
import torch
from torch import Tensor

from posttrain.config.choices import POLICY_LOSSES, KlEstimator
from posttrain.losses.advantages import kl_estimate
from posttrain.losses.policy import policy_loss
from posttrain.losses.surrogates import Sampled

REWARDS = torch.tensor([1.0, -1.0, 0.0, 0.5], dtype=torch.float64)
START = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
BETA = 0.5


def learnt(name: str, kl_coef: float = 0.0, kind: KlEstimator = "k3") -> Tensor:
    """The policy after so many steps of two updates, each over the sampler's exact expectation."""
    logits = START.log().clone().requires_grad_()
    arms = torch.arange(len(REWARDS))
    for _ in range(400):
        old = logits.detach().log_softmax(0)
        earned = REWARDS - (old.exp() * REWARDS).sum()
        for _ in range(2):
            logps = logits.log_softmax(0)
            # a range as wide for all: GSPO's own would clip the reward's part of the second update, and not that of KL
            loss = policy_loss(name, Sampled(logps, old, earned, arms), old.exp(), low=0.2, high=0.2).total
            # each draw's KL, weighed to the policy of the moment, so that the second update's is unbiased too
            kl = (torch.exp(logps.detach()) * kl_estimate(logps, START.log(), kind)).sum()
            (gradient,) = torch.autograd.grad(loss + kl_coef * kl, logits)
            with torch.no_grad():
                logits -= 0.5 * gradient
    return logits.detach().softmax(0)


def k3s_optimum() -> Tensor:
    """Where reward and k3's gradient balance: r - beta (1 - ref / pi) is the same for all, so pi = beta ref / (beta + c - r)."""
    low, high = float(REWARDS.max()) - BETA + 1e-12, 10.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (BETA * START / (BETA + c - REWARDS)).sum() > 1 else (low, c)
    return BETA * START / (BETA + low - REWARDS)


@pytest.mark.parametrize("name", ["cispo", "dapo", "dr_grpo", "grpo", "gspo", "ppo"])
def test_each_loss_reaches_the_known_optimum(name: str) -> None:
    """With k2 in the loss that of RL with a KL penalty, ref exp(r / beta). GRPO's k3 has another optimum, for its gradient
    is that of the other KL."""
    best = START * torch.exp(REWARDS / BETA)
    best /= best.sum()
    other = k3s_optimum()
    assert float((best - START).abs().sum() / 2) > 0.3 and float((best - other).abs().sum() / 2) > 0.05
    assert float((learnt(name, BETA, "k2") - best).abs().sum() / 2) < 1e-3
    assert float((learnt(name, BETA, "k3") - other).abs().sum() / 2) < 1e-3
    assert float(learnt(name)[0]) > 0.95, "without a penalty the best arm is taken"
    assert math.isclose(float(other.sum()), 1, abs_tol=1e-6) and name in POLICY_LOSSES.names()
