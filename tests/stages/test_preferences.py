"""Pairs of a policy's own making, ranked by a rule; the rules; and the words of alarms."""

import json
from pathlib import Path

import pytest

import posttrain
from posttrain.after.blend import compose_runs
from posttrain.after.merge import merge_run
from posttrain.config.compose import compose_run
from posttrain.config.schema import STAGE_CONFIG
from posttrain.errors import UserError
from posttrain.rules import brevity, code_spans, overlap
from posttrain.stages.alarms import alarms

SMALL = ("model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "data.max_rows=12", "data.eval_rows=4")


def test_rules_by_hand() -> None:
    # shared: the, list (2 of 3 said, 2 of 4 known) -> 4/7
    assert overlap(["", ""], ["the list grows", "no"], ["Sorts the list, twice", "yes"]) == [pytest.approx(4 / 7), 0.0]
    assert brevity([""], ["one two three"]) == [pytest.approx(0.97)]
    assert code_spans([""], ["`a` and `b`, not `c"]) == [2.0]


def test_a_reward_model_learns_from_the_policys_own_answers(tmp_path: Path) -> None:
    posttrain.run("sft", *SMALL, f"run.dir={tmp_path / 'sft'}")
    words = ["rm", *SMALL, f"init={tmp_path / 'sft'}", f"rm.policy={tmp_path / 'sft'}", "rm.rule=posttrain.rules:brevity"]
    found = posttrain.run(*words, "rm.max_new_tokens=16", f"run.dir={tmp_path / 'rm'}")
    pairs = [json.loads(line) for line in (tmp_path / "rm" / "pairs.jsonl").read_text().splitlines()]
    assert 0 < len(pairs) <= 12
    for pair in pairs:
        chosen, rejected = brevity(["", ""], [pair["chosen"], pair["rejected"]])
        assert chosen > rejected and pair["prompt"][-1]["role"] == "user"
    assert {parent["role"] for parent in found["parents"]} == {"init", "policy"} and "pairs.jsonl" in found["files"]


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
        posttrain.run("rm", *SMALL, "rm.policy=nothing", "rm.rule=posttrain.rules:brevity", f"run.dir={tmp_path / 'b'}")


HEALTHY = {
    "kl": 1.0, "reward": 0.5, "reward_std": 1.0, "entropy": 2.0, "clip_share": 0.1, "explained_variance": 0.3, "ended": 1.0,
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
        ({"clip_share": 0.4}, ["clip"]),
        ({"explained_variance": -2.0}, ["value"]),
        ({"explained_variance": -2.0, "step": 2}, []),
        ({"ended": 0.2}, ["ended"]),
        ({"reward_std": 0.0}, ["flat"]),
        ({"length_correlation": -0.7}, ["length"]),
        ({"length_correlation": -0.7, "answers": 16}, []),
    ],
)
def test_alarms_ring_for_what_they_name(change: dict[str, float], rings: list[str]) -> None:
    cfg = STAGE_CONFIG.validate_python(compose_run("ppo", ["reward.function=a:b", "ppo.target_kl=4"])).ppo
    found = alarms({**HEALTHY, **change}, HEALTHY, cfg)
    assert sorted(found) == rings
    assert all(len(line) < 250 for line in found.values())
