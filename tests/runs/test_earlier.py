"""What earlier versions called things, and what of them can be compared with today's."""

from typing import Any

import pytest

from posttrain.runs.earlier import (
    as_of_today,
    current_config,
    current_figures,
    current_function,
    current_parameter,
    current_state,
)
from posttrain.runs.identity import compare, identity_of


def test_a_config_under_todays_names() -> None:
    then = {
        "stage": "ppo",
        "reward": {"missing_end": 0.5, "function": ["posttrain.rules:brevity", "mine:score"]},
        "ppo": {"lam": 1},
    }
    expected = {"missing_eos_penalty": 0.5, "function": ["posttrain.rewards:brevity", "mine:score"]}
    assert current_config(then) == {**then, "reward": expected}
    assert then["reward"]["missing_end"] == 0.5, "what was given stays as it is"  # type: ignore[index]
    assert list(current_config(then)["reward"]) == ["missing_eos_penalty", "function"], "in its place"
    assert current_config({"stage": "sft", "reward": None}) == {"stage": "sft", "reward": None}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("posttrain.rules:overlap", "posttrain.rewards:overlap"),
        ("posttrain.rewards:overlap", "posttrain.rewards:overlap"),
        ("my.posttrain.rules:overlap", "my.posttrain.rules:overlap"),
        ("posttrain.rules", "posttrain.rewards"),
        ("builtin:reference", "builtin:reference"),
    ],
)
def test_a_function_under_todays_name(name: str, expected: str) -> None:
    assert current_function(name) == expected


def test_figures_and_a_checkpoints_state_under_todays_names() -> None:
    line = {"step": 2, "train/clip_share": 0.25, "learnt": 1.0, "eval/loss": 2.0}
    assert current_figures(line) == {"step": 2, "train/clip_fraction": 0.25, "shaped_reward": 1.0, "eval/loss": 2.0}
    state = {"kl_coef": 0.05, "first": {"learnt": 1.0}, "window": {"clip_share": [1.0, 2.0]}}
    assert current_state(state) == {"kl_coef": 0.05, "first": {"shaped_reward": 1.0}, "window": {"clip_fraction": [1.0, 2.0]}}
    assert current_state({"first": None}) == {"first": None} and "learnt" in state["first"]  # type: ignore[operator]


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found, lines = as_of_today(identity_of(then), identity_of(now))
    return lines + compare(found, identity_of(now), ["a", "eval", "model", "peft", "data", "reward", "ppo"], "it")


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({"model": {"name": "x"}}, {"model": {"name": "x", "kernels": "reference"}}, []),
        ({"model": {"name": "x"}}, {"model": {"name": "x"}, "new": {"section": {"key": 1}}}, []),
        ({"model": {"name": "x"}}, {"model": {"name": "y", "kernels": "auto"}}, ["model.name was x, is now y"]),
        ({"reward": {"missing_end": 0.5}}, {"reward": {"missing_eos_penalty": 0.5}}, []),
        (
            {"reward": {"missing_end": 0.5}},
            {"reward": {"missing_eos_penalty": 1}},
            ["reward.missing_eos_penalty was 0.5, is now 1"],
        ),
        ({"reward": {"function": "posttrain.rules:x"}}, {"reward": {"function": "posttrain.rewards:x"}}, []),
        # GRPO was PPO's loss, with KL among the rewards of a group
        ({"ppo": {"advantage": "gae", "clip": 0.2}}, {"ppo": {"advantage": "gae", "clip": 0.2, "loss": "ppo"}}, []),
        (
            {"ppo": {"advantage": "grpo", "clip": 0.2}},
            {"ppo": {"advantage": "grpo", "clip": 0.2, "loss": "grpo", "kl_in": "loss"}},
            ["ppo.kl_in was reward, is now loss", "ppo.loss was ppo, is now grpo"],
        ),
        # what is below a null, or is the user's own word, has changed
        ({"eval": {"sets": None}}, {"eval": {"sets": {"a": "f"}}}, ["eval.sets.a was None, is now f"]),
        ({"eval": {"sets": {"a": "f"}}}, {"eval": {"sets": {"a": "f", "b": "g"}}}, ["eval.sets.b was None, is now g"]),
        ({"data": {"sources": None}}, {"data": {"sources": {"a": {"path": "f"}}}}, ["data.sources.a.path was None, is now f"]),
        # what is gone was there
        ({"peft": {"r": 4, "method": "lora"}}, {"peft": {"method": "lora"}}, ["peft.r was 4, is now None"]),
    ],
)
def test_what_is_a_change_and_what_only_came_later(then: dict[str, Any], now: dict[str, Any], lines: list[str]) -> None:
    assert changes(then, now) == lines


def test_names_of_data_that_cannot_be_compared() -> None:
    old, new, other = ({"data.content": value} for value in ("be65", "sha256:12", "sha256:34"))
    found, lines = as_of_today(old, new)
    assert found == new and lines == [
        "data.content was be65, which names the rows and an earlier version's code together: whether the rows are the same "
        "cannot be told"
    ]
    assert as_of_today(other, new) == (other, [])
    pictures = {"data.content": "cd87"}  # of their files alone, then and now
    assert as_of_today(old, pictures) == (old, [])
    assert as_of_today({"dpo.reference": "a"}, {"dpo.reference": "b"}) == ({"dpo.reference": "a"}, [])


def test_parameters_under_todays_names() -> None:
    assert current_parameter("module.model.layers.0.weight") == "model.layers.0.weight"
    assert current_parameter("model.module.weight") == "model.module.weight"
