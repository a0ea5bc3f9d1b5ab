"""A run on a Ray cluster: Ray Train places the workers, has them meet, and starts them again where one is lost.

Each of Ray's workers starts the process that any launcher starts, and hands its exit code to the desk. The command that has asked
for the run stays; a signal to it goes through the desk to all processes, which save and leave.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError, first_line
from posttrain.launch.launchers.opened import finished, opened
from posttrain.launch.subprocess_runner import private_config_file, worker_command
from posttrain.training.signals import PARENT, passing_on

ENDS = (0, UserError.exit_code, Stopped.exit_code)  # exit codes that another try would not change
PATIENCE = 60.0  # seconds for processes of an earlier try to leave the run's directory
QUIET = {"RAY_DEDUP_LOGS": "0", "RAY_TRAIN_ENABLE_STATE_TRACKING": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def run_on_ray(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config` to its end. Raises UserError, before anything is written, where Ray or the cluster is not there or too small;
    then UserError, RunError or Stopped as the processes end."""
    if find_spec("ray") is None or find_spec("ray.train") is None:
        raise UserError("train.launcher: ray is not installed; pip install 'posttrain[ray]', or say train.launcher=local")
    import ray

    count = config["train"]["processes"]
    _connect(config["launch"]["address"])
    try:
        has_gpus = _require_room(count)
        config, manifest = opened(config)
        return manifest or finished(config, _train(config, count, has_gpus), count)
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        _knock(where)
        ray.init(address=where, logging_level=logging.ERROR, log_to_driver=True)
    except Exception as e:
        raise UserError(
            f"launch.address: no Ray cluster answers at {where} ({first_line(e)}); start one with `ray start --head`, or say "
            "launch.address=HOST:6379"
        ) from None


def _knock(where: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT: Ray itself would try again for minutes."""
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _require_room(count: int) -> bool:
    """Whether the cluster has GPUs, one for each process. Raises UserError where it has not enough of what is needed: Ray would
    wait for more for ever."""
    import ray

    found = ray.cluster_resources()
    kind = "GPU" if found.get("GPU") else "CPU"
    if count > (held := int(found.get(kind, 0))):
        raise UserError(f"train.processes: {count}, and the Ray cluster has {held} {kind}s; say train.processes={max(1, held)}")
    return kind == "GPU"


def _train(config: dict[str, Any], count: int, has_gpus: bool) -> int:
    """The exit code of the first process that has ended other than well."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from posttrain.launch.launchers.ray_desk import Desk

    directory, desk = Path(config["run"]["dir"]), ray.remote(num_cpus=0)(Desk).remote()
    own = directory / ".ray"  # Ray Train wants a place for itself
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": config, "folder": str(Path.cwd()), "desk": desk},
        scaling_config=ScalingConfig(num_workers=count, use_gpu=has_gpus),
        torch_config=TorchConfig(backend="gloo"),  # for the meeting alone; the run makes its own group
        run_config=RunConfig(
            name="run", storage_path=str(own), failure_config=FailureConfig(max_failures=config["launch"]["restarts"])
        ),
    )
    say(f"Ray places {count} processes, each with {'a GPU' if has_gpus else 'a CPU'}")
    try:
        with ThreadPoolExecutor(1) as one:  # Ray has a handler of its own for Ctrl-C, in the main thread only
            failure = _wait(one.submit(trainer.fit), desk)
    finally:
        shutil.rmtree(own, ignore_errors=True)
    codes = dict[int, int](ray.get(desk.codes.remote()))
    code = next((code for code in codes.values() if code), 0)
    if failure and not code:
        raise RunError(f"Ray has lost the run: {failure}; the last checkpoint is kept, the same command goes on")
    return code


def _wait(run: Future[Any], desk: Any) -> str | None:
    """Until Ray Train ends; signals go to the desk. Returns how it has failed, if it has."""
    with passing_on(lambda _: None) as stop:
        told = False
        while True:
            try:
                run.result(timeout=0.5)
                return None
            except NotYet:
                if stop.requested and not told:
                    desk.stop.remote()
                    told = True
            except Exception as e:
                return first_line(e)[:200]


def work(asked: dict[str, Any]) -> None:
    """What each of Ray's workers does: run its process of the run to its end. Raises RuntimeError where another try may help."""
    import ray
    import ray.train

    rank, desk, config = ray.train.get_context().get_world_rank(), asked["desk"], asked["config"]
    if rank == 0:
        lock = FileLock(Path(config["run"]["dir"]) / ".lock")
        with suppress(Timeout):  # then the process says so
            lock.acquire(timeout=PATIENCE)
        lock.release()
    _store, meeting = _meeting(rank)  # kept for as long as the process
    with private_config_file(config) as file:
        child = subprocess.Popen(worker_command(str(file)), env=os.environ | meeting, cwd=asked["folder"])
        told = False
        while (code := _ended(child)) is None:
            if not told and ray.get(desk.is_stopping.remote()):
                child.terminate()
                told = True
    ray.get(desk.tell.remote(rank, code))
    if code not in ENDS and config["launch"]["restarts"]:
        raise RuntimeError(f"process {rank} ended with {code}")


def _meeting(rank: int) -> tuple[Any, dict[str, str]]:
    """A store that the processes meet at, as torchrun's agent has one for its own, and the environment that says where. The group
    of Ray's workers, whose store is taken, tells where it is."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port)
    launched = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return store, launched | {"MASTER_PORT": str(port[0]), PARENT: str(os.getpid())}


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code, once it has one; looks for a second."""
    try:
        return child.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return None
