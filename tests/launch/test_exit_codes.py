"""What goes wrong is said once, and by whom: one process, or one of several with its number."""

import errno
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from posttrain.errors import RunError, Stopped, UserError, of_all
from posttrain.launch.exit_codes import guarded
from posttrain.launch.launchers.torchrun import check_devices
from posttrain.launch.worker import _open_shared, as_launched, choose_allocator, take_device
from posttrain.training.processes import Processes, is_lost_process


def said(error: BaseException, capsys: pytest.CaptureFixture[str], code: int) -> str:
    def command() -> None:
        raise error

    assert guarded(command) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 2])
def test_of_several_processes_each_tells_with_its_number(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    number = f"rank {rank}: " if rank else ""
    # before they have met: the same command, said once a machine
    assert said(UserError("data.path"), capsys, 2) == ("" if rank else "error: data.path\n")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    assert said(UserError("data.path"), capsys, 2) == f"{number}error: data.path\n"
    assert said(ValueError("odd"), capsys, 1).startswith(f"{number}failed: ValueError: odd")
    # what all of them come to, and what one has told the others
    assert said(of_all(RunError("spike")), capsys, 1) == ("" if rank else "failed: spike\n")
    assert said(Stopped("after step 2"), capsys, 75) == ("" if rank else "stopped: after step 2\n")
    told = RunError("disk")
    told.told_by = 2
    assert said(told, capsys, 1) == (f"{number}failed: disk\n" if rank == 2 else "")


def test_a_launchers_number_of_processes_is_the_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"train": {"processes": 1, "seed": 3}}
    assert as_launched(config) == config
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert as_launched(config) == {"train": {"processes": 4, "seed": 3}}
    with pytest.raises(UserError, match=r"train.processes: 2, and the launcher has started 4"):
        as_launched({"train": {"processes": 2}})


def test_accelerates_launcher_that_starts_one_process_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --cpu --num_processes 2` leaves the environment."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert as_launched({"train": {"processes": 1}})["train"]["processes"] == 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match=r"accelerate launch starts one process on a CPU.*train.processes=2"):
        as_launched({"train": {"processes": 1}})


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    check_devices(64)  # of a CPU
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_devices(2)
    with pytest.raises(UserError, match=r"train.processes: 3 on a machine with 2 GPUs; say train.processes=2"):
        check_devices(3)


def test_one_process_tells_itself() -> None:
    one = Processes()
    assert one.main and one.told(lambda: 3) == 3 and one.in_turn(lambda: 4) == 4 and one.gathered("a") == ["a"]
    assert one.all_say(True) and not one.all_say(False)
    with pytest.raises(ZeroDivisionError):
        one.told(lambda: 1 / 0)


def test_a_lost_process_is_told_from_other_errors() -> None:
    assert is_lost_process(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"))
    assert is_lost_process(dist.DistBackendError("NCCL communicator was aborted"))
    assert not is_lost_process(RuntimeError("shape mismatch")) and not is_lost_process(OSError("Connection reset by peer"))


def test_each_process_takes_its_own_gpu_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: no GPU is there."""
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    take_device()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    take_device()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"^train.processes: 3 on a machine with 2 GPUs; say train.processes=2$"):
        take_device()
    assert taken == [1]


def test_processes_wait_six_hours_for_each_other_and_meet_on_their_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes, NCCL's own limit, are too few while rank 0 tokenises (simulated: no GPU is there)."""
    seen: list[Any] = []

    def meets(**options: Any) -> None:
        seen.append(options["timeout"])
        raise Stopped("met")

    monkeypatch.setattr("posttrain.launch.worker._meeting", dict)
    monkeypatch.setattr("posttrain.launch.worker.take_device", lambda: seen.append("device"))
    monkeypatch.setattr("accelerate.PartialState", meets)
    with pytest.raises(Stopped, match="met"):
        _open_shared({})
    assert seen == ["device", timedelta(hours=6)]


@pytest.mark.skipif(sys.platform != "linux", reason="it is set on Linux alone")
def test_the_allocators_blocks_can_grow_unless_it_was_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    choose_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    choose_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")


def test_a_command_seldom_searches_for_garbage_and_not_at_its_end() -> None:
    """After torch and its like the last search takes two seconds, with all said and written."""
    code = """
import atexit, gc
last = lambda: print(len(gc.get_objects()), gc.get_freeze_count() > 1000, gc.get_threshold()[0])
atexit.register(last)  # the first in, the last out
from posttrain.launch.exit_codes import guarded
guarded(lambda: None)
guarded(lambda: None)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    left, frozen, threshold = ended.stdout.split()
    assert int(left) < 1000 and (frozen, threshold) == ("True", "50000")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a", None, "there/b"),
            "failed: there/b: the disk is full; free some space\n",
        ),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "failed: the disk is full; free some space\n",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x"), "failed: x: the disk is mounted read-only; mount it for writing\n"),
    ],
)
def test_a_disk_that_refuses_is_said_in_words_by_every_command(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POSTTRAIN_DEBUG", raising=False)

    def command() -> None:
        raise error

    assert guarded(command) == 1 and capsys.readouterr().err == said
