"""Runs of several processes, all forked from one that has torch in memory: seconds a run, where a launcher takes ten more.

    with Nursery() as nursery:
        nursery.run(config, directory, processes=2)                  # exit codes by rank; what each said is in Ranks.said
        nursery.run(config, directory, 2, kill=Kill(1, 9, "checkpoints/step-000002"))

The processes see what torchrun would tell them (RANK, WORLD_SIZE, MASTER_ADDR, ...), and are one run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

LIMIT = float(os.environ.get("RANKS_LIMIT", "120"))  # seconds that a run may take


@dataclass(frozen=True)
class Kill:
    """Send `number` to `rank` (None: to all) as soon as `path`, within the run's directory, is there."""

    rank: int | None
    number: int
    path: str


@dataclass(frozen=True)
class Ranks:
    """How a run ended: exit codes (below zero: the signal's number), and what each process has printed."""

    codes: list[int]
    said: list[str]


def result(run: Path) -> str:
    """A hash of the adapter that a run has left."""
    from posttrain.runs.files import sha256

    return sha256(run / "adapter" / "adapter_model.safetensors")


class Nursery:
    """The process that the ranks are forked from, while inside."""

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        cast("IO[str]", self.child.stdin).close()
        self.child.wait()

    def run(
        self,
        config: dict[str, Any],
        directory: Path,
        processes: int = 1,
        kill: Kill | None = None,
        places: Sequence[Mapping[str, Any]] = (),
    ) -> Ranks:
        """Run `config` in `directory`. places: for each rank what is its own: `env`, and a `dir` that is not the others'."""
        own = [dict(places[rank]) if places else {} for rank in range(processes)]
        directories = [str(each.get("dir", directory)) for each in own]
        jobs = [
            {"config": config | {"run": config["run"] | {"dir": place}}, "env": each.get("env", {}), "log": f"{place}.{rank}.log"}
            for rank, (each, place) in enumerate(zip(own, directories, strict=True))
        ]
        asked = {"jobs": jobs, "kill": asdict(kill) | {"path": str(directory / kill.path)} if kill else None}
        into, out = cast("IO[str]", self.child.stdin), cast("IO[str]", self.child.stdout)
        into.write(json.dumps(asked) + "\n")
        into.flush()
        codes = json.loads(out.readline())
        said = [Path(job["log"]).read_text() for job in jobs]
        for rank, code in enumerate(codes):
            print(f"--- rank {rank} ended with {code}\n{said[rank]}")  # pytest shows it where a test fails
        return Ranks(codes, said)


def _serve() -> None:
    """Answer jobs, a line each, with the exit codes of their processes."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from torch._C._distributed_c10d import TCPStore

    import posttrain.launch.worker
    import posttrain.stages.stage  # noqa: F401

    # Not torch.set_num_threads: a pool of threads that a fork has broken is made anew by whoever asks first, and a second thread
    # that asks meanwhile (transformers loads with several) finds none: "Invalid thread pool". OMP_NUM_THREADS says it as well.
    assert torch.get_num_threads() == 1
    for line in sys.stdin:
        asked = json.loads(line)
        count = len(asked["jobs"])
        told, tell = os.pipe()
        children = [_fork(job, rank, count, told) for rank, job in enumerate(asked["jobs"])]
        # As torchrun does: the launcher's own store, so that no other program can take the port in between. Only when all are
        # forked: its thread asks for names of addresses, and a fork meanwhile would keep libc's lock for that, and wait for ever.
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        os.write(tell, b"%5d" % store.port * count)
        codes = _watch(children, asked["kill"])
        os.close(told)
        os.close(tell)
        del store
        _import(Path(asked["jobs"][0]["log"] + ".modules"))
        print(json.dumps(codes), flush=True)


def _fork(job: dict[str, Any], rank: int, count: int, told: int) -> int:
    """told: a pipe that says the store's port to each, in five digits."""
    child = os.fork()
    if child:
        return child
    code = 250  # no exit code of the tool
    try:
        Path(job["log"]).parent.mkdir(parents=True, exist_ok=True)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        port = int(os.read(told, 5))
        if count > 1:
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            store = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            os.environ.update({name: str(value) for name, value in launched.items()} | store)
        os.environ.update(job["env"])
        faulthandler.enable()
        os.chdir(job["env"].get("RANKS_FOLDER", "."))
        from posttrain.launch.exit_codes import guarded
        from posttrain.launch.worker import run_config

        code = guarded(lambda: run_config(job["config"]))
        sys.stdout.flush()
        Path(job["log"] + ".modules").write_text(" ".join(name for name in sys.modules if name != "__main__"))
    finally:
        os._exit(code)


def _import(names: Path) -> None:
    """Have in memory what the last run had to import, so that the next need not."""
    for name in names.read_text().split() if names.exists() else []:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _watch(children: list[int], kill: dict[str, Any] | None) -> list[int]:
    """Exit codes. A rank that is still there long after another has failed is ended, as a launcher would."""
    codes, deadline = dict[int, int](), time.monotonic() + LIMIT
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    deadline = min(deadline, time.monotonic() + 20)
        if kill and Path(kill["path"]).exists():
            for child in set(children) - codes.keys():
                if kill["rank"] is None or children.index(child) == kill["rank"]:
                    os.kill(child, kill["number"])
            kill = None
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGABRT)  # its log then says where it stood
        time.sleep(0.002)
    return [codes[child] for child in children]


if __name__ == "__main__":
    _serve()
