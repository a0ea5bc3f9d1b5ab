"""The command line: quick, in the user's words, and with the exit codes that scripts rely on."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app, every, main
from posttrain.config.stages import config_classes
from posttrain.stages.spec import spec_of, stages

STAGES = list(stages())
BIN = Path(sys.executable).parent
runner = CliRunner()


def invoke(*words: str) -> tuple[int, str]:
    result = runner.invoke(app, list(words), env={"COLUMNS": "120", "TERM": "dumb"})
    return result.exit_code, result.output


def test_every_stage_has_a_runner_and_a_config() -> None:
    assert STAGES == ["cpt", "sft", "rm", "ppo", "dpo", "dreambooth"]  # as a chain has them, pictures last
    assert set(config_classes()) == set(STAGES)
    assert all(importlib.util.find_spec(spec.steps.partition(":")[0]) for spec in stages().values())


def test_help_is_there_at_once_and_loads_nothing() -> None:
    code = (
        "import sys; from posttrain.cli import main; sys.argv = ['posttrain', '--help']\ntry: main()\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in ('torch', 'hydra', 'transformers', 'pydantic', 'matplotlib') if m in sys.modules])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent = time.monotonic() - began
    assert done.stdout.strip().splitlines()[-1] == "[]"
    best = spent
    for _ in range(4):  # a busy machine may be slow once, not five times
        began = time.monotonic()
        subprocess.run([BIN / "posttrain", "--help"], capture_output=True, check=True)
        best = min(best, time.monotonic() - began)
    assert best < 0.5


def test_help_names_stages_and_the_way_on() -> None:
    code, text = invoke("--help")
    assert code == 0
    for word in (*STAGES, "run", "report", "doctor", "+peft=qlora", "python_expert"):
        assert word in text


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_help_names_its_main_settings_with_examples(stage: str) -> None:
    code, text = invoke(stage, "--help")
    assert code == 0
    data = "data.instance_dir=" if stage == "dreambooth" else "data.path="
    for word in ("model=", "+peft=qlora", data, "optim.lr", "train.max_steps", "run.dir", "init=", f"posttrain {stage} "):
        assert word in text
    heads = [line.strip() for line in text.splitlines()]
    assert [head for head in heads if head in ("Model", "Method", "Data", "Training", "Run", "Examples")] == [
        "Model", "Method", "Data", "Training", "Run", "Examples",
    ]  # fmt: skip
    assert (
        text.index("\n Model")
        < text.index("model=")
        < text.index("\n Method")
        < text.index("quant" if stage != "dreambooth" else "+peft")
    )
    assert stage != "sft" or "eval.generate.metrics=[f1]" in text  # Rich would take it for a style


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_that_help_names_exist(stage: str) -> None:
    """A setting in the help that no config has would be a lie."""
    import re

    from posttrain.config.compose import compose_run
    from posttrain.runs.identity import flatten

    pictures = ["data.instance_dir=photos", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"]
    given = {"ppo": ["init_reward=runs/rm/RUN"], "dreambooth": pictures}.get(stage, [])
    known = set(flatten(compose_run(stage, ["+peft=lora", *given])))
    for key, meaning in spec_of(stage).settings:
        for named in re.findall(r"\b(?:peft|data|optim|train|run)(?:\.\w+)+", f"{key} {meaning}"):
            assert named in known


@pytest.mark.parametrize("stage", STAGES)
def test_the_values_that_help_names_are_the_defaults_and_its_examples_compose(stage: str) -> None:
    import shlex

    from posttrain.config.compose import compose_run, expand
    from posttrain.stages.spec import usual_rates

    given = {
        "ppo": ["init_reward=runs/rm/RUN"],
        "dreambooth": ["data.instance_dir=p", "data.instance_prompt=a", "data.class_prompt=b"],
    }
    words = given.get(stage, [])
    named = [key for key, _ in spec_of(stage).settings if not key.startswith("+") and not key.rpartition("=")[2].isupper()]
    usual = compose_run(stage, words)
    assert compose_run(stage, [*words, *named]) == usual and len(named) >= 5
    rates = (compose_run(stage, [*words, "peft=lora"])["optim"]["lr"], usual["optim"]["lr"])
    assert usual_rates(stage) == pytest.approx(rates)
    assert f"optim.lr={rates[0]:.6g}".replace("e-0", "e-") in invoke(stage, "--help")[1]
    for example in spec_of(stage).examples:
        job = expand(stage, [word for word in shlex.split(example) if word != "-m"])[0]
        assert compose_run(stage, job)["stage"] == stage


def test_cfg_prints_what_would_run_and_info_where_it_comes_from() -> None:
    code, text = invoke("sft", "+peft=qlora", "--cfg", "job", "peft.r=4")
    config = yaml.safe_load(text)
    assert code == 0 and config["peft"]["r"] == 4 and config["quant"]["method"] == "nf4" and "hydra" not in config
    code, text = invoke("sft", "--info", "defaults", "+peft=qlora")
    assert code == 0 and "peft/qlora.yaml -> peft" in text and "quant/nf4.yaml -> quant" in text


def test_flags_and_overrides_come_in_any_order() -> None:
    texts = {invoke(*words)[1] for words in (("sft", "--cfg", "job", "+peft=lora"), ("sft", "+peft=lora", "--cfg", "job"))}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sft", "--cfg", "jobb"), "--cfg: there is no 'jobb' - did you mean 'job'?"),
        (("sft", "+peftt=qlora"), "unknown key 'peftt' - did you mean 'peft'?"),
        (("sft", "optim.lrr=1"), "unknown key 'optim.lrr' - did you mean 'optim.lr'?"),
        (("sft", "peft=qlorra"), "did you mean 'qlora'?"),
        (("sft", "--config-dir", "/nowhere"), "--config-dir: /nowhere is no directory"),
        (("run", "python_exper"), "python_expert"),
        (("run",), "give a recipe: best_of_n, iterative_dpo, python_expert, "),
    ],
)
def test_bad_words_are_one_line_and_exit_2(words: tuple[str, ...], message: str) -> None:
    done = subprocess.run([BIN / "posttrain", *words], capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("error: ")


@pytest.mark.parametrize("stage", STAGES)
def test_no_word_at_all_runs_the_defaults(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[object] = []
    monkeypatch.setattr("posttrain.config.compose.compose_run", lambda *words: composed.append(words))
    monkeypatch.setattr("posttrain.launch.worker.run_config", lambda cfg, **_: None)
    assert invoke(stage) == (0, "") and composed == [(stage, [], None)]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("sf", ["sft"]), ("sft +peft=ql", ["+peft=qlora"]), ("dpo dpo.be", ["dpo.beta="]), ("run py", ["python_expert"])],
)
def test_a_tab_offers_what_goes_on(typed: str, offered: list[str]) -> None:
    words = {"_POSTTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": f"posttrain {typed}", "COMP_CWORD": str(len(typed.split()))}
    assert runner.invoke(app, [], prog_name="posttrain", env=words).output.split() == offered


def test_an_unknown_command_or_flag_is_refused() -> None:
    assert invoke("sftt")[0] == 2
    assert invoke("sft", "--bogus")[0] == 2


def test_own_config_groups_shadow_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    shipped = yaml.safe_load(invoke("sft", "--cfg", "job")[1])["optim"]
    (tmp_path / "optim" / "adamw.yaml").write_text(yaml.safe_dump({**shipped, "lr": 0.125}))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "short.yaml").write_text("# @package _global_\ntrain:\n  max_steps: 3\n")
    code, text = invoke("sft", "--config-dir", str(tmp_path), "--cfg", "job", "experiment=short")
    config = yaml.safe_load(text)
    assert code == 0 and config["optim"]["lr"] == 0.125 and config["train"]["max_steps"] == 3


@pytest.mark.slow
def test_the_command_and_the_function_do_the_same(tmp_path: Path) -> None:
    """`posttrain sft ...` in a process of its own leaves the very weights that `posttrain.run` leaves."""
    import posttrain

    words = ["model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=2"]
    done = subprocess.run(
        [BIN / "posttrain", "sft", *words, f"run.dir={tmp_path}/a"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "a" / "adapter") in done.stdout.replace("\n", "")
    manifest = posttrain.run("sft", *words, f"run.dir={tmp_path}/b")
    there = json.loads((tmp_path / "a" / "manifest.json").read_text())
    name = "adapter/adapter_model.safetensors"
    assert there["files"][name] == manifest["files"][name]
    assert manifest == json.loads((tmp_path / "b" / "manifest.json").read_text())


@pytest.mark.parametrize("module", ["SPEC = 3\n", "raise RuntimeError('boom')\n", "def (\n"])
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("sft", "model=tiny")])
def test_a_stage_of_others_that_is_broken_is_one_line(module: str, words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "broken_stage.py").write_text(module)
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.stages]\nmine = broken_stage\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "posttrain", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == ""
    assert done.stderr.startswith("error: stage 'mine': broken_stage cannot be used (")


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(130)])
def test_ctrl_c_while_the_words_are_read_is_a_line_too(
    raised: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise raised

    monkeypatch.setattr(every, "app", app)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75 and capsys.readouterr().err == "stopped: interrupted before anything was trained\n"
