"""A real Ray cluster of one machine: the same bits as under torch's launcher, with a stop and a killed process in between."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from posttrain.config.compose import compose_run
from ranks import Nursery, result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install 'posttrain[ray]')"),
]
WORDS = (
    *("model=tiny", "train.max_steps=100", "train.batch_size=1", "train.save_steps=5", "+peft=lora", "peft.dropout=0.1"),
    *("data.max_rows=20", "data.eval_rows=2", "eval.sets=null", "train.max_length=128", "train.processes=2"),
)
RAY = (sys.executable, "-W", "ignore", "-m", "ray.scripts.scripts")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head with two CPUs, as `ray start --head` makes it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [*RAY, "start", "--head", "--num-cpus=2", f"--port={port}", "--disable-usage-stats", "--include-dashboard=false"]
    before = {each.pid for each in psutil.process_iter()}
    subprocess.run([*start, "--min-worker-port=0", "--max-worker-port=0"], check=True, capture_output=True, timeout=120)
    began = [each for each in psutil.process_iter() if each.pid not in before and "ray" in " ".join(each.cmdline())]
    yield f"127.0.0.1:{port}"
    for each in began:
        each.terminate()
    psutil.wait_procs(began, timeout=30)


def start(run: Path, address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "posttrain", "sft", *WORDS, "train.launcher=ray", f"launch.address={address}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, f"run.dir={run}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for(path: Path, command: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def rank_of(rank: int) -> psutil.Process:
    """The process that one of Ray's workers has started as `rank`."""
    for each in psutil.process_iter():
        try:
            name = " ".join(psutil.Process(each.ppid()).cmdline())
            if name.startswith("ray::RayTrainWorker") and each.environ().get("RANK") == str(rank):
                return each
        except psutil.Error:  # it has ended meanwhile
            continue
    raise AssertionError(f"no rank {rank}")


def test_on_a_cluster_with_a_stop_and_a_lost_process(cluster: str, tmp_path: Path) -> None:
    """First a signal to the command, then SIGKILL to rank 1, which Ray starts again with the other."""
    with Nursery() as nursery:
        assert nursery.run(compose_run("sft", list(WORDS)), tmp_path / "straight", 2).codes == [0, 0]
    run = tmp_path / "run"
    command = start(run, cluster)
    wait_for(run / "checkpoints" / "step-000005", command)
    command.send_signal(signal.SIGUSR1)
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 75 and "stopped by a signal after step" in said, said
    last = max((run / "checkpoints").glob("step-*"))
    command = start(run, cluster, "launch.restarts=1")
    after = int(last.name.removeprefix("step-")) // 5 * 5 + 10
    wait_for(run / "checkpoints" / f"step-{after:06d}", command)
    rank_of(1).send_signal(signal.SIGKILL)
    said, _ = command.communicate(timeout=300)
    assert command.returncode == 0 and said.count("going on from step") == 2, said
    assert result(run) == result(tmp_path / "straight")
    assert not (run / ".ray").exists()


def test_a_cluster_that_is_too_small_or_not_there(cluster: str, tmp_path: Path) -> None:
    command = start(tmp_path / "run", cluster, "train.processes=3")
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 2
    assert "error: train.processes: 3, and the Ray cluster has 2 CPUs; say train.processes=2" in said
    command = start(tmp_path / "run", "127.0.0.1:1")
    said, _ = command.communicate(timeout=120)
    assert command.returncode == 2
    assert "error: launch.address: no Ray cluster answers at 127.0.0.1:1" in said
    assert list(tmp_path.iterdir()) == []
