"""Every policy loss by hand, against TRL's own on the same log-probs, and by what holds for each."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.config.choices import POLICY_LOSSES
from posttrain.losses.advantages import kl_estimate
from posttrain.losses.policy import policy_loss
from posttrain.losses.surrogates import PolicyLoss, Sampled, importance

LOSSES = ["cispo", "dapo", "dr_grpo", "gspo", "grpo", "ppo"]
RANGES = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (0.2, 4.0)}
MOST = 6  # tokens that an answer may have


def sampled(ratios: list[float], advantages: list[float], answer: list[int]) -> Sampled:
    logps = torch.tensor(ratios).log().requires_grad_()
    return Sampled(logps, torch.zeros(len(ratios)), torch.tensor(advantages), torch.tensor(answer))


def found(name: str, given: Sampled, low: float = 0.2, high: float = 0.2) -> tuple[list[float], list[float]]:
    """The loss of each token and the gradient of their sum."""
    losses, _ = POLICY_LOSSES.get(name).per_token(given, low=low, high=high)
    losses.sum().backward()
    assert given.logps.grad is not None
    return losses.tolist(), given.logps.grad.tolist()


def test_there_are_these() -> None:
    assert sorted(POLICY_LOSSES.names()) == sorted(LOSSES)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo", "dapo"])
def test_clipped_ratios_by_hand(name: str) -> None:
    losses, gradient = found(name, sampled([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0], [0, 0, 1, 1]))
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)
    assert losses == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    # no gradient where going on would not be punished: up from 1.5 at A > 0, down from 0.5 at A < 0
    assert gradient == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_dapo_clips_higher() -> None:
    losses, gradient = found("dapo", sampled([1.25, 1.3, 0.7], [1.0, 1.0, -1.0], [0, 0, 0]), 0.2, 0.28)
    assert losses == pytest.approx([-1.25, -1.28, 0.8]) and gradient == pytest.approx([-1.25, 0, 0])


def test_gspo_by_hand() -> None:
    # the first answer's ratios 2 and 1/2 are 1 together; the second's is 1.5, clipped at A > 0; the third's 1.5 at A < 0 is not
    losses, gradient = found("gspo", sampled([2.0, 0.5, 1.5, 1.5], [1.0, 1.0, 1.0, -1.0], [0, 0, 1, 2]))
    assert losses == pytest.approx([-1, -1, -1.2, 1.5])
    assert gradient == pytest.approx([-1, -1, 0, 1.5])  # two tokens, each with half of either's loss


def test_cispo_keeps_every_gradient() -> None:
    losses, gradient = found("cispo", sampled([8.0, 2.0, 0.1], [1.0, -1.0, 2.0], [0, 0, 0]), 0.2, 4.0)
    assert losses == pytest.approx([-5 * math.log(8), 2 * math.log(2), -0.1 * 2 * math.log(0.1)], abs=1e-6)
    assert gradient == pytest.approx([-5, 2, -0.2])


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_start_each_is_the_policy_gradient(name: str) -> None:
    """Where nothing has moved the gradient is -A for each token, whatever the loss; and 0 where nothing was earned."""
    loss: PolicyLoss = POLICY_LOSSES.get(name)
    for advantages in ([0.7, -1.1, -1.1], [0.0, 0.0, 0.0]):
        logps = torch.tensor([-1.0, -2.0, -0.3], requires_grad=True)
        given = Sampled(logps, logps.detach().clone(), torch.tensor(advantages), torch.tensor([0, 1, 1]))
        loss.per_token(given, low=0.2, high=0.2)[0].sum().backward()
        assert logps.grad is not None
        assert logps.grad.tolist() == pytest.approx([-a for a in advantages], abs=1e-6)


def test_means_by_hand() -> None:
    lengths, counted = torch.tensor([2.0, 4.0, 3.0]), torch.tensor([True, True, False])
    expected = {
        "ppo": ([1, 1, 0], [2, 4, 0]), "dapo": ([1, 1, 0], [2, 4, 0]), "cispo": ([1, 1, 0], [2, 4, 0]),
        "grpo": ([1 / 2, 1 / 4, 0], [1, 1, 0]), "gspo": ([1 / 2, 1 / 4, 0], [1, 1, 0]),
        "dr_grpo": ([1 / 6, 1 / 6, 0], [1, 1, 0]),
    }  # fmt: skip
    for name, (weights, counts) in expected.items():
        mine = POLICY_LOSSES.get(name).weights(lengths, counted, MOST)
        assert mine[0].tolist() == pytest.approx(weights) and mine[1].tolist() == pytest.approx(counts), name


def trl_loss(name: str, tables: dict[str, Tensor], low: float, high: float, beta: float) -> Tensor:
    """TRL's GRPOTrainer._compute_loss on these log-probs [A, T], by a trainer without training."""
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    mask, alone = (
        tables["mask"].long(),
        SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, device=torch.device("cpu")),
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=alone, aux_loss_enabled=False, top_entropy_quantile=1.0, beta=beta,
        off_policy_mask_threshold=None, importance_sampling_level="sequence" if name == "gspo" else "token",
        loss_type={"ppo": "dapo", "gspo": "grpo"}.get(name, name), epsilon_low=low,
        epsilon_high=1 + high if name == "cispo" else high,  # theirs is the bound itself
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), use_vllm="importance" in tables,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=MOST,
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (tables["logps"], torch.zeros_like(tables["old"]), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": tables["advantages"], "old_per_token_logps": tables["old"], "ref_per_token_logps": tables["reference"],
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": tables.get("importance"),
    }  # fmt: skip
    call: Any = GRPOTrainer._compute_loss
    return call(trainer, None, inputs)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_each_is_trls_with_its_gradient(name: str, beta: float, corrected: bool) -> None:
    torch.manual_seed(1)
    low, high = RANGES.get(name, (0.2, 0.2))
    lengths = torch.tensor([6, 1, 3, 5])
    mask = torch.arange(MOST) < lengths[:, None]
    spread = 2e-3 if name == "gspo" else 0.5
    old = -torch.rand(4, MOST) * 3 * mask
    tables = {
        "mask": mask, "old": old, "logps": ((old + spread * torch.randn(4, MOST)) * mask).requires_grad_(),
        "reference": (old + 0.3 * torch.randn(4, MOST)) * mask, "advantages": torch.tensor([1.3, -0.4, -1.0, 0.1]),
    }  # fmt: skip
    if corrected:
        tables["importance"] = torch.rand(4, MOST) * 2
    theirs = trl_loss(name, tables, low, high, beta)
    (their_gradient,) = torch.autograd.grad(theirs, tables["logps"])
    loss: PolicyLoss = POLICY_LOSSES.get(name)
    weights, counts = loss.weights(lengths.float(), torch.ones(4, dtype=torch.bool), MOST)
    weight = weights[:, None].expand(4, MOST)[mask]
    answer = torch.arange(4)[:, None].expand(4, MOST)[mask]
    logps = tables["logps"].detach()[mask].requires_grad_()
    given = Sampled(logps, old[mask], tables["advantages"][answer], answer)
    by_whom = tables["importance"][mask] if corrected else None
    total = policy_loss(name, given, weight, low=low, high=high, importance=by_whom).total
    total = (total + beta * (weight * kl_estimate(logps, tables["reference"][mask], "k3")).sum()) / counts.sum()
    (gradient,) = torch.autograd.grad(total, logps)
    torch.testing.assert_close(total, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, their_gradient[mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", ["stale weights", "bfloat16", "top_p"])
def test_importance_weights_make_the_gradient_the_policys_own(bias: str) -> None:
    """A policy over eight tokens, and a sampler that is not it: the mean over its draws against the exact one."""
    torch.manual_seed(0)
    logits, rewards = 1.5 * torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    policy = logits.softmax(0)
    sampler = {
        "stale weights": (logits + 0.5 * torch.randn(8, dtype=torch.float64)).softmax(0),
        "bfloat16": (logits + 40).bfloat16().double().softmax(0),  # as large as logits are
        "top_p": torch.where(policy > 0.03, policy, 0.0) / policy[policy > 0.03].sum(),
    }[bias]

    def gradient(chance: Tensor, weight: Tensor) -> Tensor:
        scores = torch.eye(8, dtype=torch.float64) - policy  # of log-probs: a row a token
        return (chance * weight * rewards) @ scores

    kept = sampler > 0
    reachable = gradient(torch.where(kept, policy, 0.0), torch.ones(8))  # what is never drawn cannot be weighed
    draws = 200_000
    drawn = torch.multinomial(sampler, draws, replacement=True)
    seen = torch.bincount(drawn, minlength=8) / draws
    weight = torch.where(kept, importance(policy.log(), sampler.log(), "truncate", 100.0), 0.0)
    corrected, plain = gradient(seen.double(), weight), gradient(seen.double(), torch.ones(8, dtype=torch.float64))
    one = (weight * rewards)[:, None] * (torch.eye(8, dtype=torch.float64) - policy)  # of each token's draw
    mean = sampler @ one
    error = ((sampler @ (one - mean) ** 2) / draws).sqrt()
    assert float((mean - reachable).abs().max()) < 1e-12, "in expectation it is exact"
    assert float(((corrected - reachable).abs() / error).max()) < 4, "within its sampling error"
    assert float(((plain - reachable).abs() / error).max()) > 10


def test_weights_are_truncated_or_masked() -> None:
    old, by = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, -1.0, -0.5, 1.0])  # ratios 1, e, 1.65, 1/e
    assert importance(old, by, "none", 2.0).tolist() == [1, 1, 1, 1]
    assert importance(old, by, "truncate", 2.0).tolist() == pytest.approx([1, 2, math.exp(0.5), math.exp(-1)])
    assert importance(old, by, "mask", 2.0).tolist() == pytest.approx([1, 0, math.exp(0.5), 0])
