"""A process of several that is lost is started again with the others, which go on from the last checkpoint to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from posttrain.config.compose import compose_run
from ranks import Nursery, result

pytestmark = pytest.mark.slow
WORDS = (
    *("model=tiny", "train.max_steps=60", "train.batch_size=1", "train.save_steps=2", "+peft=lora", "peft.dropout=0.1"),
    *("data.max_rows=20", "data.eval_rows=2", "eval.sets=null", "train.max_length=128"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")
C10D = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
SFT = ("-m", "posttrain", "sft", *WORDS)
OURS = (*SFT, "train.processes=2", "launch.restarts=1")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The result of a run of two processes of which none was lost."""
    place = tmp_path_factory.mktemp("straight") / "run"
    with Nursery() as nursery:
        assert nursery.run(compose_run("sft", list(WORDS)), place, 2).codes == [0, 0]
    return result(place)


def kill_rank(launcher: subprocess.Popen[str], rank: int, when: Path) -> None:
    """SIGKILL to one process of a run, as soon as `when` is there."""
    deadline = time.monotonic() + 200
    while not when.exists():
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            child.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize(
    "command", [(*TORCHRUN, *SFT), (*TORCHRUN, *C10D, *SFT), OURS], ids=["torchrun", "c10d", "launch.restarts"]
)
def test_a_lost_process_is_started_again(command: tuple[str, ...], straight: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        [sys.executable, *command, f"run.dir={run}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    kill_rank(launcher, 1, run / "checkpoints" / "step-000004")
    said, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, said
    # the other one hears of it by its connection, or is stopped by the launcher, whichever is first
    assert "another process of the run has ended" in said or "stopped by a signal" in said
    assert "going on from step" in said
    assert result(run) == straight
