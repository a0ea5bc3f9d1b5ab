"""Settings that have code run come from the user's own words, for the content that those name."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from posttrain.commands.plan.plan import make_plan
from posttrain.commands.reproduce import reproduce
from posttrain.config.code import refuse_own_code, refuse_targets
from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.launch.recipe_runner import run_recipe
from posttrain.models.builtin import builtin_directory
from posttrain.models.language.architecture import config_of
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.trust import may_run_code
from posttrain.runs.files import code_digest
from posttrain.runs.identity import digest

EVIL = "open('EXPLODED', 'w').close()\nfrom transformers import LlamaConfig\nclass Evil(LlamaConfig):\n    model_type = 'evil'\n"


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose config is a class of its own, which leaves a file where it is imported."""
    monkeypatch.chdir(tmp_path)
    directory = shutil.copytree(builtin_directory("tiny")[0], tmp_path / "evil")
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(EVIL)
    return directory


def _run_of(directory: Path, name: str, revision: str | None) -> Path:
    """A run's directory as a stranger may have made it: its config trusts the model's code."""
    config = compose_run("sft", ["model=tiny", "train.max_steps=1"])
    config["model"] |= {"name": name, "revision": revision, "trust_remote_code": True}
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


@pytest.mark.parametrize("revision", [None, "a1" * 20, "b2" * 32])
def test_trust_is_not_inherited(revision: str | None, evil: Path, tmp_path: Path) -> None:
    """init of a foreign run whose config trusts code; also to plan."""
    run = _run_of(tmp_path / "run", str(evil), revision)
    assert compose_run("dpo", [f"init={run}"])["model"]["trust_remote_code"] is False
    with pytest.raises(UserError):
        make_plan("dpo", [f"init={run}"])
    assert not (tmp_path / "EXPLODED").exists()


def test_a_directorys_code_is_pinned_by_its_digest(evil: Path, tmp_path: Path) -> None:
    """The digest stands in the refusal; another one, a commit and a changed file are refused; the right one runs."""
    words = [f"model.name={evil}", "model.trust_remote_code=true", "model.revision=null"]
    pin = code_digest(evil)
    with pytest.raises(UserError, match=pin):
        compose_run("sft", words)
    for wrong in ("a1" * 20, "b2" * 32):
        with pytest.raises(UserError, match=rf"not the one that you have pinned; .*model.revision={pin}"):
            config_of(evil, wrong)
    assert compose_run("sft", [*words[:2], f"model.revision={pin}"])["model"]["trust_remote_code"] is True
    assert not (tmp_path / "EXPLODED").exists()
    assert config_of(evil, pin).model_type == "evil"
    assert (tmp_path / "EXPLODED").exists()
    (evil / "evil.py").write_text(EVIL + "# one more line\n")
    with pytest.raises(UserError, match="not the one that you have pinned"):
        config_of(evil, pin)


def test_a_directory_that_is_called_like_a_commit_is_no_snapshot(evil: Path, tmp_path: Path) -> None:
    commit = "a1" * 20
    place = tmp_path / "snapshots" / commit
    shutil.copytree(evil, place)
    with pytest.raises(UserError, match="not the one that you have pinned"):
        may_run_code(place, commit)


def test_code_of_another_repository_is_refused(evil: Path) -> None:
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "other/code--evil.Evil"}}))
    with pytest.raises(UserError, match=r"another repository \(other/code--evil.Evil\)"):
        may_run_code(evil, code_digest(evil))


def test_a_tokenizer_beside_an_adapter_runs_no_code(evil: Path, tmp_path: Path) -> None:
    """Its directory is a run's, and not the one that was pinned."""
    pin = code_digest(evil)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}))
    (adapter / "evil.py").write_text(EVIL + "# of the run\n")
    with pytest.raises(UserError, match="not the one that you have pinned"):
        load_tokenizer(str(adapter), None, pin, None)
    assert not (tmp_path / "EXPLODED").exists()


TRUST = ["model.name=org/model", "model.trust_remote_code=true", f"model.revision={'a1' * 20}"]


@pytest.mark.parametrize(
    ("stage", "said", "key"),
    [
        ("sft", TRUST, "model.trust_remote_code"),
        ("ppo", ["reward.function=mine:short"], "reward.function"),
        ("ppo", ["reward.function=posttrain.rewards:brevity", "reward.gold=mine:short"], "reward.gold"),
        ("rm", ["rm.policy=x", "rm.rule=mine:short"], "rm.rule"),
    ],
)
def test_a_recipe_and_an_experiment_cannot_ask_for_code(
    stage: str, said: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own words can, for all steps or one."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"

    def write(words: list[str]) -> None:
        recipe.write_text(yaml.safe_dump({"name": "r", "description": "d", "steps": {stage: {"overrides": words}}}))

    write(said)
    with pytest.raises(UserError, match=rf"step {stage}: {key}: .* has code run, which only you can ask for"):
        run_recipe(str(recipe), [], None, False, list_only=True)
    write(said[:-2] if key.startswith("model") else [])
    assert len(run_recipe(str(recipe), [f"{stage}.{word}" for word in said], None, False, list_only=True)) == 1
    experiment: Any = {}
    for word in said:
        section, _, name = word.partition("=")[0].partition(".")
        experiment.setdefault(section, {})[name] = yaml.safe_load(word.partition("=")[2])
    if stage == "ppo":
        experiment["reward"]["function"] = [experiment["reward"]["function"]]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "e.yaml").write_text("# @package _global_\n" + yaml.safe_dump(experiment))
    with pytest.raises(UserError, match=rf"{key}: .* has code run"):
        compose_run(stage, ["+experiment=e"], tmp_path / "mine")


def test_a_revision_from_a_file_pins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"name": "r", "description": "d", "steps": {"sft": {"overrides": [TRUST[0], TRUST[2]]}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"model.trust_remote_code: True has code run"):
        run_recipe("r.yaml", ["model.trust_remote_code=true"], None, False, list_only=True)


def test_what_is_reproduced_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run("ppo", ["reward.function=mine:short"])
    module = sys.modules[reproduce.__module__]
    monkeypatch.setattr(module, "read_config", lambda run, as_written=False: config)
    monkeypatch.setattr(module, "read_manifest", lambda run: SimpleNamespace(config_digest=digest(config)))
    with pytest.raises(UserError, match=r"run: reward.function=mine:short has code run"):
        reproduce(tmp_path, None)
    refuse_own_code(compose_run("ppo", ["reward.function=posttrain.rewards:brevity"]), "run", "")


@pytest.mark.parametrize(
    ("hydra", "way"),
    [
        ({"launcher": {"_target_": "os.system"}}, "hydra.launcher._target_"),
        ({"callbacks": [{"a": {"_target_": "os.system"}}]}, r"hydra.callbacks.0.a._target_"),
        ({"launcher": {"_target_": "hydra_plugins.mine.Launcher"}}, "hydra.launcher._target_"),
        ({"sweeper": {"x": [[{"_target_": "hydra._internal.utils._locate"}]]}}, "hydra.sweeper.x.0.0._target_"),
    ],
)
def test_targets_are_allowed_by_name_at_any_depth(hydra: dict[str, Any], way: str) -> None:
    with pytest.raises(UserError, match=f"^{way}: .* would be run"):
        refuse_targets(OmegaConf.create({"hydra": hydra}))
    refuse_targets(
        OmegaConf.create({"hydra": {"launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}}})
    )
