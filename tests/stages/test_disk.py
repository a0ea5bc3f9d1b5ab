"""A disk that refuses: the run ends by name, the last good checkpoint stays, and the same command goes on once there is room."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.errors import RunError, UserError
from posttrain.runs.files import sha256
from posttrain.training.checkpoint import newest_checkpoint
from posttrain.training.loop import Loop

MiB = 2**20


def options(run: Path) -> list[str]:
    size = ("train.max_steps=6", "train.batch_size=2", "train.save_steps=2", "data.max_rows=30")
    return ["sft", "model=tiny", "+peft=lora", "peft.r=4", *size, "eval.rows=1", "data.eval_rows=2", f"run.dir={run}"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("straight") / "run"
    posttrain.run(*options(run))
    return adapter(run)


def adapter(run: Path) -> str:
    return sha256(run / "adapter" / "adapter_model.safetensors")


@contextmanager
def before_step(number: int, monkeypatch: pytest.MonkeyPatch, act: Any) -> Iterator[None]:
    """Call `act` once before step `number` (from 0)."""
    step = Loop._step

    def patched(self: Any, at: int) -> Any:
        if at == number:
            act()
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", patched)
        yield


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB; a checkpoint of these runs takes 0.9 KiB a thousand numbers, a quarter of a MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def no_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory may be on a disk of a few MiB."""
    monkeypatch.setattr("posttrain.runs.directory.MIN_FREE_BYTES", 0)


def saved_steps(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*"))


def test_a_limit_on_file_sizes(tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    limit = file_size_limit(64 * 1024)
    try:
        with before_step(3, monkeypatch, limit.__enter__), pytest.raises(RunError) as found:
            posttrain.run(*options(run))
    finally:
        limit.__exit__(None, None, None)
    assert "checkpoint of step 4 could not be written" in str(found.value) and "File too large" in str(found.value)
    assert saved_steps(run) == [2] and not list((run / "checkpoints").glob(".*"))
    posttrain.run(*options(run))
    assert adapter(run) == expected


@pytest.mark.usefixtures("no_minimum")
def test_a_disk_that_fills_up(small_disk: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, filler = small_disk / "run", small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass

    with (
        before_step(3, monkeypatch, fill),
        pytest.raises(RunError, match=r"needs 0.\d MiB and 0.0 MiB are free; earlier ones are kept"),
    ):
        posttrain.run(*options(run))
    assert saved_steps(run) == [2]
    filler.unlink()
    posttrain.run(*options(run))
    assert adapter(run) == expected


@pytest.mark.usefixtures("no_minimum")
def test_no_room_for_two_checkpoints_is_said_before_the_first_step(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(int(3.7 * MiB)))
    with pytest.raises(UserError, match=r"run.dir: two checkpoints of \d+ MiB do not fit"):
        posttrain.run(*options(small_disk / "run"))
    assert not (small_disk / "run" / "checkpoints").exists()


def test_no_room_for_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * MiB, 9 * MiB, MiB))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="only 1 MiB free"):
        posttrain.run(*options(tmp_path / "run"))


def test_no_room_is_seen_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr("posttrain.training.checkpoint.check_room", lambda *_: None)
    monkeypatch.setattr("posttrain.stages.stage.check_room", lambda *_: None)
    monkeypatch.setattr("posttrain.training.checkpoint.free_bytes", lambda path: 1024)
    with pytest.raises(RunError, match=r"checkpoint of step 2 could not be written .*needs \d+\.\d MiB and 0.0 MiB are free"):
        posttrain.run(*options(run))
    assert not list((run / "checkpoints").glob("*"))


@pytest.mark.usefixtures("no_minimum")
def test_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"run.dir: cannot write to .*Read-only file system"):
        posttrain.run(*options(small_disk / "run"))


def test_a_directory_that_vanishes(tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, away = tmp_path / "run", tmp_path / "away"
    vanish = lambda: run.rename(away)  # noqa: E731
    with before_step(3, monkeypatch, vanish), pytest.raises(RunError, match="has vanished"):
        posttrain.run(*options(run))
    away.rename(run)
    posttrain.run(*options(run))
    assert adapter(run) == expected


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_what_the_system_refuses_within_a_save(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = tmp_path / "run", list[Path]()

    def flush(path: Path) -> None:
        calls.append(path)
        if len(calls) > 9:
            raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("posttrain.training.checkpoint.flush", flush)
    with pytest.raises(RunError, match=r"checkpoint of step 4 could not be written .*earlier ones are kept") as found:
        posttrain.run(*options(run))
    assert os.strerror(code) in str(found.value)
    checkpoint, damaged = newest_checkpoint(run / "checkpoints")
    assert checkpoint and checkpoint.step == 2 and not damaged
    assert not list((run / "checkpoints").glob(".*"))


def test_other_writes_that_fail_are_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of metrics.jsonl, here."""

    def log(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr("posttrain.training.tracking.Tracker.log", log)
    with pytest.raises(RunError, match=r"metrics.jsonl: the disk is full; free some space; .* the same command goes on"):
        posttrain.run(*options(tmp_path / "run"))


def test_out_of_memory_says_what_a_plan_would_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("posttrain.stages.language.build.load_causal", load)
    with pytest.raises(RunError, match=r"^out of memory; try train.gradient_checkpointing=true, or .* \(posttrain plan sft"):
        posttrain.run(*options(tmp_path / "run"))
