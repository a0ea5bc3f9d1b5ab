"""Answers to prompts, and what each of their tokens was to policy, reference and rewards."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.data.collate import Group, pack_answers, zero_weight
from posttrain.data.examples import Examples
from posttrain.devices.out_of_memory import in_parts
from posttrain.evaluation.calibration import correlation
from posttrain.models.language.actor_critic import ActorCritic, Role
from posttrain.models.language.generation import Answer, Sampling
from posttrain.rewards import RewardFunction, columns_by_name, unscored
from posttrain.training.processes import Processes

Seed = Callable[[int], int]  # of a prompt, by its place among all of a step
# model, prompts, answers to each, sampling, end tokens, a seed for each prompt or None -> answers by prompt
Write = Callable[..., list[list[Answer]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """Answers to prompts, as many to each in turn, and what they are worth: of all processes, and the same in each.

    units: of the prompts, by micro-batch. prompts: of each answer. scores: by name, [A] each, the reward model's and then the
    functions'; gold: [A].
    """

    units: list[list[int]]
    prompts: list[str]
    answers: list[Answer]
    texts: list[str]
    scores: dict[str, Tensor]
    gold: Tensor | None

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return len(self.answers) // sum(map(len, self.units))

    @property
    def by_unit(self) -> list[list[list[Answer]]]:
        """The answers, by micro-batch and prompt."""
        rest = iter(self.answers)
        return [[[next(rest) for _ in range(self.samples)] for _ in units] for units in self.units]

    @property
    def ended(self) -> Tensor:
        """bool [A]: which answers ended by themselves."""
        return torch.tensor([answer.ended for answer in self.answers])

    @property
    def lengths(self) -> Tensor:
        """int64 [A]: tokens of each answer."""
        return torch.tensor([len(answer.tokens) for answer in self.answers])


@dataclass(frozen=True)
class Rollout(Written):
    """Answers, and what each of their tokens was to policy and reference.

    packs: the answers in turn, as this process trains on them; own: their rows in the tables. mask: bool [A, T], the places that
    an answer fills. old, reference, values (where they are wanted): [A, T], zero past an answer's end.
    """

    packs: list[PackedBatch]
    own: list[int]
    mask: Tensor
    old: Tensor
    reference: Tensor
    values: Tensor | None

    @property
    def sampled(self) -> Tensor:
        """float32 [A, T]: log-probs of the tokens by what they were drawn from, zero past an answer's end."""
        table = torch.zeros(self.mask.shape)
        table[self.mask] = torch.tensor([logp for answer in self.answers for logp in answer.logps])
        return table

    @property
    def kl(self) -> Tensor:
        """By k1, which is exact in the mean: nats an answer [A]."""
        return (self.old - self.reference).sum(1)

    def split(self, table: Tensor) -> tuple[Tensor, ...]:
        """[A, T] -> what belongs to the targets of each of this process's packs."""
        return table[self.own][self.mask[self.own]].split([len(pack.target) for pack in self.packs])


@dataclass(frozen=True)
class Shares:
    """Micro-batches dealt to the processes in turn. units: of each micro-batch; of some, at the end, there may be none."""

    units: list[list[int]]
    processes: Processes

    @property
    def mine(self) -> list[int]:
        """This process's micro-batches, by their numbers; as many as every process has."""
        most = -(-len(self.units) // self.processes.count)
        return [i * self.processes.count + self.processes.rank for i in range(most)]

    def of(self, number: int) -> list[int]:
        """The units of a micro-batch."""
        return self.units[number] if number < len(self.units) else []

    def place(self, number: int) -> int:
        """How many units come before a micro-batch."""
        return sum(len(units) for units in self.units[:number])

    def own(self, each: list[T]) -> list[T]:
        """Of what this process has for each of its micro-batches, that of those that have units."""
        return [one for one, number in zip(each, self.mine, strict=True) if self.of(number)]

    def together(self, found: list[T]) -> list[T]:
        """What each process has found, for each of its micro-batches that has units, in the order of the micro-batches."""
        known = dict(zip([number for number in self.mine if self.of(number)], found, strict=True))
        everyones = {number: value for each in self.processes.gathered(known) for number, value in each.items()}
        return [everyones[number] for number in sorted(everyones)]


@dataclass(frozen=True)
class Roller:
    """Has the policy answer, and all roles read the answers.

    Args:
        scorers: the roles ("reward", "gold") that a model plays; functions: the user's rewards; gold: the user's check.
        ends: ids of the tokens that end an answer.
    """

    roles: ActorCritic
    writes: Write
    sampling: Sampling
    tokenizer: Any
    ends: list[int]
    scorers: list[Role]
    functions: list[RewardFunction]
    gold: RewardFunction | None
    accelerator: Accelerator

    def roll(
        self, examples: Examples, micro: list[list[int]], samples: int, seed: Seed | None, with_values: bool = False
    ) -> Rollout:
        """`write`, then `read`."""
        return self.read(examples, self.write(examples, micro, samples, seed), with_values)

    @torch.no_grad()
    def write(self, examples: Examples, micro: list[list[int]], samples: int, seed: Seed | None) -> Written:
        """Answer the prompts of these units `samples` times each, every process those of its micro-batches, and ask what the
        answers are worth. seed: None: torch's global random numbers."""
        self.roles.eval()
        shares = Shares(micro, Processes.of(self.accelerator))
        answers = self._written(examples, shares, samples, seed)
        flat = [answer for some in answers for group in some for answer in group]
        # scored as if it had ended: a reward model has learnt nothing about any other place
        ended = shares.own(self._packed(examples, shares, answers, self.ends[:1])) if self.scorers else []
        scored = {role: torch.cat(shares.together(self._said(ended, role))) for role in self.scorers}
        texts = [self.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in flat]
        units = [unit for some in micro for unit in some for _ in range(samples)]
        prompts, known = texts_of(examples, units, self.tokenizer)
        columns = columns_of(examples, units) if self.functions or self.gold else {}
        judged = partial(_judged, shares.processes, prompts, texts, known, columns)
        scores = {"model": scored["reward"]} if "reward" in scored else {}
        for function in self.functions:
            scores[free_name(function.short_name, scores)] = judged(function)
        gold = judged(self.gold) if self.gold else scored.get("gold")
        return Written(micro, prompts, flat, texts, scores, gold)

    @torch.no_grad()
    def read(self, examples: Examples, written: Written, with_values: bool = False) -> Rollout:
        """What policy, reference and, where wanted, values say of every token, in the packs that are trained on."""
        self.roles.eval()
        shares, lengths = Shares(written.units, Processes.of(self.accelerator)), written.lengths
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        packs = self._packed(examples, shares, written.by_unit, [])
        read = partial(self._table, shares, shares.own(packs), mask)
        own = [row for number in shares.mine for row in _rows(shares, number, written.samples)]
        values = read("value") if with_values else None
        tables = {"mask": mask, "old": read("policy"), "reference": read("reference"), "values": values}
        return Rollout(**vars(written), packs=packs, own=own, **tables)

    def _written(self, examples: Examples, shares: Shares, samples: int, seed: Seed | None) -> list[list[list[Answer]]]:
        """By micro-batch and prompt, of all processes."""
        mine = [(shares.place(number) + i, unit) for number in shares.mine for i, unit in enumerate(shares.of(number))]
        prompts = [examples.sequence(unit)[0][: int(examples.splits[unit, 0])].tolist() for _, unit in mine]
        seeds = [seed(place) for place, _ in mine] if seed else None
        with self.accelerator.autocast():
            self.roles.set_role("policy")
            found = iter(self.writes(self.roles.policy, prompts, samples, self.sampling, self.ends, seeds) if prompts else [])
        return shares.together([[next(found) for _ in shares.of(number)] for number in shares.mine if shares.of(number)])

    def _packed(self, examples: Examples, shares: Shares, answers: list[list[list[Answer]]], end: list[int]) -> list[PackedBatch]:
        """A pack for each of this process's micro-batches; one without units goes along with the first, and counts for nothing.
        end: what is put after answers that did not end by a token of `ends`."""
        packs = []
        for number in shares.mine:
            units, some = (shares.of(number), answers[number]) if shares.of(number) else (shares.of(0), answers[0])
            groups = [
                _group(examples, unit, int(examples.splits[unit, 0]), each, end, self.ends)
                for unit, each in zip(units, some, strict=True)
            ]
            pack = pack_answers(groups).to(self.accelerator.device)
            packs.append(pack if shares.of(number) else zero_weight(pack))
        return packs

    def _table(self, shares: Shares, packs: list[PackedBatch], mask: Tensor, role: Role) -> Tensor:
        """float32 [A, T]: what a role says of each token of all answers."""
        table = torch.zeros(mask.shape)
        table[mask] = torch.cat(shares.together(self._said(packs, role)))
        return table

    def _said(self, packs: list[PackedBatch], role: Role) -> list[Tensor]:
        options = {"temperature": self.sampling.temperature} if role in ("policy", "reference") else {}

        def read(pack: PackedBatch) -> Tensor:
            return self.roles(pack, role, **options).float().cpu()

        return [torch.cat(in_parts(read, pack, PackedBatch.split, f"reading by the {role}")) for pack in packs]


def _judged(processes: Processes, *asked: Any) -> Tensor:
    """Rank 0 asks the function for all answers at once: it sees what it would see of one process. asked: its arguments, then the
    function."""
    *given, function = asked
    return processes.told(lambda: function(*given))


def _rows(shares: Shares, number: int, samples: int) -> range:
    """Of the tables, those that a micro-batch's answers fill; of one without units the first's."""
    number = number if shares.of(number) else 0
    start = shares.place(number) * samples
    return range(start, start + len(shares.of(number)) * samples)


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or with a number after it where it is taken."""
    return next(each for each in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if each not in taken)


def texts_of(examples: Examples, units: list[int], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Of each unit its prompt, and the answer that the data has."""
    cut = [(examples.sequence(unit)[0].tolist(), int(examples.splits[unit, 0])) for unit in units]
    decode = tokenizer.decode
    return [decode(tokens[:border]) for tokens, border in cut], [decode(tokens[border:]) for tokens, border in cut]


def columns_of(examples: Examples, units: list[int]) -> dict[str, list[Any]]:
    """By name, the value in the row of each of the units; None where it has none."""
    return columns_by_name([examples.columns_of(unit) for unit in units])


def _group(examples: Examples, unit: int, border: int, answers: list[Answer], end: list[int], ends: list[int]) -> Group:
    """A prompt with its answers, of which each token counts."""
    tokens = [np.array(answer.tokens + (end if answer.tokens[-1] not in ends else []), dtype=np.int32) for answer in answers]
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
        found |= {f"reward_{name}": float(score.nanmean()) for name, score in rollout.scores.items() if not score.isnan().all()}
    if bool((none := unscored(list(rollout.scores.values()))).any()):
        found["unscored"] = float(none.float().mean())
    if rollout.gold is not None:
        found |= {"gold": float(rollout.gold.mean()), "gold_std": float(rollout.gold.std(correction=0))}
    return found


def sampling_gap(rollout: Rollout) -> float:
    """By how much the log-probs that were drawn by differ from those in packs, in the mean: rounding, unless top-k or top-p cut
    something off, or something is wrong."""
    return float((rollout.sampled - rollout.old)[rollout.mask].abs().mean())
