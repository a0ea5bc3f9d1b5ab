"""Every `posttrain ...` in README, docs and examples is a command that there is, and composes. Those of the walks are run, in
test_first_hour.py and test_plugin_template.py."""

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from posttrain.cli import app
from posttrain.config.compose import compose_run, expand
from posttrain.launch.recipe import load_recipe
from posttrain.stages.spec import stages

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (*sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("*.md")) if path.name != "CHANGELOG.md"]
PLUGIN = {"half", "focal", "[polite]"}  # of examples/plugin, which is not installed here
WITH_STAGE = {"plan", "preview", "verify-resume", "tune", "new"}
NEEDED = {
    "ppo": ["reward.function=length"],
    "dreambooth": ["data.instance_dir=p", "data.instance_prompt=a", "data.class_prompt=b"],
}


def commands(text: str) -> Iterator[list[str]]:
    """Of a page: lines in code that begin with posttrain, with their comments off and the lines that go on behind a backslash."""
    text = re.sub(r" \\\n\s*", " ", text)
    loops = dict(re.findall(r"for (\w+) in ([\w.]+)", text))
    fenced = "\n".join(re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in (*re.findall(r"^ {4}(posttrain .*)", rest, re.MULTILINE), *re.findall(r"^(posttrain .*)", fenced, re.MULTILINE)):
        line = re.sub(r"\$(\w+)", lambda found: loops[found[1]], line)
        yield [word for word in shlex.split(line, comments=True)[1:] if word != ";"]


def files(text: str) -> dict[str, str]:
    """Those that a page shows, by name: "`mine/my.yaml`:" and the block behind it."""
    blocks = re.findall(r"`([\w./]+\.\w+)`:\n\n(?:```\w*\n(.*?)^```|((?: {4}[^\n]*\n)+))", text, re.MULTILINE | re.DOTALL)
    return {name: fenced or re.sub(r"^ {4}", "", indented, flags=re.MULTILINE) for name, fenced, indented in blocks}


FOUND = {
    tuple(words): path
    for path in PAGES
    for words in commands(path.read_text(encoding="utf-8"))
    if not PLUGIN.intersection(re.split(r"[ =]", " ".join(words)))
}
CASES = [pytest.param(path, list(words), id=f"{path.stem}: {' '.join(words)}"[:120]) for words, path in FOUND.items()]


@cache
def command_line() -> Any:
    return typer.main.get_command(app)


def parsed(words: list[str]) -> Any:
    """The words as the command line understands them; an error where it does not."""
    group = command_line()
    name, command, rest = group.resolve_command(typer.Context(group), words)
    return name, command.make_context(name, list(rest)).params


def test_commands_are_found_as_they_stand() -> None:
    text = "    posttrain sft a=1 \\\n      b='x y'   # why\n\n```\nposttrain plan sft\n```\n\n```python\nposttrain.run()\n```\n"
    assert list(commands(text)) == [["sft", "a=1", "b=x y"], ["plan", "sft"]]
    assert len(FOUND) > 140
    assert files("`a.yaml`:\n\n```yaml\nx: 1\n```\n\nmine `b.txt`:\n\n    one\n    two\n") == {
        "a.yaml": "x: 1\n",
        "b.txt": "one\ntwo\n",
    }


def test_every_command_is_one() -> None:
    """Its name, its options and their values."""
    wrong = []
    for words, path in FOUND.items():
        try:
            parsed(list(words))
        except (typer.Exit, SystemExit):
            pass
        except Exception as error:
            wrong.append(f"{path.name}: {' '.join(words)}: {error}")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize(("page", "words"), [case for case in CASES if "commands:" not in str(case.id)])  # those test_cli.py has
def test_its_settings_compose(page: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked against config and schema as a run is before it reads anything."""
    monkeypatch.chdir(tmp_path)
    for name, text in files(page.read_text(encoding="utf-8")).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    name, params = parsed([re.sub(r"^init=\w+://", "init=", word) for word in words])  # nothing is fetched here
    configs = params.get("config") or []
    for config in configs:
        if not config.is_file():  # of a run
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text("train.max_steps: 3\n")
    said = [*(f"--config={config}" for config in configs), *(params.get("overrides") or params.get("words") or [])]
    if name == "run" and params["name"]:
        for step in load_recipe(params["name"], said).steps:
            if step.stage in stages():
                compose_run(step.stage, [*step.overrides, *own_words(step.stage, step.said)])
    elif name in stages() or name in WITH_STAGE:
        stage = name if name in stages() else params["stage"]
        sets = expand(stage, said, params.get("config_dir")) if params.get("multirun") else [said]
        for each in sets[:: 1 + len(sets) // 6]:
            compose_run(stage, own_words(stage, each), params.get("config_dir"))
    elif name in ("eval", "chat", "generate"):
        from posttrain.commands.evaluate import KEYS
        from posttrain.commands.generate import KEYS as OF_ANSWERS
        from posttrain.commands.words import runs_and_settings

        assert runs_and_settings(params["words"], {"eval": KEYS, "generate": OF_ANSWERS}.get(name, ()))[0]


def own_words(stage: str, words: Any) -> list[str]:
    """With what a line that shows one setting leaves out."""
    given = {word.lstrip("+").partition("=")[0] for word in words}
    needed = NEEDED.get(stage, [])
    if stage == "ppo" and given & {"init_reward", "reward.function"}:
        needed = []
    return [*(word for word in needed if word.partition("=")[0] not in given), *words]
