"""Files of settings as editors, shells and other programs write them, several at once, and what is said of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError


def file(folder: Path, text: str | bytes, name: str = "my.yaml") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return f"--config={folder / name}"


def shown(*words: str) -> tuple[int, Any]:
    found = CliRunner().invoke(app, ["sft", *words, "--cfg", "job"])
    return found.exit_code, yaml.safe_load(found.stdout) if found.exit_code == 0 else found.output


def test_several_files_are_laid_over_each_other(tmp_path: Path) -> None:
    file(tmp_path, "model: tiny\ntrain: {max_length: 64, max_steps: 3}\npeft: lora\npeft.r: 4\n", "a.yaml")
    file(tmp_path, "peft: qlora\npeft.alpha: 4\ntrain.max_steps: 5\n", "b.yaml")
    given = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    code, found = shown(*given, "train.seed=7")
    assert code == 0
    assert found == compose_run(
        "sft", ["model=tiny", "train.max_length=64", "train.max_steps=5", "peft=qlora", "peft.alpha=4", "train.seed=7"]
    )
    code, found = shown(*given, "peft=dora")
    assert (found["peft"]["method"], found["peft"]["alpha"], found["train"]["max_steps"]) == ("dora", 32, 5)


def test_what_is_wrong_is_looked_for_in_the_file_that_wins(tmp_path: Path) -> None:
    given = [file(tmp_path, "optim.lr: 1\n", "a.yaml"), file(tmp_path, "\noptim.lr: -1\n", "b.yaml")]
    with pytest.raises(UserError, match=r"b.yaml, line 2\)$"):
        compose_run("sft", given)


def test_a_whole_config_comes_first(tmp_path: Path) -> None:
    run = file(tmp_path, yaml.safe_dump(compose_run("sft", ["model=tiny"])), "config.yaml")
    mine = file(tmp_path, "train.seed: 7\n")
    assert compose_run("sft", [run, mine])["train"]["seed"] == 7
    with pytest.raises(UserError, match=r"config.yaml holds every key, so it comes first: --config \S+config.yaml --config"):
        compose_run("sft", [mine, run])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("cot.marker: yes\n", "cot.marker", "yes"),
        ("cot.marker: 12:00:00\n", "cot.marker", "12:00:00"),  # no number of seconds
        ("model.revision: 0123456\n", "model.revision", "0123456"),  # no octal number
        ("train.seed: 010\n", "train.seed", 10),
        ("train.max_steps: 1_000\n", "train.max_steps", 1000),
        ("train: {fsdp: off, processes: 1}\n", "train.fsdp", False),
        ("data.dedupe: 'none'\ndata.on_error: skip\n", "data.on_error", "skip"),
        ("track.tags: [on, 2026-11-27, 2026-11-27T10:00:00Z]\n", "track.tags", ["on", "2026-11-27", "2026-11-27T10:00:00Z"]),
        ("optim.lr: '1e-4'\n", "optim.lr", 1e-4),
        ("optim.lr: 1.e-4\n", "optim.lr", 1e-4),
        ("optim.lr: +.5\n", "optim.lr", 0.5),
        ("{\n\t\"train\": {\n\t\t\"seed\": 7\n\t}\n}\n", "train.seed", 7),  # JSON with tabs
        (b"\xef\xbb\xbftrain.seed: 7\r\nmodel: tiny\r\n", "train.seed", 7),
        ("train.seed: 7\t# why\n", "train.seed", 7),
    ],
)  # fmt: skip
def test_a_value_is_what_it_looks_like(tmp_path: Path, text: str | bytes, key: str, value: Any) -> None:
    found = typed_config(compose_run("sft", [file(tmp_path, text)]))
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n\tseed: 7\n", r"my.yaml cannot be read \(line 2 begins with a tab; YAML is indented with spaces\)$"),
        ("train.seed: 7\n".encode("utf-16"), r"my.yaml cannot be read \(it is in UTF-16; save it as UTF-8\)$"),
        (b"\xaf\xfe\x00", r"my.yaml cannot be read \(it is no text in UTF-8\)$"),
        ("model.revision: 1234567\n", r"model.revision: input should be a valid string \(got 1234567\); put it in quotes \("),
        ("track.tags: [1.10]\n", r"track.tags.0: input should be a valid string \(got 1.1\); put it in quotes \("),
        ("train.seed: ${oc.env:NO_SUCH}\n", r"^train.seed: the environment variable NO_SUCH is not set \(\S+my.yaml, line 1\)$"),
        ("train.seed: ${train.sed}\n", r"^train.seed: there is no setting train.sed, which it names \(\S+my.yaml, line 1\)$"),
        ("run.dir: 'a${b'\n", r"^run.dir='a\$\{b' cannot be taken: a \$\{ names another setting, and ends with \} \("),
        ("tracker: no\n", r"^tracker: input should be 'none', .* \(got 'no'\) \("),
        ("peft: no\n", r"^peft: there is no 'no'"),
        ("weights.gamma: .inf\n", r"^weights.gamma: input should be a finite number \(got inf\) \("),
        ("optim.weight_decay: .nan\n", r"^optim.weight_decay: .*finite number"),
    ],
)
def test_what_is_said_of_it(tmp_path: Path, text: str | bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(UserError, match=said) as error:
        compose_run("sft", [file(tmp_path, text)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.path=[]"], r"^data.path: the list is empty; give files"),
        (["data.path=a.jsonl", "data.eval_path=[]"], r"^data.eval_path: the list is empty"),
        (["data.path=[a.jsonl,builtin:questions]"], r"^data.path: builtin:questions stands alone"),
        (["data.path=a.jsonl,b.jsonl"], r"^data.path: a.jsonl,b.jsonl is several values; write \[a.jsonl,b.jsonl\] for a list"),
    ],
)
def test_a_list_names_its_field(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_run("sft", words)
