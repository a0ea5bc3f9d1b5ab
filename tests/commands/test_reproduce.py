"""`reproduce` and `verify-resume`: what agrees, what does not and by how much, and what differs before anything is run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.commands.compare_runs import compare_runs, tensors_agree
from posttrain.commands.reproduce import reproduce
from posttrain.commands.verify_resume import verify_resume
from posttrain.errors import RunError, UserError
from posttrain.launch.exit_codes import guarded
from posttrain.launch.worker import run_config

ROWS = [f"question {i} has {i * i} words" for i in range(30)]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own would spend its time importing."""

    def run_child(config: dict[str, Any], what: str) -> int:
        return guarded(lambda: run_config(config))

    monkeypatch.setattr("posttrain.commands.reproduce.run_child", run_child)
    monkeypatch.setattr("posttrain.commands.verify_resume.run_child", run_child)


def write_rows(home: Path, texts: list[str]) -> Path:
    rows = ([{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in texts)
    path = home / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))
    return path


def settings(home: Path) -> list[str]:
    return ["model=tiny", "+peft=lora", "peft.r=4", f"data.path={write_rows(home, ROWS)}", "eval.rows=1", "data.eval_rows=2"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    posttrain.run("sft", *settings(tmp_path), "train.max_steps=4", f"run.dir={tmp_path / 'run'}")
    return tmp_path / "run"


def test_a_run_is_rebuilt_bit_for_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reproduce(run, None)
    assert [each.part for each in found] == ["weights", "optimizer", "data order", "figures"]
    assert all(each.same for each in found)
    said = capsys.readouterr().out
    assert "code, libraries, data, base and device are those of the run that is rebuilt" in said
    assert (run.with_name("run-again") / "manifest.json").exists()


def test_a_run_is_not_compared_with_what_was_there_before(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out: .*run holds the run itself; name a directory that is not there"):
        reproduce(run, run)
    posttrain.run("sft", *settings(tmp_path), "train.max_steps=4", f"run.dir={tmp_path / 'other'}")
    with pytest.raises(UserError, match=r"--out: .*other holds another run"):
        reproduce(run, tmp_path / "other")


def test_what_differs_is_said_first_and_the_result_after(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(run.parent, [*ROWS[:-1], "another one"])
    versions = {**posttrain.runs.identity.library_versions(), "transformers": "99.1"}  # type: ignore[attr-defined]
    monkeypatch.setattr("posttrain.stages.resume.library_versions", lambda: versions)
    with pytest.raises(RunError, match=r"does not agree with .*weights"):
        reproduce(run, run.with_name("again"))
    said = capsys.readouterr().out
    data, library, began = (said.index(words) for words in ("data.content was", "transformers was", "training 18,496 of"))
    assert max(data, library) < began < said.index("tensors differ, by up to")


def test_a_config_that_was_changed_cannot_be_rebuilt_from(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 42", "seed: 43"))
    with pytest.raises(UserError, match="not the config that the manifest was written for"):
        reproduce(run, None)
    with pytest.raises(UserError, match="no finished run"):
        reproduce(run.parent / "nothing", None)


def test_a_stop_changes_nothing_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_resume("sft", [*settings(tmp_path), "peft.dropout=0.1", f"run.dir={tmp_path / 'verify'}"], steps=4)
    assert all(each.same for each in found) and len(found) == 4
    said = capsys.readouterr().out
    assert "going on from step 2 of 4" in said and "a stop changes nothing" in said
    assert not list((tmp_path / "verify").iterdir())


def test_a_resume_that_is_not_exact_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that forgets one moment of the optimizer, as many a trainer's does."""
    import posttrain.training.loop_parts as loop

    restore = loop.restore

    def forgets(checkpoint: Any, module: Any, optimizer: Any, *more: Any) -> None:
        restore(checkpoint, module, optimizer, *more)
        next(iter(optimizer.state.values()))["exp_avg"].zero_()

    monkeypatch.setattr(loop, "restore", forgets)
    with pytest.raises(RunError, match="weights, optimizer, figures not the same after a stop"):
        verify_resume("sft", [*settings(tmp_path), f"run.dir={tmp_path / 'verify'}", "optim.lr=1e-2"], steps=4)


def test_by_how_much_tensors_differ() -> None:
    first = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert tensors_agree("weights", first, first).text == "bit for bit the same (2 tensors)"
    second = {"a": torch.tensor([0.0, 0.5, -2.0]), "b": torch.ones(2)}
    found = tensors_agree("weights", first, second)
    assert not found.same and found.text == "1 of 2 tensors differ, by up to 2 (a)"
    assert "b (and 0 more) is not in both" in tensors_agree("weights", first, {"a": torch.zeros(3)}).text


def test_runs_that_are_compared_by_hand(run: Path) -> None:
    other = run.with_name("other")
    reproduce(run, other)
    file = other / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] += 0.25
    save_file(tensors, file)
    weights, *rest = compare_runs(run, other)
    assert weights.text.startswith("1 of 28 tensors differ, by up to 0.25") and all(each.same for each in rest)
