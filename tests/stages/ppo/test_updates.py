"""What PPO's updates train on, and their losses: two small runs, every number of which is worked out again beside them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

import posttrain
from posttrain.batch import PackedBatch
from posttrain.losses import advantages as losses
from posttrain.models.language.actor_critic import ActorCritic

STEPS, GROUPS, EPOCHS, END = 2, 4, 3, 2
REWARDS = "def letters(prompts, answers): return [0.25 * len(answer) - 1 for answer in answers]"
WORDS = (
    "model=tiny", "model.dtype=float32", "+peft=lora", "peft.r=4", "data.path=rows.jsonl", "data.eval_share=0", "eval.sets=null",
    f"train.max_steps={STEPS}", "train.batch_size=2", f"train.grad_accum={GROUPS}", f"ppo.minibatches={GROUPS}",
    f"ppo.epochs={EPOCHS}", "rollout.max_new_tokens=8", "optim.lr=0.02", "ppo.kl_coef=0.5", "reward.function=letters_of:letters",
    "reward.missing_eos_penalty=0",
)  # fmt: skip


@dataclass
class Watched:
    """What passed through a run, in its order. losses: of every micro-batch with a gradient, what the loop let the backward
    begin at; asked: the batch, the role, and what the model said of it. kl, gae, groups: arguments and result of each call."""

    losses: list[float] = field(default_factory=list)
    asked: list[tuple[PackedBatch, str, Tensor]] = field(default_factory=list)
    kl: list[tuple[Tensor, ...]] = field(default_factory=list)
    gae: list[tuple[Tensor, ...]] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)

    def of(self, role: str) -> list[tuple[PackedBatch, Tensor, float]]:
        """Batch, answer and loss of each micro-batch of one role."""
        assert len(self.losses) == len(self.asked)
        return [(batch, said, loss) for (batch, who, said), loss in zip(self.asked, self.losses, strict=True) if who == role]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    rows = [{"prompt": f"say {i} or {i * i}", "completion": "yes"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "letters_of.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = Watched()
    forward, backward = ActorCritic.forward, Accelerator.backward
    kl_estimate, gae, group_advantages = losses.kl_estimate, losses.gae, losses.group_advantages

    def asks(self: ActorCritic, batch: PackedBatch, role: Any = "policy", *args: Any, **options: Any) -> Tensor:
        said = forward(self, batch, role, *args, **options)
        if torch.is_grad_enabled():
            found.asked.append((batch, role, said.detach()))
        return said

    def begins(self: Accelerator, loss: Tensor, **options: Any) -> None:
        found.losses.append(float(loss.detach()))
        backward(self, loss, **options)

    def estimates(policy: Tensor, reference: Tensor, kind: Any) -> Tensor:
        result = kl_estimate(policy, reference, kind)
        if result.dim() == 2:  # of a rollout, not of an update
            found.kl.append((policy, reference, result))
        return result

    def earns(rewards: Tensor, values: Tensor, mask: Tensor, *options: float) -> tuple[Tensor, Tensor]:
        result = gae(rewards.clone(), values, mask, *options)
        found.gae.append((rewards.clone(), values.clone(), mask, *(each.clone() for each in result)))
        return result

    def beats(scores: Tensor, *options: Any) -> Tensor:
        found.groups.append(scores.clone())
        return group_advantages(scores, *options)

    monkeypatch.setattr(ActorCritic, "forward", asks)
    monkeypatch.setattr(Accelerator, "backward", begins)
    for name, spy in (("kl_estimate", estimates), ("gae", earns), ("group_advantages", beats)):
        monkeypatch.setattr(losses, name, spy)
    return found


def lines(run: str) -> list[dict[str, float]]:
    return [line for line in map(json.loads, Path(run, "metrics.jsonl").open()) if "train/reward" in line]


def test_ppo_with_a_value_model(watched: Watched) -> None:
    words = ["ppo.stop_kl=null", "ppo.entropy_coef=0.03", "ppo.value_coef=0.7", "ppo.value_clip=0.001", "ppo.clip=0.05"]
    posttrain.run("ppo", *WORDS, *words, "run.dir=ppo")
    first, second = lines("ppo")
    assert first["train/kl"] == 0 and second["train/kl"] > 0.01, "the policy has moved away from its reference"

    # rewards: minus 0.5 a nat at every token, and the score at an answer's last
    for (rewards, values, mask, _, returns), (policy, reference, _), line in zip(
        watched.gae, watched.kl, (first, second), strict=True
    ):
        left = rewards + 0.5 * (policy - reference) * mask
        last = mask.sum(1) - 1
        scores = left.gather(1, last[:, None])[:, 0]
        assert float(left.scatter(1, last[:, None], 0.0).abs().max()) < 1e-6 and scores.unique().numel() > 2
        assert float(scores.mean()) == pytest.approx(line["train/reward"], abs=1e-5)
        assert line["train/shaped_reward"] == pytest.approx(float(rewards.sum(1).mean()), abs=1e-5)
        assert float((returns * ~mask).abs().max()) == 0 and values.shape == mask.shape
    assert float(watched.gae[0][1].abs().max()) == 0, "a value model without a reward model to begin from begins at zero"

    # every epoch goes through all minibatches once, and not always in one order
    acting, valuing = watched.of("policy"), watched.of("value")
    assert len(acting) == len(valuing) == STEPS * EPOCHS * GROUPS and first["train/updates"] == EPOCHS * GROUPS
    drawn = [batch.rows for batch, _, _ in acting]
    epochs = [drawn[i : i + GROUPS] for i in range(0, len(drawn), GROUPS)]
    for step in range(STEPS):
        of_step = epochs[step * EPOCHS : (step + 1) * EPOCHS]
        assert all(sorted(epoch) == sorted(of_step[0]) for epoch in of_step)
        assert len({tuple(epoch) for epoch in of_step}) > 1

    # advantages over a whole step have mean 0 and variance 1, and are those of gae
    for step in range(STEPS):
        batches = sorted((batch for batch, _, _ in acting[step * EPOCHS * GROUPS :][:GROUPS]), key=lambda batch: batch.rows)
        given = torch.cat([batch.extra["advantages"] for batch in batches])
        assert float(given.mean()) == pytest.approx(0, abs=1e-5) and float(given.pow(2).mean()) == pytest.approx(1, abs=1e-4)
        advantages, mask = watched.gae[step][3], watched.gae[step][2]
        raw = advantages[mask]
        assert sorted(given.tolist()) == pytest.approx(sorted(((raw - raw.mean()) / raw.std(correction=0)).tolist()), abs=1e-4)

    # the policy's loss: clipped, less 0.03 of the entropy; over the tokens of policy and value together, which are counted once
    clipped = 0
    for batch, (logps, entropies), loss in acting:
        ratio, advantages = torch.exp(logps - batch.extra["old"]), batch.extra["advantages"]
        gain = torch.minimum(ratio * advantages, ratio.clamp(0.95, 1.05) * advantages)
        clipped += int((gain != ratio * advantages).sum())
        assert loss == pytest.approx(float(-gain.sum() - 0.03 * entropies.sum()) / len(batch.target), abs=1e-5)
    assert clipped > 10
    assert min(float(entropies.mean()) for _, (_, entropies), _ in acting) > 1, "entropy is in nats, and not negative"

    # the value model's: 0.7 of half the larger square
    moved = 0
    for batch, values, loss in valuing:
        old, returns = batch.extra["values"], batch.extra["returns"]
        near = old + (values - old).clamp(-0.001, 0.001)
        squares = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        moved += int((near != values).sum())
        assert loss == pytest.approx(0.7 * 0.5 * float(squares.sum()) / len(batch.target), abs=1e-5)
    assert moved > 10


def test_without_one_answers_are_compared_and_updates_stop_at_their_kl(watched: Watched) -> None:
    words = ["ppo.advantage=rloo", "ppo.samples=2", "ppo.stop_kl=1e-9", "ppo.entropy_coef=0"]
    posttrain.run("ppo", *WORDS, *words, "run.dir=ppo")
    first, second = lines("ppo")
    # at the first update policy and sampler are one; the second one has moved, and is the last
    assert first["train/updates"] == second["train/updates"] == 2
    acting = watched.of("policy")
    assert len(acting) == len(watched.losses) == 2 * STEPS and not watched.gae
    for step, (scores, (policy, reference, _), line) in enumerate(zip(watched.groups, watched.kl, (first, second), strict=True)):
        kl = (policy - reference).sum(1)
        rewards = scores + 0.5 * kl  # a nat of KL costs 0.5
        assert float(rewards.mean()) == pytest.approx(line["train/reward"], abs=1e-5)
        assert line["train/shaped_reward"] == pytest.approx(float(scores.mean()), abs=1e-5)
        batch, logps, loss = acting[2 * step]
        mine = batch.extra["advantages"]
        better = (scores.view(-1, 2) - scores.view(-1, 2).flip(1)).flatten()  # than the other answer
        assert float((mine[:, None] - better).abs().amin(1).max()) < 1e-5 and mine.unique().numel() > 1
        assert loss == pytest.approx(float(-mine.sum()) / len(batch.target), abs=1e-5), "the ratio is 1"
        assert torch.equal(logps, batch.extra["old"])
    assert second["train/kl"] > 1e-3


def test_grpos_kl_is_a_term_of_the_loss_and_answers_count_alike(watched: Watched) -> None:
    words = ["ppo.advantage=grpo", "ppo.samples=2", "ppo.stop_kl=null", "rollout.max_new_tokens=8"]
    posttrain.run("ppo", *WORDS, *words, "run.dir=ppo")
    first, second = lines("ppo")
    assert first["train/kl_coef"] == 0.5 and first["train/kl_loss"] > 0
    for scores, line in zip(watched.groups, (first, second), strict=True):
        assert float(scores.mean()) == pytest.approx(line["train/reward"], abs=1e-6), "no KL among what is compared"
    moved = 0.0
    for batch, logps, loss in watched.of("policy"):
        old, earned, reference = (batch.extra[name] for name in ("old", "advantages", "reference_logps"))
        ratio, d = torch.exp(logps - old), reference - logps
        each = -torch.minimum(ratio * earned, ratio.clamp(0.8, 1.2) * earned) + 0.5 * (torch.exp(d) - d - 1)
        by_answer = [float(each[batch.sequence_id == i].mean()) for i in range(batch.num_answers)]
        assert loss == pytest.approx(sum(by_answer) / len(by_answer), abs=1e-5)
        moved = max(moved, float(d.abs().max()))
    assert moved > 0.1


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_a_constant_reward_moves_nothing(loss: str, watched: Watched) -> None:
    """0.1 is a number whose mean of three is another one in float32."""
    Path("one_for_all.py").write_text("def tenth(prompts, answers): return [0.1] * len(answers)")
    words = [
        "reward.function=one_for_all:tenth",
        "ppo.advantage=grpo",
        f"ppo.loss={loss}",
        "ppo.samples=3",
        "ppo.epochs=1",
        "ppo.kl_coef=0",
        "train.max_steps=1",
    ]
    found = posttrain.run("ppo", *WORDS, *words, "run.dir=ppo")
    (line,) = lines("ppo")
    assert line["train/grad_norm"] == 0.0 and line["train/informative"] == 0.0
    weights = load_file("ppo/adapter/adapter_model.safetensors")
    assert all(not weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert any("nothing to learn from" in alarm["text"] for alarm in found["alarms"])


def test_an_answer_that_was_cut_short_can_be_left_out(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tokens' weights and of what they are divided by; where none ends, there is no update."""
    words = ["ppo.advantage=grpo", "ppo.samples=2", "ppo.mask_truncated=true", "ppo.loss=dapo", "train.max_steps=1"]
    posttrain.run("ppo", *WORDS, *words, "run.dir=ppo")
    for batch, _, _ in watched.of("policy"):
        whole = batch.tokens[0, batch.eos_index] == END
        assert torch.equal(batch.extra["share"], whole[batch.sequence_id].float())
        assert batch.loss_denominator == float(whole[batch.sequence_id].sum())
    (line,) = lines("ppo")
    assert line["train/updates"] <= EPOCHS * GROUPS
