"""Answers to prompts, and what each of their tokens was to policy, reference and rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.data.collate import Group, pack_answers
from posttrain.data.examples import Examples
from posttrain.evaluation.calibration import correlation
from posttrain.models.language.actor_critic import ActorCritic, Role
from posttrain.models.language.generation import Answer, Sampling
from posttrain.rewards import RewardFunction

Write = Callable[..., list[list[Answer]]]  # model, prompts, answers to each, sampling, end tokens -> answers by prompt


@dataclass(frozen=True)
class Rollout:
    """Answers to prompts, and what each of their tokens was to policy and reference.

    packs: the answers in turn, as they are trained on. mask: bool [A, T], the places that an answer fills. old, reference:
    log-probs [A, T], zero past an answer's end. scores: [A] each, the reward model's and then the functions'; gold: [A].
    """

    prompts: list[str]
    answers: list[Answer]
    texts: list[str]
    packs: list[PackedBatch]
    mask: Tensor
    old: Tensor
    reference: Tensor
    scores: list[Tensor]
    gold: Tensor | None

    @property
    def ended(self) -> Tensor:
        """bool [A]: which answers ended by themselves."""
        return torch.tensor([answer.ended for answer in self.answers])

    @property
    def lengths(self) -> Tensor:
        """int64 [A]: tokens of each answer."""
        return self.mask.sum(1)

    @property
    def kl(self) -> Tensor:
        """By k1, which is exact in the mean: nats an answer [A]."""
        return (self.old - self.reference).sum(1)

    def split(self, table: Tensor) -> tuple[Tensor, ...]:
        """[A, T] -> what belongs to the targets of each pack."""
        return table[self.mask].split([len(pack.target) for pack in self.packs])


@dataclass(frozen=True)
class Roller:
    """Has the policy answer, and all roles read the answers.

    Args:
        scorers: the roles ("reward", "gold") that a model plays; functions: the user's rewards; gold: the user's check.
        ends: ids of the tokens that end an answer.
    """

    roles: ActorCritic
    write: Write
    sampling: Sampling
    tokenizer: Any
    ends: list[int]
    scorers: list[Role]
    functions: list[RewardFunction]
    gold: RewardFunction | None
    accelerator: Accelerator

    @torch.no_grad()
    def roll(self, examples: Examples, micro: list[list[int]], samples: int) -> Rollout:
        """Answer the prompts of these units `samples` times each. Random numbers are torch's global ones."""
        self.roles.eval()
        units = [unit for units in micro for unit in units]
        whole = {unit: examples.sequence(unit)[0].tolist() for unit in units}
        border = {unit: int(examples.splits[unit, 0]) for unit in units}
        with self.accelerator.autocast():
            self.roles.set_role("policy")
            prompts = [whole[unit][: border[unit]] for unit in units]
            answers = self.write(self.roles.policy, prompts, samples, self.sampling, self.ends)
        packs = self._packed(examples, micro, border, answers, [])
        flat = [answer for some in answers for answer in some]
        lengths = torch.tensor([len(answer.tokens) for answer in flat])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        decode = self.tokenizer.decode
        asked = [decode(whole[unit][: border[unit]]) for unit in units for _ in range(samples)]
        known = [decode(whole[unit][border[unit] :]) for unit in units for _ in range(samples)]
        texts = [decode(answer.tokens, skip_special_tokens=True) for answer in flat]
        # scored as if it had ended: a reward model has learnt nothing about any other place
        ended = self._packed(examples, micro, border, answers, self.ends[:1]) if self.scorers else []
        scored = {role: self._scores(ended, role) for role in self.scorers}
        scores = [scored["reward"]] if "reward" in scored else []
        columns = _columns(examples, [unit for unit in units for _ in range(samples)]) if self.functions or self.gold else {}
        scores += [function(asked, texts, known, columns) for function in self.functions]
        gold = self.gold(asked, texts, known, columns) if self.gold else scored.get("gold")
        old, reference = (self._logps(packs, mask, role) for role in ("policy", "reference"))
        return Rollout(asked, flat, texts, packs, mask, old, reference, scores, gold)

    def _packed(
        self, examples: Examples, micro: list[list[int]], border: dict[int, int], answers: list[list[Answer]], end: list[int]
    ) -> list[PackedBatch]:
        """A pack for each micro-batch. end: what is put after answers that did not end."""
        in_turn = iter(answers)  # a small data set's unit can be drawn twice in a step
        groups = [[_group(examples, unit, border[unit], next(in_turn), end) for unit in some] for some in micro]
        return [pack_answers(some).to(self.accelerator.device) for some in groups]

    def _logps(self, packs: list[PackedBatch], mask: Tensor, role: Role) -> Tensor:
        table = torch.zeros(mask.shape)
        table[mask] = torch.cat([self.roles(pack, role, self.sampling.temperature).float().cpu() for pack in packs])
        return table

    def _scores(self, packs: list[PackedBatch], role: Role) -> Tensor:
        return torch.cat([self.roles(pack, role).float().cpu() for pack in packs])


def _columns(examples: Examples, units: list[int]) -> dict[str, list[Any]]:
    """By name, the value in the row of each of the units; None where it has none."""
    rows = [examples.columns_of(unit) for unit in units]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _group(examples: Examples, unit: int, border: int, answers: list[Answer], end: list[int]) -> Group:
    """A prompt with its answers, of which each token counts."""
    tokens = [np.array(answer.tokens + ([] if answer.ended else end), dtype=np.int32) for answer in answers]
    counts = [(each, np.ones(len(each), dtype=np.float32)) for each in tokens]
    return Group(examples.sequence(unit)[0][:border], counts, unit)


def figures_of(rollout: Rollout, reward: Tensor) -> dict[str, float]:
    """What an answer is on average: reward, KL to the start in nats, length, and whether it ends."""
    lengths = rollout.lengths.float()
    found = {
        "reward": float(reward.mean()),
        "reward_std": float(reward.std(correction=0)),
        "kl": float(rollout.kl.mean()),
        "entropy": sum(answer.entropy for answer in rollout.answers) / len(rollout.answers),
        "length": float(lengths.mean()),
        "ended": float(rollout.ended.float().mean()),
        "reward_per_token": float((reward / lengths).mean()),
        "length_correlation": correlation(reward, lengths),
    }
    if len(rollout.scores) > 1:
        found |= {f"reward_{i}": float(score.mean()) for i, score in enumerate(rollout.scores, 1)}
    if rollout.gold is not None:
        found |= {"gold": float(rollout.gold.mean()), "gold_std": float(rollout.gold.std(correction=0))}
    return found


def sampling_gap(rollout: Rollout) -> float:
    """By how much log-probs with the cache differ from those in packs, in the mean: rounding, unless something is wrong."""
    sampled = torch.tensor([logp for answer in rollout.answers for logp in answer.logps])
    return float((sampled - rollout.old[rollout.mask]).abs().mean())
