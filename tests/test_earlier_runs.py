"""Runs that version 0.1.0 left open with today's code: tests/runs_of_version_0_1/README.md says how they were made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import posttrain
from posttrain.cli import app
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.merge import merge_run
from posttrain.config.compose import compose_run
from posttrain.config.stored import completed
from posttrain.errors import UserError
from posttrain.reports.run_records import read_record
from posttrain.runs.directory import read_config
from posttrain.runs.earlier import current_figures
from posttrain.runs.files import sha256
from posttrain.runs.manifest import read_manifest

COMMON = ["model.name=base", "+peft=lora", "peft.r=1", "train.batch_size=2", "train.max_steps=3", "optim.lr=0.01"]
COMMON += ["train.max_length=128", "eval.sets=null", "data.eval_rows=2"]
PPO = [*COMMON, "data.eval_rest=drop", "train.grad_accum=4", "data.path=chat.jsonl", "rollout.max_new_tokens=8", "run.dir=ppo"]
TODAY = ["reward.function=posttrain.rewards:brevity", "reward.missing_eos_penalty=0.5"]
THEN = ["reward.function=posttrain.rules:brevity", "reward.missing_end=0.5"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runs as they lay on the disk where they were made; the working directory."""
    here = shutil.copytree(Path(__file__).parent / "runs_of_version_0_1", tmp_path / "home")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(here)
    for file in here.rglob("*.json"):
        file.write_text(file.read_text(encoding="utf-8").replace("@HERE@", str(here)), encoding="utf-8")
    for run in (here / "sft", here / "dpo"):
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        there = {name: sha256(run / name) for name in manifest["files"] if (run / name).exists()}
        (run / "manifest.json").write_text(json.dumps(manifest | {"files": manifest["files"] | there}), encoding="utf-8")
    return here


def lines(file: Path) -> list[dict[str, Any]]:
    """Figures by today's names, without speeds."""
    found = [current_figures(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if "per_second" not in name} for line in found]


def assert_close(found: Path, expected: Path) -> None:
    one, two = load_file(found), load_file(expected)
    assert one.keys() == two.keys() and len(one) > 10
    for name, value in one.items():
        assert value.shape == two[name].shape and float((value.float() - two[name].float()).abs().max()) < 1e-6, name


def test_eval(home: Path) -> None:
    expected = json.loads((home / "expected" / "evaluated.json").read_text(encoding="utf-8"))
    assert evaluate_runs(["sft", "dpo"]) == {name: pytest.approx(each, abs=1e-6) for name, each in expected.items()}


@pytest.mark.usefixtures("home")
def test_chat() -> None:
    said = CliRunner().invoke(app, ["chat", "dpo", "--prompt", "What is a list?", "--temperature", "0", "--max-new-tokens", "8"])
    assert said.exit_code == 0 and said.stdout.strip()


def test_merge(home: Path) -> None:
    merge_run(Path("dpo"), home / "merged", max_kl=9.0)
    assert_close(home / "merged" / "model.safetensors", home / "expected" / "merged.safetensors")


def test_a_stage_starts_from_one(home: Path) -> None:
    manifest = posttrain.run("sft", "init=dpo", *COMMON, "data.path=chat.jsonl", "train.max_steps=1", "run.dir=next")
    assert manifest["steps"] == 1 and manifest["parents"][0]["path"] == str(home / "dpo") and manifest["chain"] == "stack"
    assert manifest["base"]["path"] == str(home / "base")


@pytest.mark.parametrize("words", [TODAY, THEN], ids=["today", "then"])
def test_an_interrupted_run_goes_on(words: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the very end that it would have come to; what cannot be compared any more is said, and stands in the manifest."""
    manifest = posttrain.run("ppo", *PPO, *words)
    assert "going on from step 2 of 3" in capsys.readouterr().out
    assert_close(home / "ppo" / "adapter" / "adapter_model.safetensors", home / "expected" / "adapter_model.safetensors")
    found, expected = lines(home / "ppo" / "metrics.jsonl"), lines(home / "expected" / "metrics.jsonl")
    assert found == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in expected]
    changes = [change["change"] for change in manifest["changes"] if change["change"].startswith("data.")]
    assert len(changes) == 1 and changes[0].startswith(
        "data.content was be65b30fc099bf4836da7ee4abd95483, which names the rows and"
    )
    assert manifest["identity"]["data.content"].startswith("sha256:")
    assert not [change for change in manifest["changes"] if change["change"].startswith(("reward", "model", "train"))]
    stored = yaml.safe_load((home / "ppo" / "config.yaml").read_text(encoding="utf-8"))
    assert stored["reward"]["missing_eos_penalty"] == 0.5 and "missing_end" not in stored["reward"]
    assert posttrain.run("ppo", *PPO, *words) == manifest, "it is finished, and stays as it is"
    curves = read_record(home / "ppo").series("train/clip_fraction")
    assert curves[0] == [1, 2, 3], "one curve, though its name has changed on the way"


@pytest.mark.usefixtures("home")
def test_a_run_that_goes_on_with_rows_that_were_left_out_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    posttrain.run("ppo", *PPO, *TODAY, "data.eval_rest=train")
    said = " ".join(capsys.readouterr().out.split())
    assert "from step 2 trains on rows beyond data.eval_rows, which the earlier version left out" in said


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("reward.missing_eos_penalty=0.25", "reward.missing_eos_penalty was 0.5, is now 0.25"),
        ("reward.function=posttrain.rewards:overlap", "reward.function was posttrain.rewards:brevity, is now"),
        ("eval.sets.more=chat.jsonl", "eval.sets.more was None, is now chat.jsonl"),
        ("optim.lr=0.02", "optim.lr was 0.01, is now 0.02"),
    ],
)  # fmt: skip
def test_a_setting_that_has_changed_is_still_refused(change: str, words: str) -> None:
    with pytest.raises(UserError, match="ppo belongs to another config") as found:
        posttrain.run("ppo", *PPO, *TODAY, change)
    assert words in str(found.value)


def test_rows_that_have_changed_are_refused_once_they_can_be_compared(home: Path) -> None:
    """From the first checkpoint of today's on the content itself is known."""
    posttrain.run("ppo", *PPO, *TODAY)
    (home / "ppo" / "manifest.json").unlink()
    rows = (home / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    (home / "chat.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data.content was sha256:\w+, is now sha256:\w+"):
        posttrain.run("ppo", *PPO, *TODAY)


def older(run: Path, *keys: str) -> None:
    """Takes keys out of a run's config and its checkpoints, as if they had come with a later version."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for key in keys:
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place = place[section]
        del place[last]
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


LATER = {"dropout": 0.0, "experts": True, "router": False, "init": "default", "rank_pattern": None, "alpha_pattern": None}
LATER |= {"init_rows": 64}


def test_a_key_that_came_later_has_todays_default(home: Path) -> None:
    """To evaluate, to start from, to go on, and to be a finished run."""
    for run in ("sft", "ppo"):
        older(home / run, "model.attention", "model.revision", "data.on_error", "train.spike_steps", "peft.dropout", "full_lr")
    found = completed(read_config(home / "sft"))
    assert found["model"]["attention"] == "auto" and found["train"]["spike_steps"] == 64
    assert found["peft"] == {**read_config(home / "sft")["peft"], **LATER} and found["full_lr"] == 2e-5
    assert found["eval"]["sets"] is None, "the user's own choice is no key that is lacking"
    assert set(evaluate_runs(["sft"])["sft"]) == {"eval/loss"}
    assert compose_run("sft", ["init=sft"])["model"]["attention"] == "auto"
    record = json.loads((home / "ppo" / "checkpoints" / "step-000002" / "checkpoint.json").read_text(encoding="utf-8"))
    assert "model.attention" in record["state"]["identity"]
    manifest = posttrain.run("ppo", *PPO, *TODAY)
    assert manifest["steps"] == 3 and read_config(home / "ppo", as_written=True)["model"]["attention"] == "auto"
    words = [*COMMON, "train.grad_accum=2", "train.save_steps=null", "data.path=chat.jsonl", "run.dir=sft"]
    before = sha256(home / "sft" / "config.yaml")
    assert (
        posttrain.run("sft", *words) == read_manifest(home / "sft").to_dict() and sha256(home / "sft" / "config.yaml") == before
    )


def test_pairs_of_an_earlier_run_can_be_composed(home: Path) -> None:
    said = CliRunner().invoke(app, ["compose", "sft", "dpo", "--weights", "0.5,0.5", "--out", str(home / "sum")])
    assert said.exit_code == 0, said.output
    assert read_manifest(home / "sum").sum[0]["weight"] == 0.5
