"""Advantages, KL estimators and the values' loss against numbers worked out by hand."""

import math

import pytest
import torch

from posttrain.losses.advantages import (
    adapted,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    told_apart,
    value_loss,
    whiten,
)

LOG = torch.log(torch.tensor([0.5, 0.2]))
REF = torch.log(torch.tensor([0.25, 0.4]))


def test_kl_estimators_by_hand() -> None:
    # log ratios ln 2 and -ln 2; k3 = 1/ratio - 1 + ln ratio
    ln2 = math.log(2)
    assert kl_estimate(LOG, REF, "k1").tolist() == pytest.approx([ln2, -ln2])
    assert kl_estimate(LOG, REF, "k2").tolist() == pytest.approx([ln2**2 / 2, ln2**2 / 2])
    assert kl_estimate(LOG, REF, "k3").tolist() == pytest.approx([0.5 - 1 + ln2, 2 - 1 - ln2])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimators_have_the_true_mean(kind: str) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (p * kl_estimate(p.log(), q.log(), kind)).sum()  # type: ignore[arg-type]
    assert float(mean) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_gae_by_hand() -> None:
    # one answer of three tokens, one of two; gamma 0.9, lambda 0.5
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.5, -1.0, 0.0]])
    values = torch.tensor([[0.2, 0.4, 0.6], [0.1, 0.3, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.5)
    d2, d1, d0 = 1 - 0.6, 0.9 * 0.6 - 0.4, 0.9 * 0.4 - 0.2
    first = [d0 + 0.45 * (d1 + 0.45 * d2), d1 + 0.45 * d2, d2]
    e1, e0 = -1 - 0.3, 0.5 + 0.9 * 0.3 - 0.1
    second = [e0 + 0.45 * e1, e1, 0.0]
    assert advantages.tolist() == [pytest.approx(first), pytest.approx(second)]
    assert returns[0].tolist() == pytest.approx([a + v for a, v in zip(first, (0.2, 0.4, 0.6), strict=True)])
    assert returns[1, 2] == 0


def test_with_gamma_and_lambda_1_the_advantage_is_what_is_to_come_less_the_value() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    rewards = rewards * mask
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, (to_come - values) * mask, atol=1e-5)
    assert torch.allclose(returns, to_come * mask, atol=1e-5)


def test_group_advantages_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    # mean 3, deviations -2 -1 3, sample variance 7; the others' means are 4, 3.5, 1.5
    deviation = math.sqrt(7) + 1e-4
    assert group_advantages(scores, 3, "grpo").tolist() == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0])
    assert group_advantages(scores, 3, "rloo").tolist() == pytest.approx([-3, -1.5, 4.5, 0, 0, 0])


def test_whitening_by_hand() -> None:
    assert whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)], abs=1e-6)
    assert whiten(torch.tensor([5.0])).tolist() == [0.0]


@pytest.mark.parametrize("score", [0.1, 1.0, -2.7182818])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_constant_reward_teaches_nothing(score: float, kind: str) -> None:
    """Exactly: the mean of three times 0.1 is not 0.1 in float32, and the rest would be divided by nearly nothing."""
    scores = torch.full((21,), score)
    for size in (3, 7):
        for scale in ("group", "step", "none"):
            assert torch.equal(group_advantages(scores, size, kind, scale), torch.zeros(21))  # type: ignore[arg-type]
    assert torch.equal(whiten(scores), torch.zeros(21))
    assert told_apart(torch.tensor([0.0, 1.0, 2.0, 2.0]), 2).tolist() == [True, False]


def test_what_grpo_divides_by() -> None:
    scores = torch.tensor([0.0, 2.0, 0.0, 0.0])  # deviations: of the first group sqrt 2, of all of them 1
    assert group_advantages(scores, 2, "grpo", "none").tolist() == [-1, 1, 0, 0]
    assert group_advantages(scores, 2, "grpo", "step").tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, 0, 0])
    assert group_advantages(scores, 2, "grpo", "group").tolist() == pytest.approx([-0.70706, 0.70706, 0, 0], abs=1e-4)


def test_clipped_value_loss_by_hand() -> None:
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    # without the clip 0 and 0.81; the clipped first value 0.2 is 0.64 off
    assert value_loss(values, old, returns, clip=0.2, weight=torch.ones(2)).total.item() == pytest.approx((0.64 + 0.81) / 2)
    assert value_loss(values, old, returns, clip=None, weight=torch.ones(2)).total.item() == pytest.approx(0.81 / 2)
    assert value_loss(values, old, returns, clip=0.2, weight=torch.tensor([0.5, 0.0])).total.item() == pytest.approx(0.32 / 2)


def test_explained_variance_by_hand() -> None:
    returns = torch.tensor([0.0, 2.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.tensor([1.0, 1.0]), returns) == 0.0
    assert explained_variance(torch.tensor([2.0, 0.0]), returns) == pytest.approx(-3.0)


def test_the_penalty_follows_its_target() -> None:
    assert adapted(0.1, 12.0, 10.0, 0.1) == pytest.approx(0.1 * 1.02)
    assert adapted(0.1, 100.0, 10.0, 0.1) == pytest.approx(0.11)
    assert adapted(0.1, 0.0, 10.0, 0.1) == pytest.approx(0.09)
