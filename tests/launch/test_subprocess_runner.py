"""Processes that we start find modules where they are installed, and not beside the data."""

import re
import subprocess
import sys
from pathlib import Path

import posttrain
from posttrain.launch.subprocess_runner import worker_command
from posttrain.rewards import load_function

ROOT = Path(posttrain.__file__).parent


def test_a_worker_runs_no_module_of_the_working_directory(tmp_path: Path) -> None:
    """random.py is imported by every library there is; the worker ends with 2 because its config is none."""
    (tmp_path / "random.py").write_text("open('EXPLODED', 'w').close()\nraise SystemExit(99)\n")
    (tmp_path / "c.yaml").write_text("stage: 5\n")
    command = worker_command("c.yaml")
    assert command[:2] == [sys.executable, "-P"]
    done = subprocess.run(
        [*command[:2], "-c", "import random, sys; print(sys.flags.safe_path)"], cwd=tmp_path, capture_output=True
    )
    assert done.stdout == b"True\n" and not (tmp_path / "EXPLODED").exists()


def test_every_python_that_we_start_is_started_so() -> None:
    """-I is all of -P and more."""
    found = {path: re.findall(r"sys\.executable(?!\)\()(.{6})", path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    places = {path.name: rest for path, rest in found.items() if rest}
    assert len(places) >= 2
    assert all(each in (', "-P"', ', "-I"') for rest in places.values() for each in rest), places


def test_a_folder_of_reward_functions_shadows_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_own_reward.py").write_text("def one(prompts, answers): return [1.0] * len(answers)\n")
    assert load_function("my_own_reward:one", "reward.function")(["p"], ["a"], [""]).tolist() == [1.0]
    assert sys.path[-1] == str(tmp_path) and sys.path[0] != str(tmp_path)
