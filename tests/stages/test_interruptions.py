"""Kills, signals and second starts, through the command line: the run that goes on is the run that was asked for."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import posttrain
from posttrain.runs.files import sha256

STAGES = {
    "sft": ("+peft=lora", "peft.dropout=0.1"),
    "dpo": ("+peft=lora",),
    "cpt": (),
}
OPTIONS = (
    "model=tiny",
    "train.max_steps=30",
    "train.batch_size=2",
    "train.save_steps=4",
    "data.max_rows=60",
    "eval.rows=2",
    "data.eval_rows=4",
)


def command(stage: str, run: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "posttrain", stage, *OPTIONS, *STAGES[stage], f"run.dir={run}", *extra]


def weights(run: Path) -> dict[str, str]:
    found = {p.name: sha256(p) for kind in ("adapter", "model") for p in (run / kind).glob("*.safetensors")}
    assert found
    return found


def start_until(words: list[str], ready: Path, pattern: str, count: int) -> subprocess.Popen[bytes]:
    """Start, and return when `ready` holds `count` entries like `pattern`."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while child.poll() is None and len(list(ready.glob(pattern))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twice_and_started_again_is_bit_identical(stage: str, tmp_path: Path) -> None:
    subprocess.run(command(stage, tmp_path / "straight"), check=True, capture_output=True)
    for kill in range(2):
        child = start_until(command(stage, tmp_path / "killed"), tmp_path / "killed" / "checkpoints", "step-*", 1 + kill)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists(), "the kills came too late to mean anything"
    ended = subprocess.run(command(stage, tmp_path / "killed"), capture_output=True, text=True)
    assert ended.returncode == 0 and "going on from step" in ended.stdout
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if 0 < s < 30] == list(range(1, 30))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_a_step_and_exits_75(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start_until(command("sft", run, "train.max_steps=20000"), run / "checkpoints", "step-*", 1)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 75, errors
    assert b"stopped by a signal after step" in errors and b"Traceback" not in errors
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / "checkpoints" / f"step-{last:06d}").is_dir()


@pytest.mark.slow
def test_a_second_process_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start_until(command("sft", run, "train.max_steps=20000"), run, "metrics.jsonl", 1)
    second = subprocess.run(command("sft", run, "train.max_steps=20000"), capture_output=True, text=True)
    child.kill()
    child.wait()
    assert second.returncode == 2 and "another process is at work" in second.stderr


@pytest.mark.slow
def test_the_same_command_without_a_directory_goes_on(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "posttrain", "sft", *OPTIONS, "+peft=lora", "train.max_steps=200"]
    child = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("runs/sft/*/checkpoints/step-*")):
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and "going on from step" in again.stdout
    assert len(list((tmp_path / "runs" / "sft").iterdir())) == 1


@pytest.mark.parametrize("every", [3, 2])  # the last step is evaluated by the loop too, or is not
def test_what_was_measured_at_the_end_is_not_written_twice(every: int, tmp_path: Path) -> None:
    """A kill between the last measurement and the manifest."""
    words = ["model=tiny", "train.max_steps=4", "train.batch_size=2", "data.max_rows=20", "eval.rows=1", "data.eval_rows=2"]
    run = tmp_path / "run"
    posttrain.run("sft", *words, f"train.eval_steps={every}", f"run.dir={run}")

    def figures() -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]

    before = figures()
    (run / "manifest.json").unlink()
    posttrain.run("sft", *words, f"train.eval_steps={every}", f"run.dir={run}")
    assert figures() == before


@pytest.mark.slow
def test_changed_rows_are_refused_on_resume(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    words = command("sft", tmp_path / "run", f"data.path={rows}", "train.max_steps=20000")
    child = start_until(words, tmp_path / "run" / "checkpoints", "step-*", 1)
    child.kill()
    child.wait()
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 41)
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 2 and "data.content was" in again.stderr
