"""Jobs that are forked from a warm worker are what jobs in new processes are, to the bit, and do not touch each other."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from posttrain.config.compose import compose_run
from posttrain.launch import sweep, warm_worker
from posttrain.launch.subprocess_runner import worker_command
from posttrain.runs.files import sha256
from posttrain.runs.manifest import is_finished, read_manifest

TINY = ["model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=24", "data.eval_rows=4", "eval.rows=2"]
TINY += ["+peft=lora", "peft.dropout=0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2"}  # two threads: the job has a parallel region


def test_who_asks_of_what_generation_a_gpu_is_is_told_what_a_fork_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes asks as it is imported: the question would open the device in the worker, and no job could use it."""
    asked: list[int] = []
    monkeypatch.setattr(warm_worker, "_has_devices", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (asked.append(device), (8 + device, 0))[1])
    warm_worker._found_first.cache_clear()
    try:
        with warm_worker._devices_are_known():
            ways = [0, 1, torch.cuda.device(1), "cuda:1", torch.device("cuda", 1), "cuda", None]
            found = [torch.cuda.get_device_capability(way) for way in ways]
    finally:
        warm_worker._found_first.cache_clear()
    assert found == [(8, 0), (9, 0), (9, 0), (9, 0), (9, 0), (8, 0), (8, 0)] and asked == []
    assert torch.cuda.get_device_capability(1) == (9, 0) and asked == [1]
    monkeypatch.setattr(torch.cuda, "init", lambda: 1 / 0)
    assert not warm_worker._devices_serve()


@pytest.fixture(scope="module")
def warm() -> Iterator[None]:
    yield
    warm_worker.close()


def written(directory: Path, *words: str) -> Path:
    """The config of a job that will run in `directory`."""
    config = compose_run("sft", [*TINY, *words])
    directory.mkdir()
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config | {"run": config["run"] | {"dir": str(directory)}}))
    return file


def begun(file: Path, **more: str) -> warm_worker.WarmJob:
    worker = warm_worker.for_jobs_in(ENVIRONMENT | more)
    assert worker
    return worker.start(file, ENVIRONMENT | more)


def ended(job: warm_worker.WarmJob) -> tuple[int, str]:
    said = job.stdout.read().decode()
    return job.wait(), said


def words(said: str, name: str) -> list[str]:
    """Without what depends on time."""
    return [line.replace(name, "NAME") for line in said.splitlines() if " in " not in line and "  eta " not in line]


def weights(directory: Path) -> str:
    return sha256(directory / "adapter" / "adapter_model.safetensors")


def until_at_work(directory: Path) -> None:
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_bits_words_and_exit_codes_are_those_of_new_processes(warm: None, tmp_path: Path) -> None:
    """Also after a job that was refused and one of another seed: nothing of them is left."""
    files = {name: written(tmp_path / name) for name in ("fresh", "forked", "last")}
    files["seed"] = written(tmp_path / "seed", "train.seed=7")
    files["refused"] = written(tmp_path / "refused", "peft.r=9999")
    new = subprocess.run(worker_command(str(files["fresh"])), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    one = warm_worker.for_jobs_in(ENVIRONMENT)
    assert one and not warm_worker._idle.append(one)
    code, said = ended(begun(files["forked"]))
    assert code == 0 and words(said, "forked") == words(new.stdout, "fresh")
    code, said = ended(begun(files["refused"]))
    assert code == 2 and said.splitlines()[-1].startswith("error: peft.r: 9999 is above")
    assert ended(begun(files["seed"]))[0] == 0 and ended(begun(files["last"]))[0] == 0
    assert warm_worker._idle == [one]  # all of them were its
    assert weights(tmp_path / "fresh") == weights(tmp_path / "forked") == weights(tmp_path / "last") != weights(tmp_path / "seed")
    new, found = (read_manifest(tmp_path / name) for name in ("fresh", "last"))
    assert found.metrics == new.metrics and found.identity == new.identity


@pytest.mark.slow
def test_a_killed_job_takes_no_other_and_signals_reach_one_at_work(warm: None, tmp_path: Path) -> None:
    long = ("train.max_steps=2000", "train.epochs=1", "train.save_steps=null")
    killed, stopped = (written(tmp_path / name, *long) for name in ("killed", "stopped"))
    job = begun(killed)
    until_at_work(tmp_path / "killed")
    job.send_signal(signal.SIGKILL)
    assert ended(job)[0] == -signal.SIGKILL
    job = begun(stopped)
    until_at_work(tmp_path / "stopped")
    job.send_signal(signal.SIGTERM)
    code, said = ended(job)
    assert code == 75 and said.splitlines()[-1].startswith("stopped: ") and any((tmp_path / "stopped" / "checkpoints").iterdir())
    job.send_signal(signal.SIGTERM)  # it has ended: nobody gets it
    assert ended(begun(written(tmp_path / "next")))[0] == 0


@pytest.mark.slow
def test_a_job_starts_by_itself_where_the_worker_is_killed(
    warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warm_worker, "_are_gone", False)
    warm_worker.close()
    worker = warm_worker.for_jobs_in(ENVIRONMENT)
    assert worker
    warm_worker._idle.append(worker)
    worker.process.kill()
    written(tmp_path / "job")
    assert sweep._work(tmp_path / "job", "[1/2]", ENVIRONMENT, warm=True) == (0, False)
    said = capsys.readouterr().out
    assert said.startswith("[1/2]: the process that jobs are forked from has ended (killed); this job and those after it start")
    assert is_finished(tmp_path / "job") and warm_worker.for_jobs_in(ENVIRONMENT) is None


def test_an_environment_of_its_own_is_a_worker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_worker.WarmWorker, "__init__", lambda self, e: setattr(self, "environment", warm_worker._shared(e)))
    monkeypatch.setattr(warm_worker, "_idle", [])
    monkeypatch.setattr(warm_worker, "_are_gone", False)
    one = warm_worker.for_jobs_in({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"})
    assert one
    warm_worker._idle.append(one)
    assert warm_worker.for_jobs_in({"OMP_NUM_THREADS": "2"}) is not one
    assert warm_worker.for_jobs_in({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1"}) is one
    assert warm_worker.for_jobs_in({"OMP_NUM_THREADS": "1"}) is not one  # it is at work
