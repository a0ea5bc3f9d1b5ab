"""Columns of the rows reach the reward functions, each with its own prompt's answers."""

import json
from pathlib import Path

import pytest

import posttrain
from posttrain.data.examples import build, with_columns
from posttrain.errors import UserError
from posttrain.stages.ppo.rollout import columns_of

SMALL = ("model=tiny", "+peft=lora", "peft.r=2", "train.max_steps=2", "train.batch_size=2", "eval.sets=null")
PPO = ("ppo.advantage=rloo", "ppo.samples=3", "rollout.max_new_tokens=3")


def test_each_answer_has_its_rows_columns() -> None:
    examples = with_columns(build([([1], [0.0], 7), ([2], [0.0], 9)], [(1, 1), (1, 1)]), {7: {"a": 1}, 9: {"a": 2, "b": [3]}})
    assert columns_of(examples, [1, 1, 0]) == {"a": [2, 2, 1], "b": [[3], [3], None]}


@pytest.mark.slow
def test_a_reward_of_a_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = "def worth(completions, value, prompt, **kw):\n"
    text += "    assert all(p.endswith(f' {v}') and kw['source'] for p, v in zip(prompt, value))\n    return value\n"
    Path("column_rewards.py").write_text(text + "def wants(completions, vale): return vale\n")
    for name, values in (("train", range(8)), ("held", (20, 30, 41))):
        rows = [{"prompt": f"number {v}", "value": v, "source": name} for v in values]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*SMALL, *PPO, "data.path=train.jsonl", "data.eval_path=held.jsonl"]
    with pytest.raises(UserError, match=r"column_rewards:wants asks for 'vale', .*did you mean 'value'"):
        posttrain.run("ppo", *words, "reward.function=column_rewards:wants", "run.dir=wrong")
    capsys.readouterr()
    found = posttrain.run("ppo", *words, "reward.function=column_rewards:worth", "run.dir=run")
    assert found["metrics"]["eval/reward"] == pytest.approx((20 + 30 + 41) / 3)
    assert "columns kept for the reward functions: value, source" in " ".join(capsys.readouterr().out.split())
