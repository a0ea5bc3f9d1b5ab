"""Dynamic sampling: which prompts a step keeps, by hand, and runs whose every trained prompt teaches something."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import posttrain
from posttrain.batch import PackedBatch
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.data.mixture import draw_units
from posttrain.errors import Stopped, UserError
from posttrain.models.language.generation import Answer
from posttrain.stages.ppo.diagnostics import alarms
from posttrain.stages.ppo.draws import drawn_until_full
from posttrain.stages.ppo.rollout import Shares, Written
from posttrain.training.processes import Processes

GRPO = ("model=tiny", "+peft=lora", "ppo.advantage=grpo", "ppo.samples=2", "ppo.dynamic_sampling=true")


def written(units: list[list[int]], rewards: list[float]) -> Written:
    """Two answers to each prompt, which are called by their unit and number, of lengths 1 and 2."""
    flat = [unit for some in units for unit in some for _ in range(2)]
    names = [f"{unit}.{i % 2}" for i, unit in enumerate(flat)]
    answers = [Answer([7] * (1 + i % 2), [0.0] * (1 + i % 2), True, 0.0) for i in range(len(flat))]
    score = torch.tensor(rewards, dtype=torch.float32)
    return Written(units, [f"prompt {unit}" for unit in flat], answers, names, {"f": score}, score)


def by_f(each: Written) -> Tensor:
    return each.scores["f"]


FIRST = written([[4, 9], [2]], [1, 1, 0, 1, 0, 0])  # of 4, 9 and 2 only 9 has two rewards
SECOND = written([[8, 3], [5]], [0, 1, 1, 0, 0, 1])  # all of them


def test_prompts_are_kept_in_turn_until_there_are_enough() -> None:
    def draws() -> Iterator[Written]:
        yield from (FIRST, SECOND)
        raise AssertionError("a third draw, though there are enough")

    found, figures = drawn_until_full(draws(), by_f, 3, 2)
    assert found.units == [[9, 8], [3]], "the batch's own size again, for any number of processes"
    assert found.texts == ["9.0", "9.1", "8.0", "8.1", "3.0", "3.1"] and found.prompts[::2] == [
        "prompt 9",
        "prompt 8",
        "prompt 3",
    ]
    assert (
        found.scores["f"].tolist() == [0, 1, 0, 1, 1, 0] and found.gold is not None and found.gold.tolist() == [0, 1, 0, 1, 1, 0]
    )
    assert [len(answer.tokens) for answer in found.answers] == [1, 2] * 3 and found.samples == 2
    assert found.by_unit[0][1] == [SECOND.answers[0], SECOND.answers[1]]
    assert figures == pytest.approx(
        {"prompts_drawn": 6, "prompts_kept": 3, "filled": 1, "informative": 4 / 6, "drawn_reward": 0.5, "drawn_tokens": 18}
    )
    own, _ = drawn_until_full(iter([SECOND]), by_f, 3, 2)
    assert own.units == SECOND.units and own.texts == SECOND.texts, "where all of the first draw teach, it is the step"
    for rank, mine in ((0, [[9, 8]]), (1, [[3]])):
        shares = Shares(found.units, Processes(2, rank))
        assert [shares.of(number) for number in shares.mine] == mine


def test_at_the_last_draw_the_step_is_smaller_and_that_is_said() -> None:
    found, figures = drawn_until_full(iter([FIRST, FIRST]), by_f, 3, 2)
    assert found.units == [[9, 9]] and figures["prompts_drawn"] == 6 and figures["filled"] == pytest.approx(2 / 3)
    nothing = written([[1], [2]], [1, 1, 0, 0])
    flat, none = drawn_until_full(iter([nothing, nothing]), by_f, 2, 1)
    assert flat is nothing and none["prompts_kept"] == none["informative"] == 0
    cfg: Any = typed_config(compose_run("ppo", [*GRPO, "reward.function=length"]))
    healthy: dict[str, float] = {
        "kl": 0,
        "entropy": 1,
        "clip_fraction": 0,
        "explained_variance": 0,
        "reward_std": 1,
        "ended": 1,
        "reward": 0,
    }
    healthy |= {"length_correlation": 0, "answers": 9, "step": 1}
    said = alarms(healthy | figures, healthy, cfg.ppo)
    assert list(said) == ["unfilled"] and "6 prompts were drawn, and only 2 have answers of different reward" in said["unfilled"]
    assert list(alarms(healthy | none, healthy, cfg.ppo)) == ["flat"]


def test_further_prompts_have_the_shares_of_the_run() -> None:
    sizes = [np.full(50, 10), np.full(20, 10)]
    drawn = draw_units(sizes, [0.75, 0.25], 2**61 + 5, 400, None, "repeat")
    assert (drawn < 50).sum() == 300 and len(set(drawn[drawn < 50][:50].tolist())) == 50


def test_gae_is_refused() -> None:
    with pytest.raises(UserError, match=r"ppo.dynamic_sampling: gae does not compare"):
        compose_run("ppo", ["model=tiny", "reward.function=length", "ppo.dynamic_sampling=true"])


REWARD = "def odd(prompts, answers): return [len(a) % 2 if int(p.split()[1]) % 2 else 1.0 for p, a in zip(prompts, answers)]"
WORDS = (
    *GRPO, "data.path=rows.jsonl", "data.eval_share=0", "eval.sets=null", "train.max_steps=2", "train.batch_size=2",
    "train.grad_accum=2", "ppo.minibatches=1", "ppo.epochs=1", "rollout.max_new_tokens=6", "reward.function=odd_of:odd",
    "data.template=none", "ppo.max_draws=30",
)  # fmt: skip


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[PackedBatch]:
    """Those that runs train on. Of their prompts every other one has the same reward for all answers."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"say {i} or"}) + "\n" for i in range(16)))
    (tmp_path / "odd_of.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found: list[PackedBatch] = []
    from posttrain.stages.ppo import training

    inner = training.ppo_loss

    def spy(cfg: Any, module: Any, batch: PackedBatch, kl_coef: float) -> Any:
        found.append(batch)
        return inner(cfg, module, batch, kl_coef)

    monkeypatch.setattr(training, "ppo_loss", spy)
    return found


def logged(run: str) -> list[dict[str, float]]:
    lines = [
        line for line in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) if "train/prompts_drawn" in line
    ]
    return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]


def test_all_that_a_step_trains_on_teaches_something(batches: list[PackedBatch]) -> None:
    posttrain.run("ppo", *WORDS, "run.dir=straight")
    lines = logged("straight")
    assert len(lines) == 2 and len(batches) == 4
    for line in lines:
        assert line["train/prompts_kept"] == 4 and line["train/filled"] == 1 and line["train/prompts_drawn"] > 4
        assert line["train/informative"] < 0.9 and line["train/prompts_drawn"] % 4 == 0
    for batch in batches:
        assert len(batch.rows) == 2 and all(row % 2 for row in batch.rows), "rows whose reward is always 1 are not among them"
        assert bool((batch.extra["advantages"] != 0).all())


@pytest.mark.slow
def test_a_start_from_the_middle_draws_the_same_prompts(batches: list[PackedBatch]) -> None:
    posttrain.run("ppo", *WORDS, "run.dir=straight")
    with pytest.raises(Stopped):
        posttrain.run("ppo", *WORDS, "run.dir=stopped", "run.stop_after=1")
    posttrain.run("ppo", *WORDS, "run.dir=stopped")
    assert logged("stopped") == logged("straight") and len(logged("stopped")) == 2
    same = [(Path(run) / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("straight", "stopped")]
    assert same[0] == same[1]
