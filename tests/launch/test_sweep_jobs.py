"""What a sweep knows of its jobs, without starting one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from hydra.types import RunMode

from posttrain.config.compose import opened
from posttrain.errors import Stopped
from posttrain.launch import sweep
from posttrain.launch.gpus import _gpu_lock
from posttrain.launch.job_rows import row_of
from posttrain.launch.subprocess_runner import PYTHON
from posttrain.launch.sweep import _requeue, _share_of_cores, _wait_for
from posttrain.training.signals import PARENT


def test_jobs_beside_each_other_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [_share_of_cores({"n_jobs": n}, 10).get("OMP_NUM_THREADS") for n in (1, 2, 4, 32, -1)]
    assert found == [None, "8", "4", "1", "1"]
    assert _share_of_cores({}, 10) == {} and _share_of_cores({"n_jobs": 8}, 2) == {"OMP_NUM_THREADS": "8"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _share_of_cores({"n_jobs": 8}, 8) == {}


@pytest.mark.parametrize(
    ("last", "status"),
    [("stopped: after step 2 of 9, saved", "stopped"), ("failed: x", "failed"), ("loss 2.1", "failed")],
)
def test_a_job_that_was_stopped_has_not_failed(last: str, status: str, tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text(f"one line\n{last}\n")
    assert row_of({"dir": str(tmp_path), "overrides": {}})["status"] == status
    job = {"dir": str(tmp_path), "overrides": {}}
    assert row_of(job, stopped=True)["status"] == ("failed" if last.startswith("failed") else "stopped")


def test_a_stopped_job_of_slurm_is_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _requeue()
    assert not (tmp_path / "asked").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    _requeue()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


def test_a_start_waits_for_a_worker_that_is_still_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.3, lock.release).start()
    began = time.monotonic()
    _wait_for(tmp_path, "[1/1]")
    assert 0.2 < time.monotonic() - began < 5 and "waits for the process" in capsys.readouterr().out
    with lock:
        monkeypatch.setattr(sweep, "PATIENCE", 0.1)
        _wait_for(tmp_path, "[1/1]")  # then the worker says whose it is


def test_a_lock_of_another_user_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert Path(_gpu_lock("0").lock_file).name == "posttrain-gpu-0.lock"
    (tmp_path / "posttrain-gpu-0.lock").touch()
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert Path(_gpu_lock("0").lock_file).name == f"posttrain-gpu-0-{user + 1}.lock"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the signal of a parent's end")
def test_a_worker_does_not_outlive_the_one_that_started_it(tmp_path: Path) -> None:
    """Its parent is killed outright, and it is stopped by SIGTERM; so it is where the parent was gone before it could ask."""
    child = (
        "import signal, time, pathlib\nfrom posttrain.training.signals import leave_with_parent\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('{tmp_path}/stopped').touch(), exit(75)))\n"
        f"leave_with_parent()\npathlib.Path('{tmp_path}/ready').touch()\ntime.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([*{PYTHON!r}, '-c', {child!r}], env={{**os.environ, '{PARENT}': str(os.getpid())}})\ntime.sleep(60)\n"
    )
    started = subprocess.Popen([*PYTHON, "-c", parent])
    _until(tmp_path / "ready")
    started.send_signal(signal.SIGKILL)
    started.wait()
    _until(tmp_path / "stopped")
    alone = subprocess.run([*PYTHON, "-c", child], env={**os.environ, PARENT: "1"}, check=False)
    assert alone.returncode == 75


def _until(file: Path) -> None:
    for _ in range(300):
        if file.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} did not come")


def test_a_signal_goes_on_to_every_job_at_work_and_no_further_one_begins(tmp_path: Path) -> None:
    folder = tmp_path / ".at_work"
    with sweep._passing_on(folder) as stop:
        with sweep._at_work(folder):
            (folder / "another_machine~1").touch()
            (folder / sweep.STOPPED).unlink(missing_ok=True)
            waits = subprocess.Popen([*PYTHON, "-c", "import time; time.sleep(60)"])
            (folder / f"{os.uname().nodename}~{waits.pid}").touch()
            os.kill(os.getpid(), signal.SIGHUP)
        assert waits.wait(10) == -signal.SIGTERM and stop.requested and (folder / sweep.STOPPED).exists()
        (folder / f"{os.uname().nodename}~{waits.pid}").unlink()
        with pytest.raises(Stopped, match="between jobs"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert not folder.exists()


@pytest.mark.parametrize(("given", "group"), [(None, "ranks"), ("mine", "mine")])
def test_jobs_are_one_group_of_their_tracker(given: str | None, group: str, tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    config = {"run": {"dir": None}, "track": {"group": given, "name": None}, "peft": {"r": 4}}
    mine = sweep.prepared_job(tmp_path / "ranks", 0, ["peft.r=4"], [["peft.r=4"], ["peft.r=8"]], config)
    written = yaml.safe_load(Path(mine["dir"]).with_suffix(".yaml").read_text())
    assert written["track"] == {"group": group, "name": None} and written["run"]["dir"] == mine["dir"]


@pytest.mark.parametrize(("word", "asked"), [([], 1), (["hydra.launcher.gpus_per_node=null"], None)])
def test_a_cluster_without_gpus_is_asked_for_none(word: list[str], asked: int | None) -> None:
    with opened(None) as hydra:
        words = ["hydra/launcher=slurm", *word]
        found = hydra.compose_config("sft", words, RunMode.MULTIRUN, with_log_configuration=False)
    assert found.hydra.launcher.gpus_per_node == asked and found.hydra.launcher.timeout_min == 2880
