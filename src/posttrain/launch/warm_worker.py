"""Workers of a sweep's jobs that need not start: each is forked from a process that has the libraries in memory.

`python -m posttrain.launch.warm_worker` is that process. It imports and waits, and does nothing else: no thread, no parallel
region, no random number, no device, so that what it forks is what a new process would be. The jobs of one worker are of one
environment (number of threads, paths, ...); the GPU may differ, as none has been looked at yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

from posttrain.launch.gpus import gpus
from posttrain.launch.subprocess_runner import PYTHON
from posttrain.runs.identity import LIBRARIES
from posttrain.training.signals import PARENT, caught

IMPORTS = ("accelerate", "peft", "transformers.models.auto.modeling_auto", "posttrain.launch.worker", "posttrain.stages.stage")
# of what a job has imported the next one finds: modules that do nothing but be there; a user's own code is read anew by each
INSTALLED = {*LIBRARIES, "safetensors", "diffusers", "pyarrow", "pandas", "matplotlib", "numpy", "huggingface_hub"}
OWN = ("CUDA_VISIBLE_DEVICES", PARENT)  # what jobs of one worker may have each to itself
NO_DEVICE = 3  # exit code of a worker whose forks would find no GPU
REFUSALS = {NO_DEVICE: "a library has looked at the GPU as it was imported, and a fork cannot use it", -9: "killed"}
WAIT = 0.02  # seconds between two looks at a job


class Gone(Exception):
    """A warm worker has ended, or cannot be. No further one is begun."""


_idle: list[WarmWorker] = []
_lock = threading.Lock()  # a launcher may run jobs in threads
_are_gone = False


def for_jobs_in(environment: dict[str, str]) -> WarmWorker | None:
    """One that is idle, or a new one; None where they have turned out not to work here."""
    if _are_gone:
        return None
    with _lock:
        fitting = [each for each in _idle if each.environment == _shared(environment)]
        if fitting:
            _idle.remove(fitting[0])
    return fitting[0] if fitting else WarmWorker(environment)


def begin(environment: dict[str, str]) -> None:
    """Have one import while other work is done: the first job finds it."""
    if worker := for_jobs_in(environment):
        _idle.append(worker)


def close() -> None:
    """End those that are idle."""
    while _idle:
        _idle.pop().close()


class WarmWorker:
    """The process that jobs are forked from, one at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = _shared(environment)
        self.here, there = socket.socketpair()
        command = [*PYTHON, "-m", "posttrain.launch.warm_worker", str(there.fileno())]
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=[there.fileno()], env=self.environment, **quiet)
        there.close()
        self.answers = self.here.makefile("rb")

    def start(self, config_file: Path, environment: dict[str, str]) -> WarmJob:
        """A job: the worker's command on a config, in the working directory of this process. Raises Gone."""
        read, write = os.pipe()
        asked = {"config": str(config_file), "environment": environment, "folder": os.getcwd()}
        try:
            socket.send_fds(self.here, [json.dumps(asked).encode() + b"\n"], [write])
        except OSError:
            os.close(read)
            raise self.gone() from None
        finally:
            os.close(write)
        return WarmJob(self, os.fdopen(read, "rb"))

    def gone(self) -> Gone:
        """What to raise where it does not answer."""
        global _are_gone
        _are_gone = True
        self.close()
        why = REFUSALS.get(self.process.returncode, f"exit {self.process.returncode}")
        return Gone(f"the process that jobs are forked from has ended ({why})")

    def close(self) -> None:
        """No further job."""
        self.answers.close()
        self.here.close()
        self.process.wait()


class WarmJob:
    """A job at work, with what subprocess.Popen has for one."""

    def __init__(self, worker: WarmWorker, stdout: IO[bytes]) -> None:
        self.worker, self.stdout = worker, stdout

    def send_signal(self, sig: int, /) -> None:
        """Hand the job a signal, as long as it is there."""
        with contextlib.suppress(OSError):
            self.worker.here.send(json.dumps({"signal": sig}).encode() + b"\n")

    def wait(self) -> int:
        """Its exit code. Raises Gone where the worker has ended, and with it the job."""
        self.stdout.close()
        try:
            line = self.worker.answers.readline()
        except OSError:
            line = b""
        if not line:
            raise self.worker.gone()
        _idle.append(self.worker)
        return json.loads(line)


def _shared(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OWN}


# in the worker's process


def main(descriptor: int) -> int:
    """Fork jobs until whoever asks has gone. Comes back in every job too, with its exit code, so that it ends as others do."""
    usual = {number: signal.signal(number, lambda *_: None) for number in caught()}  # they are for the jobs
    asking = socket.socket(fileno=descriptor)
    _import(IMPORTS)
    if not _devices_serve():
        return NO_DEVICE
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    rest, descriptors = b"", list[int]()
    while True:
        while b"\n" not in rest:
            more, found, *_ = socket.recv_fds(asking, 1 << 20, 1)
            if not more:
                return 0
            rest, descriptors = rest + more, descriptors + found
        line, _, rest = rest.partition(b"\n")
        asked = json.loads(line)
        if "config" not in asked:
            continue  # a signal for a job that has ended
        with tempfile.TemporaryFile("w+") as names:
            output = descriptors.pop(0)
            if (job := os.fork()) == 0:
                asking.close()
                return _work(asked, output, usual, names)
            os.close(output)
            code = _watch(job, asking)
            names.seek(0)
            _import(names.read().split())
            serves = _devices_serve()
        asking.sendall(json.dumps(code).encode() + b"\n")
        if not serves:
            return NO_DEVICE


def _work(asked: dict[str, Any], output: int, usual: dict[Any, Any], names: IO[str]) -> int:
    """The job, in its own process."""
    for number, handler in usual.items():
        signal.signal(number, handler)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(asked["environment"] | {PARENT: str(os.getppid())})
    os.chdir(asked["folder"])
    sys.argv[1:] = [asked["config"]]
    from posttrain.launch.worker import main as work

    code = work(asked["config"])
    names.write(" ".join(name for name in sys.modules if name.partition(".")[0] in INSTALLED))
    names.flush()
    return code


def _watch(job: int, asking: socket.socket) -> int:
    """Hand on signals until the job has ended; its exit code, or minus the signal that ended it. Leaves where nobody asks."""
    while True:
        done, status = os.waitpid(job, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if select.select([asking], [], [], WAIT)[0]:
            words = asking.recv(1 << 16)
            for line in words.splitlines():
                os.kill(job, json.loads(line)["signal"])
            if not words:
                os.kill(job, signal.SIGTERM)
                sys.exit(0)


def _import(names: Any) -> None:
    with _devices_are_known():
        for name in names:
            if name not in sys.modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    gc.freeze()  # a job's collector leaves alone what all jobs share; looking at it would copy it


@contextmanager
def _devices_are_known() -> Iterator[None]:
    """Inside, who asks of what generation a GPU is, as bitsandbytes does while it is imported, is told what a fork has found out:
    the question itself would open the device here, and no fork could use it then."""
    import torch

    found = _found_first()
    if found is None:
        yield
        return
    own = torch.cuda.get_device_capability

    def known(device: Any = None) -> tuple[int, int]:
        number = device.idx if isinstance(device, torch.cuda.device) else device
        return found[number if isinstance(number, int) else torch.device(number or "cuda").index or 0]

    torch.cuda.get_device_capability = known
    try:
        yield
    finally:
        torch.cuda.get_device_capability = own


def _devices_serve() -> bool:
    """Can a job reach the GPU, or has one of the libraries looked at it already, which no fork survives?"""
    return not _has_devices() or _capabilities() is not None


def _has_devices() -> bool:
    import torch

    return bool(torch.version.cuda and gpus())


@cache
def _found_first() -> list[tuple[int, int]] | None:
    """Before anything was imported."""
    return _capabilities()


def _capabilities() -> list[tuple[int, int]] | None:
    """Of each GPU, by a fork that asks; None where there is none, or a fork cannot."""
    import torch

    if not _has_devices():
        return None
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            torch.cuda.init()
            found = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
            os.write(write, json.dumps(found).encode())
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return [(major, minor) for major, minor in json.loads(said)] if said else None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
