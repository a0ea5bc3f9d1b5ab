"""Policy optimisation on sampled answers: PPO (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155),
and with other advantages GRPO and RLOO. A step of the run is one rollout and the updates that it feeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.config.schema import Ppo
from posttrain.console import say
from posttrain.data.collate import Group, pack_answers
from posttrain.data.examples import Examples
from posttrain.errors import UserError
from posttrain.evaluation.calibration import correlation
from posttrain.evaluation.held_out import TOKENS
from posttrain.losses import policy as losses
from posttrain.models.hub import context_length
from posttrain.models.language.generation import Answer, Sampling, sample
from posttrain.rewards import combined, load_function
from posttrain.runs.directory import Run
from posttrain.runs.files import write_json
from posttrain.stages.language.build import PreparedData, TrainableModel
from posttrain.stages.language.init import InitSource, resolve_reward
from posttrain.stages.language.stage import LanguageRun, run_language
from posttrain.stages.ppo.actor_critic import build_actor_critic
from posttrain.stages.ppo.diagnostics import alarms
from posttrain.stages.ppo.vllm import check_engine, start_engine
from posttrain.training.loop import seed_step
from posttrain.training.objective import Update

ROLLOUT = 8000  # the part of a step's random numbers that sampling uses; training takes those from 0
SHOWN = 8  # held-out prompts whose answers are kept for the page


def run(cfg: Ppo, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    return run_language(cfg, run, TOKENS, PpoRun)


@dataclass
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
        return torch.tensor([answer.ended for answer in self.answers])

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def kl(self) -> Tensor:
        """By k1, which is exact in the mean: nats an answer [A]."""
        return (self.old - self.reference).sum(1)

    def split(self, table: Tensor) -> tuple[Tensor, ...]:
        """[A, T] -> what belongs to the targets of each pack."""
        return table[self.mask].split([len(pack.target) for pack in self.packs])


class PpoRun(LanguageRun):
    cfg: Ppo  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self, inputs: PreparedData) -> None:
        cfg, tokenizer_hash = self.cfg, inputs.tokenizer_hash
        context = context_length(inputs.base.path, inputs.base.revision)
        if context and cfg.train.max_length > context:
            raise UserError(f"train.max_length: {cfg.train.max_length} is more than the model's context of {context} tokens")
        if cfg.rollout.engine == "vllm":
            check_engine()
        self.functions = [load_function(name, "reward.function") for name in cfg.reward.function]
        self.starts: dict[str, InitSource] = {}
        if cfg.init_reward:
            self.starts["reward"] = resolve_reward(cfg, cfg.init_reward, "init_reward", tokenizer_hash)
        gold, self.gold = cfg.reward.gold, None
        if gold and ":" in gold:
            self.gold = load_function(gold, "reward.gold")
        elif gold:
            self.starts["gold"] = resolve_reward(cfg, gold, "reward.gold", tokenizer_hash)
        inputs.start.parents.extend(parent for start in self.starts.values() for parent in start.parents)
        rollout = cfg.rollout
        self.sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, rollout.batch_size)
        self.approx_kl: tuple[float | Tensor, float | Tensor] = (0.0, 0.0)
        self.clipped: tuple[float | Tensor, float | Tensor] = (0.0, 0.0)
        self.write = sample

    def assemble(self, built: TrainableModel, inputs: PreparedData) -> tuple[nn.Module, TrainableModel]:
        roles, built = build_actor_critic(self.cfg, built, inputs, self.starts, self.accelerator.device)
        if self.cfg.rollout.engine == "vllm":
            self.write = start_engine(self.cfg, inputs, built).sample
        return roles, built

    def references(self, module: nn.Module, inputs: PreparedData) -> tuple[list[PackedBatch], Any]:
        return [], None

    def updates(self, step: int, module: nn.Module, inputs: PreparedData, table: Any) -> Iterator[Update]:
        cfg, state = self.cfg.ppo, self._state()
        began, self.clipped = time.monotonic(), (0.0, 0.0)
        seed_step(self.cfg.train.seed, step, ROLLOUT)
        rollout = self.roll(module, inputs, inputs.data.train, inputs.order.micro(step, 0), cfg.samples)
        parts, figures = self._ppo_batches(module, rollout, state["kl_coef"])
        figures["rollout_tokens_per_second"] = float(rollout.mask.sum()) / (time.monotonic() - began)
        began, tokens, updates = time.monotonic(), 0, 0
        shuffled = torch.Generator().manual_seed(self.cfg.train.seed * 1_000_003 + step)
        groups = [parts[i :: cfg.minibatches] for i in range(min(cfg.minibatches, len(parts)))]
        planned = [int(i) for _ in range(cfg.epochs) for i in torch.randperm(len(groups), generator=shuffled)]
        for i in planned:
            batches = [batch for part in groups[i] for batch in part]
            self.approx_kl = (0.0, 0.0)
            yield Update(batches)
            tokens, updates = tokens + sum(batch.size for batch in batches), updates + 1
            if cfg.stop_kl is not None and float(self.approx_kl[0]) > cfg.stop_kl * float(self.approx_kl[1]):
                break
        figures["update_tokens_per_second"] = tokens / (time.monotonic() - began)
        figures["updates"] = float(updates)
        if cfg.target_kl:
            state["kl_coef"] = losses.adapted(state["kl_coef"], figures["kl"], cfg.target_kl, cfg.kl_rate)
        yield Update([], {name: (torch.tensor(value), 1.0) for name, value in figures.items()})
        self._watch(step + 1, figures, len(rollout.answers))

    def objective(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        """Of one part of a lesson: the policy's, or the value model's on the same tokens. Apart, each is done with before the
        other's adapters set_role, and only one graph is in memory."""
        ppo, extra = self.cfg.ppo, batch.extra
        if "returns" in extra:
            output = losses.value_loss(module(batch, "value"), extra["values"], extra["returns"], clip=ppo.value_clip)
            return replace(output, total=ppo.value_coef * output.total)
        spread = bool(ppo.entropy_coef)
        found = module(batch, "policy", self.cfg.rollout.temperature, with_entropy=spread)
        output = losses.policy_loss(found[0] if spread else found, extra["old"], extra["advantages"], clip=ppo.clip)
        total, count = output.metrics["update_kl"]
        # tensors, for a number here would have the host wait for the device in every micro-batch
        self.approx_kl = (self.approx_kl[0] + total, self.approx_kl[1] + count)
        self.clipped = (self.clipped[0] + output.metrics["clip_fraction"][0], self.clipped[1] + count)
        return replace(output, total=output.total - ppo.entropy_coef * found[1].sum()) if spread else output

    @torch.no_grad()
    def roll(self, module: Any, inputs: PreparedData, examples: Examples, micro: list[list[int]], samples: int) -> Rollout:
        """Answer the prompts of these units, and have all roles read the answers. Random numbers are torch's global ones."""
        module.eval()
        units = [unit for units in micro for unit in units]
        whole = {unit: examples.sequence(unit)[0].tolist() for unit in units}
        border = {unit: int(examples.splits[unit, 0]) for unit in units}
        with self.accelerator.autocast():
            module.set_role("policy")
            answers = self.write(module.policy, [whole[u][: border[u]] for u in units], samples, self.sampling, inputs.ends)

        def packed(end: list[int]) -> list[PackedBatch]:
            in_turn = iter(answers)  # a small data set's unit can be drawn twice in a step
            groups = [[_group(examples, unit, border[unit], next(in_turn), end) for unit in some] for some in micro]
            return [pack_answers(some).to(self.accelerator.device) for some in groups]

        packs = packed([])
        flat = [answer for some in answers for answer in some]
        lengths = torch.tensor([len(answer.tokens) for answer in flat])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        temperature = self.cfg.rollout.temperature

        def read(role: str) -> Tensor:
            table = torch.zeros(mask.shape)
            table[mask] = torch.cat([module(pack, role, temperature).float().cpu() for pack in packs])
            return table

        decode = inputs.tokenizer.decode
        prompts = [decode(whole[unit][: border[unit]]) for unit in units for _ in range(samples)]
        known = [decode(whole[unit][border[unit] :]) for unit in units for _ in range(samples)]
        texts = [decode(answer.tokens, skip_special_tokens=True) for answer in flat]
        # scored as if it had ended: a reward model has shaped_reward nothing about any other place
        whole_answers = packed(inputs.ends[:1]) if self.starts else []
        scored = {role: torch.cat([module(pack, role).float().cpu() for pack in whole_answers]) for role in self.starts}
        scores = ([scored["reward"]] if "reward" in scored else []) + [f(prompts, texts, known) for f in self.functions]
        gold = self.gold(prompts, texts, known) if self.gold else scored.get("gold")
        return Rollout(prompts, flat, texts, packs, mask, read("policy"), read("reference"), scores, gold)

    def _ppo_batches(
        self, module: nn.Module, rollout: Rollout, kl_coef: float
    ) -> tuple[list[list[PackedBatch]], dict[str, float]]:
        """What the updates train on, for each pack the policy's part and (with gae) the value model's; and the step's figures."""
        ppo, mask = self.cfg.ppo, rollout.mask
        reward, shaped_reward = combined(rollout.scores, rollout.ended, self.cfg.reward)
        kl = losses.kl_estimate(rollout.old, rollout.reference, ppo.kl_estimator) * mask
        figures = _figures(rollout, reward) | {
            "kl_coef": kl_coef,
            "shaped_reward": float((shaped_reward - kl_coef * kl.sum(1)).mean()),
        }
        figures["sampling_gap"] = _sampling_gap(rollout)
        if ppo.advantage == "gae":
            values = torch.zeros(mask.shape)
            with torch.no_grad():
                read = [module(pack, "value").float().cpu() for pack in rollout.packs]
            values[mask] = torch.cat(read)
            rewards = -kl_coef * kl
            rewards[torch.arange(len(mask)), rollout.lengths - 1] += shaped_reward
            advantages, returns = losses.gae(rewards, values, mask, ppo.gamma, ppo.lam)
            figures["explained_variance"] = losses.explained_variance(values[mask], returns[mask])
            if ppo.whiten:
                advantages[mask] = losses.whiten(advantages[mask])
            learning = {"values": rollout.split(values), "returns": rollout.split(returns)}
        else:
            whole = losses.group_advantages(shaped_reward - kl_coef * kl.sum(1), ppo.samples, ppo.advantage)
            advantages, learning = whole[:, None] * mask, {}
        acting = {"old": rollout.split(rollout.old), "advantages": rollout.split(advantages)}
        ppo_batches = []
        for i, pack in enumerate(rollout.packs):
            halves = [acting, learning] if learning else [acting]
            # a token of both parts is one token: their counts add up to it
            share = pack.loss_denominator / len(halves)
            ppo_batches.append(
                [replace(pack, loss_denominator=share, extra={n: v[i] for n, v in half.items()}) for half in halves]
            )
        return ppo_batches, figures

    def measure(
        self, module: nn.Module, inputs: PreparedData, held_out: list[PackedBatch], done: int, check: Callable[[], None]
    ) -> dict[str, float]:
        """Answers to the held-out prompts, always by the same random numbers."""
        examples, size = inputs.data.held_out, self.cfg.train.batch_size
        if not len(examples):
            return {}
        seed_step(self.cfg.train.seed, 0, ROLLOUT + 1)
        micro = [list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)]
        rollout = self.roll(module, inputs, examples, micro, 1)
        check()
        reward, _ = combined(rollout.scores, rollout.ended, self.cfg.reward)
        self.rows = {"reward": reward.tolist(), "kl": rollout.kl.tolist(), "length": rollout.lengths.tolist()}
        self._keep_samples(rollout, reward, done, inputs.order.num_steps)
        return {f"eval/{name}": value for name, value in _figures(rollout, reward).items()}

    def remarks(self) -> dict[str, Any]:
        state = self._state()
        return {"alarms": state["alarms"], "kl_coef": state["kl_coef"]}

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this stage beside the weights."""
        assert self.loop
        state = self.loop.state
        state.setdefault("kl_coef", self.cfg.ppo.kl_coef)
        state.setdefault("first", None)
        state.setdefault("alarms", [])
        state.setdefault("ringing", [])
        return state

    def _watch(self, step: int, figures: dict[str, float], answers: int) -> None:
        """Say what leaves its healthy range, once until it has come back."""
        (clipped, ratios), state = self.clipped, self._state()
        found = {"explained_variance": 0.0, **figures, "clip_fraction": float(clipped) / max(float(ratios), 1.0)}
        found |= {"step": step, "answers": answers}
        state["first"] = state["first"] or found
        ringing = alarms(found, state["first"], self.cfg.ppo)
        for name, line in ringing.items():
            if name not in state["ringing"]:
                say(f"step {step}: {line}")
                state["alarms"].append({"step": step, "text": line})
        state["ringing"] = sorted(ringing)

    def _keep_samples(self, rollout: Rollout, reward: Tensor, done: int, num_steps: int) -> None:
        """Add these answers to the page's table."""
        if not self.accelerator.is_main_process:
            return
        path = self.run.dir / "samples.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        label = {0: "before", num_steps: "after"}.get(done, f"step {done}")
        for i in range(min(SHOWN, len(rollout.texts))):
            if i == len(kept):
                kept.append({"prompt": rollout.prompts[i], "answers": []})
            earlier = [answer for answer in kept[i]["answers"] if answer["step"] < done]
            new = {"step": done, "label": label, "text": rollout.texts[i], "reward": round(float(reward[i]), 4)}
            kept[i]["answers"] = [*earlier, new]
        write_json(path, kept)


def _group(examples: Examples, unit: int, border: int, answers: list[Answer], end: list[int]) -> Group:
    """A prompt with its answers, of which each token counts. end: what is put after those that did not end."""
    tokens = [np.array(answer.tokens + ([] if answer.ended else end), dtype=np.int32) for answer in answers]
    counts = [(each, np.ones(len(each), dtype=np.float32)) for each in tokens]
    return Group(examples.sequence(unit)[0][:border], counts, unit)


def _figures(rollout: Rollout, reward: Tensor) -> dict[str, float]:
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


def _sampling_gap(rollout: Rollout) -> float:
    """By how much log-probs with the cache differ from those in packs, in the mean: rounding, unless something is wrong."""
    sampled = torch.tensor([logp for answer in rollout.answers for logp in answer.logps])
    return float((sampled - rollout.old[rollout.mask]).abs().mean())
