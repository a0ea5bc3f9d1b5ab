"""What `--config FILE` says is what the same words would say, and the command line has the last word."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config.compose import compose_run, expand, opened, parse, quoted
from posttrain.config.files import as_value
from posttrain.errors import UserError
from posttrain.runs.identity import digest, flatten


def file(folder: Path, text: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(text)
    return f"--config={folder / name}"


SAID = [
    ("peft: qlora\noptim.lr: 1e-4\ntrain.max_steps: 5\n", ["peft=qlora", "optim.lr=1e-4", "train.max_steps=5"]),
    ("peft:\n  method: lora\n  r: 8\n  targets: [q_proj, v_proj]\n", ["peft=lora", "peft.r=8", "peft.targets=[q_proj,v_proj]"]),
    ("peft: {r: 8, method: qlora}\nquant: none\n", ["peft=qlora", "peft.r=8", "quant=none"]),
    ("optim: {name: adamw_8bit, betas: [0.9, 0.95]}\n", ["optim=adamw_8bit", "optim.betas=[0.9,0.95]"]),
    ("model: tiny\ndata:\n  path: 'a b,c=d.jsonl'\n  max_rows: 10\n", ["model=tiny", "data.path='a b,c=d.jsonl'",
                                                                                       "data.max_rows=10"]),
    ("model.name: org/name\ndata: gsm8k\n", ["model.name=org/name", "data=gsm8k"]),
    ("data.columns: {prompt: question}\neval: {sets: {mine: m.jsonl}}\n", ["+data.columns.prompt=question",
                                                                                    "+eval.sets.mine=m.jsonl"]),
    ("data.template_kwargs:\n  enable_thinking: false\n", ["data.template_kwargs.enable_thinking=false"]),
    ("cot.marker: '####'\nrun: {dir: runs/x}\npeft: null\n", ["cot.marker='####'", "run.dir=runs/x", "peft=none"]),
    ("stage: sft\n", []),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), SAID)
def test_a_file_says_what_its_words_say(tmp_path: Path, text: str, words: list[str]) -> None:
    assert compose_run("sft", [file(tmp_path, text)]) == compose_run("sft", words)


def test_the_command_line_wins_over_the_file_in_either_order(tmp_path: Path) -> None:
    given = file(tmp_path, "peft: {method: lora, r: 8}\noptim.lr: 1e-3\n")
    for words in ([given, "optim.lr=1e-5"], ["optim.lr=1e-5", given]):
        found = compose_run("sft", words)
        assert (found["optim"]["lr"], found["peft"]["r"]) == (1e-5, 8)


def test_a_group_of_the_command_line_replaces_the_files(tmp_path: Path, capsys: Any) -> None:
    given = file(tmp_path, "peft: {method: lora, r: 8}\nmodel.name: org/name\noptim.lr: 1e-3\n")
    assert compose_run("sft", [given, "peft=none", "model=tiny"]) == compose_run("sft", ["optim.lr=1e-3", "model=tiny"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the command line chooses instead of peft=lora, peft.r=8, model.name='org/name'" in said


WHOLE = [
    ("sft", ["+peft=qlora", "model=tiny", "train.max_steps=3", "run.dir=runs/x", "track.id=abc"]),
    ("sft", ["data=gsm8k", "cot.marker='####'", "eval.sets.mine=a.jsonl", "~eval.sets.general"]),
    ("sft", ["data=mix", "data.sources.a.path=a.jsonl", "data.sources.a.share=1", "data.alpha=null"]),
    ("dpo", ["dpo.loss={sigmoid: 0.8, sft: 0.2}", "+peft=dora", "quant=none", "optim=adamw_8bit"]),
    ("ppo", ["ppo.advantage=grpo", "ppo.samples=4", "reward.function=length", "reward.options.length.at_most=50"]),
    ("dreambooth", ["data.instance_dir=p", "data.instance_prompt='a sks, dog'", "data.class_prompt=a dog"]),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "words"), WHOLE)
def test_a_runs_config_is_the_same_run_again_in_a_new_directory(tmp_path: Path, stage: str, words: list[str]) -> None:
    config = compose_run(stage, words)
    given = file(tmp_path, yaml.safe_dump(config, sort_keys=False), "config.yaml")
    again = compose_run(stage, [given])
    assert digest(again) == digest(config)
    assert again["run"]["dir"] is None and again["track"]["id"] is None
    changed = compose_run(stage, [given, "optim.weight_decay=0.125"])
    assert {key for key, value in flatten(changed).items() if flatten(again)[key] != value} == {"optim.weight_decay"}


def test_what_follows_from_a_runs_choices_follows_a_new_choice(tmp_path: Path) -> None:
    given = file(tmp_path, yaml.safe_dump(compose_run("sft", ["+peft=qlora", "train.epochs=3"])))
    assert digest(compose_run("sft", [given, "peft=none"])) == digest(compose_run("sft", ["train.epochs=3"]))


BAD = [
    ("optim:\n  lrr: 1\n", "unknown key 'optim.lrr' - did you mean 'optim.lr'?", 2),
    ("train.epochs: 1\noptim.eps: -1\n", "optim.eps: input should be greater than 0 (got -1)", 2),
    ("peft: qlorra\n", "peft: there is no 'qlorra' - did you mean 'qlora'?", 1),
    ("peft.r: 8\n", "peft.r does not belong to the chosen peft; it needs +peft=lora", 1),
    ("model: tiny\n\nquant: nf4\n", "quant=nf4 cannot be trained in full", 3),
    ("stage: dpo\n", "stage: ", 1),
    ("defaults: [x]\n", "defaults is Hydra's", 1),
    ("hydra/launcher: local\n", "hydra/launcher is Hydra's", 1),
    ("model.trust_remote_code: true\nmodel.revision: " + "a" * 40 + "\n", "model.trust_remote_code: True has code run", 1),
    ("reward.function: os:system\n", "unknown key 'reward.function'", 1),
    ("optim.lr: 1\noptim: {lr: 2}\n", "optim.lr stands twice", 1),
    ("- optim.lr\n", "holds no settings", 0),
    ("optim.lr: [1\n", "cannot be read", 0),
    ("optim.lr 1\n", "holds no settings", 0),
    ("run.dir: '${oc.env:PATH}x'\noptim.foo: '${a'\n", "optim.foo", 2),
]


@pytest.mark.parametrize(("text", "said", "line"), BAD)
def test_what_is_wrong_is_said_with_the_line(tmp_path: Path, text: str, said: str, line: int) -> None:
    with pytest.raises(UserError) as error:
        compose_run("sft", [file(tmp_path, text)])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not line or any(f"{where}{line}" in str(error.value) for where in ("my.yaml, line ", "my.yaml, lines ", "(line "))


@pytest.mark.parametrize("word", ["my.yaml", "@my.yml", "runs/x/args.json"])
def test_a_file_among_the_words_gets_a_pointer(word: str) -> None:
    with pytest.raises(UserError, match=f"is no setting; a file of settings is given as --config {word.lstrip('@')}$"):
        compose_run("sft", [word])


def test_the_option_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("peft: lora\npeft.r: 8\n")
    words = ["sft", "--config", str(tmp_path / "my.yaml"), "peft.alpha=8", "--cfg", "job"]
    found = CliRunner().invoke(app, words)
    assert yaml.safe_load(found.output)["peft"] == compose_run("sft", ["peft=lora", "peft.r=8", "peft.alpha=8"])["peft"]


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml cannot be read \(No such file"):
        compose_run("sft", [f"--config={tmp_path}/none.yaml"])
    with pytest.raises(UserError, match=r"is a directory; name a file in it, such as .*config.yaml"):
        compose_run("sft", [f"--config={tmp_path}"])


def test_a_file_has_no_say_over_code_and_the_users_own_words_do(tmp_path: Path) -> None:
    given = file(tmp_path, "model.name: org/name\nmodel.trust_remote_code: true\nmodel.revision: " + "a" * 40 + "\n")
    own = ["model.trust_remote_code=true", f"model.revision={'b' * 40}"]
    assert compose_run("sft", [given, *own])["model"]["revision"] == "b" * 40
    with pytest.raises(UserError, match="has code run"):
        compose_run("sft", [given, own[1]])
    for job in expand("sft", [given, "optim.lr=1e-4,1e-5"]):  # nor through a sweep, whose jobs are words again
        with pytest.raises(UserError, match="has code run"):
            compose_run("sft", job)


def test_a_sweep_over_a_file(tmp_path: Path) -> None:
    jobs = expand("sft", [file(tmp_path, "peft: lora\noptim.lr: 1e-3\n"), "peft.r=4,8"])
    found = [compose_run("sft", job) for job in jobs]
    assert [(each["peft"]["r"], each["optim"]["lr"]) for each in found] == [(4, 1e-3), (8, 1e-3)]


TEXTS = ["", "a b", "it's", "x\\", "\\'", "a\\b", ".*\\.(q|v)_proj", "null", "1", "a,b", "{", "l1\nl2", 'q"', "#", "é=", "~"]
OTHERS: list[Any] = [1, 1e-05, -2.5, 1e300, None, True, [], {}, ["a,b", "'"], {"a b:c": [1, {"x.y": None}]}]


@pytest.mark.parametrize("value", TEXTS + OTHERS, ids=repr)
def test_a_value_is_read_as_it_was_written(value: Any) -> None:
    with opened(None) as hydra:
        read = parse(hydra, f"a={as_value(value)}")
        assert read is not None
        assert json.dumps(read.value()) == json.dumps(value)


def test_a_backslash_on_the_command_line_stays_one() -> None:
    with opened(None) as hydra:
        line = quoted(hydra, r"peft.targets=.*\.(q|v)_proj$")
        read = parse(hydra, line)
        assert read is not None and read.value() == r".*\.(q|v)_proj$"


def test_the_pages_commands_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of docs/config-files.md, with its own example in place."""
    page = (Path(__file__).parents[2] / "docs" / "config-files.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    (tmp_path / "team.yaml").write_text("peft: dora\n")
    run = re.search(r"runs/sft/\S+/config.yaml", page)
    assert run
    Path(run[0]).parent.mkdir(parents=True)
    Path(run[0]).write_text(yaml.safe_dump(compose_run("sft", ["peft=lora"])))
    commands = [shlex.split(line, comments=True)[1:] for line in page.splitlines() if "--config" in line and line[:4] == "    "]
    assert len(commands) == 10
    for words in commands:
        words = words[words.index("sft") + 1 :]
        files = [f"--config={after}" for word, after in pairwise(words) if word == "--config"]
        given = [*files, *(word for word in words if re.match(r"[\w.]+=", word))]
        for job in expand("sft", given):
            assert compose_run("sft", job)["peft"]["method"] in ("lora", "qlora")
