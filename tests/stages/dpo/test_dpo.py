"""Pairs of a policy's own making, ranked by a rule; the rules; and the words of alarms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import posttrain
from posttrain.commands.compose import compose_runs
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.merge import merge_run
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.rewards import brevity, code_spans, overlap
from posttrain.stages.ppo.diagnostics import alarms
from posttrain.training.checkpoint import newest_checkpoint

SMALL = ("model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "data.max_rows=12", "data.eval_rows=4")
SMALL += ("eval.rows=4",)


def test_rules_by_hand() -> None:
    # shared: the, list (2 of 3 said, 2 of 4 known) -> 4/7
    assert overlap(["", ""], ["the list grows", "no"], ["Sorts the list, twice", "yes"]) == [pytest.approx(4 / 7), 0.0]
    assert brevity([""], ["one two three"]) == [pytest.approx(0.97)]
    assert code_spans([""], ["`a` and `b`, not `c"]) == [2.0]


def test_a_reward_model_learns_from_the_policys_own_answers(tmp_path: Path) -> None:
    posttrain.run("sft", *SMALL, f"run.dir={tmp_path / 'sft'}")
    words = ["rm", *SMALL, f"init={tmp_path / 'sft'}", f"rm.policy={tmp_path / 'sft'}", "rm.rule=posttrain.rewards:brevity"]
    found = posttrain.run(*words, "rm.max_new_tokens=16", "data.eval_share=0.4", f"run.dir={tmp_path / 'rm'}")
    pairs = [json.loads(line) for line in (tmp_path / "rm" / "pairs.jsonl").read_text().splitlines()]
    assert 0 < len(pairs) <= 12
    for pair in pairs:
        chosen, rejected = brevity(["", ""], [pair["chosen"], pair["rejected"]])
        assert chosen > rejected and pair["prompt"][-1]["role"] == "user"
    assert {parent["role"] for parent in found["parents"]} == {"init", "policy"} and "pairs.jsonl" in found["files"]
    measured = evaluate_runs([str(tmp_path / "rm")])["rm"]  # on the pairs that were written, not on the prompts
    assert (
        measured == pytest.approx({name: found["metrics"][name] for name in measured}, abs=1e-5) and "eval/accuracy" in measured
    )


NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
PAIRS = [
    {"prompt": f"{word} is", "chosen": f" {word[::-1]}" * (1 + k % 3), "rejected": f" not {word}" * (1 + k % 2)}
    for k, word in enumerate(NUMBERS)
]
RAGGED = [0.1, 4, 1, 0.5, 2, 7, 0.25, 1, 3, 0.3, 1, 1, 0.05, 2, 6, 1]

STAGES = ["dpo", pytest.param("rm", marks=pytest.mark.slow)]


def on_pairs(folder: Path, stage: str, rows: list[dict[str, Any]], batch: int, accumulation: int, *words: str) -> tuple[Any, Any]:
    """Loss, gradient norm and accuracy of each of three steps, and the weights that were trained."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    posttrain.run(
        stage, "model=tiny", "+peft=lora", "peft.r=4", f"data.path={folder / 'rows.jsonl'}", "data.eval_share=0",
        "eval.sets=null", "train.max_steps=3", f"train.batch_size={batch}", f"train.grad_accum={accumulation}", "optim.lr=1e-2",
        "optim.warmup_ratio=0", "optim.max_grad_norm=null", *words, f"run.dir={folder / 'run'}",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [[line[f"train/{name}"] for name in ("loss", "grad_norm", "accuracy")] for line in lines if "train/loss" in line]
    checkpoint, _ = newest_checkpoint(folder / "run" / "checkpoints")
    assert checkpoint and len(steps) == 3
    return steps, checkpoint.weights


@pytest.mark.parametrize("stage", STAGES)
def test_a_pair_of_weight_3_is_that_pair_three_times(stage: str, tmp_path: Path) -> None:
    first, second = PAIRS[0], PAIRS[2]
    weighed, _ = on_pairs(tmp_path / "weighed", stage, [first, {**second, "weight": 3}], 2, 1)
    repeated, _ = on_pairs(tmp_path / "repeated", stage, [first, second, second, second], 4, 1)
    for (loss, norm, _), (other, other_norm, _) in zip(weighed, repeated, strict=True):
        assert (loss, norm) == pytest.approx((other, other_norm), rel=1e-4)
    plain, _ = on_pairs(tmp_path / "plain", stage, [first, second], 2, 1)
    assert abs(weighed[0][1] / plain[0][1] - 1) > 0.05, "the weight changes nothing, so nothing was compared"


@pytest.mark.parametrize("stage", STAGES)
def test_how_a_step_is_split_does_not_matter_to_ragged_weights(stage: str, tmp_path: Path) -> None:
    rows = [{**pair, "weight": weight} for pair, weight in zip(PAIRS, RAGGED, strict=True)]
    whole, kept = on_pairs(tmp_path / "whole", stage, rows, 8, 1)
    split, kept_split = on_pairs(tmp_path / "split", stage, rows, 1, 8)
    assert np.array(split) == pytest.approx(np.array(whole), rel=1e-4)
    for name, value in kept.items():
        torch.testing.assert_close(kept_split[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_of_1_are_no_weights(stage: str, tmp_path: Path) -> None:
    """Bit for bit, whichever way they are said."""
    plain, kept = on_pairs(tmp_path / "plain", stage, PAIRS, 4, 2)
    said, kept_said = on_pairs(
        tmp_path / "said", stage, [{**p, "weight": 0.5, "quality": 2} for p in PAIRS], 4, 2, "data.quality=weight"
    )
    assert said == plain and all(torch.equal(kept_said[name], value) for name, value in kept.items())


def test_pairs_of_the_policys_own_have_the_weights_of_their_prompts(tmp_path: Path) -> None:
    """The columns that `data` names are of its rows, and not of the pairs."""
    rows = [{"q": f"What is {word}?", "completion": word, "good": k % 3} for k, word in enumerate(NUMBERS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    posttrain.run("sft", *SMALL, f"run.dir={tmp_path / 'sft'}")
    weighed = [
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.columns.prompt=q",
        "data.columns.quality=good",
        "data.quality=weight",
    ]
    policy = [f"rm.policy={tmp_path / 'sft'}", "rm.rule=posttrain.rewards:brevity", "rm.max_new_tokens=16"]
    words = [*SMALL, *weighed, *policy, "data.max_untrained_share=0.9", f"run.dir={tmp_path / 'rm'}"]
    found = posttrain.run("rm", *words)
    pairs = [json.loads(line) for line in (tmp_path / "rm" / "pairs.jsonl").read_text().splitlines()]
    weights = [float(NUMBERS.index(pair["prompt"][0]["content"].split()[2][:-1]) % 3) for pair in pairs]
    assert [pair["weight"] for pair in pairs] == weights and {0.0, 1.0, 2.0} == set(weights)
    assert found["data"][0]["untrained"] > 0


def test_a_reward_model_is_not_merged_into_a_language_model(tmp_path: Path) -> None:
    posttrain.run("rm", *SMALL, f"run.dir={tmp_path / 'rm'}")
    with pytest.raises(UserError, match="is a reward model"):
        merge_run(tmp_path / "rm", tmp_path / "out", 0.1)
    with pytest.raises(UserError, match="is a reward model"):
        compose_runs([str(tmp_path / "rm"), str(tmp_path / "rm")], tmp_path / "out", None, None)
    assert not (tmp_path / "out").exists()


def test_a_policy_needs_a_rule_and_must_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rm\.policy and rm\.rule go together"):
        posttrain.run("rm", *SMALL, "rm.policy=x", f"run.dir={tmp_path / 'a'}")
    with pytest.raises(UserError, match=r"rm\.policy: nothing is no finished run"):
        posttrain.run("rm", *SMALL, "rm.policy=nothing", "rm.rule=posttrain.rewards:brevity", f"run.dir={tmp_path / 'b'}")


HEALTHY = {
    "kl": 1.0, "reward": 0.5, "reward_std": 1.0, "entropy": 2.0, "clip_fraction": 0.1, "explained_variance": 0.3, "ended": 1.0,
    "length_correlation": 0.1, "step": 9, "answers": 100, "gold": 0.5, "gold_std": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "rings"),
    [
        ({}, []),
        ({"kl": 9.0}, ["kl"]),
        ({"kl": 9.0, "reward": 2.0}, ["hacking", "kl"]),
        ({"reward": 0.6, "gold": 0.3}, ["gold"]),
        ({"entropy": 0.01}, ["entropy"]),
        ({"clip_fraction": 0.4}, ["clip"]),
        ({"explained_variance": -2.0}, ["value"]),
        ({"explained_variance": -2.0, "step": 2}, []),
        ({"ended": 0.2}, ["ended"]),
        ({"reward_std": 0.0}, ["flat"]),
        ({"length_correlation": -0.7}, ["length"]),
        ({"length_correlation": -0.7, "answers": 16}, []),
    ],
)
def test_alarms_ring_for_what_they_name(change: dict[str, float], rings: list[str]) -> None:
    cfg = typed_config(compose_run("ppo", ["reward.function=a:b", "ppo.target_kl=4"])).ppo
    found = alarms({**HEALTHY, **change}, HEALTHY, cfg)
    assert sorted(found) == rings
    assert all(len(line) < 250 for line in found.values())
