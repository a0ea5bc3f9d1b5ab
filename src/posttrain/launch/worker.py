"""One run in one process (or one of several): open its directory, hand over to its stage, end with the right exit code.

`python -m posttrain.launch.worker CONFIG.yaml` is what sweeps, recipes and multi-process runs start.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

from posttrain.config.stages import typed_config
from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.exit_codes import guarded
from posttrain.launch.failures import named
from posttrain.launch.subprocess_runner import config_file, worker_command
from posttrain.runs.directory import Run, open_run
from posttrain.runs.manifest import read_manifest
from posttrain.runs.yaml_files import read_yaml
from posttrain.stages.spec import spec_of
from posttrain.training.signals import caught, leave_with_parent, leaving_at_once

PATIENCE = timedelta(hours=6)  # rank 0 may read, tokenise, and write for long; a process that ends is noticed at once


def run_config(config: dict[str, Any]) -> dict[str, Any]:
    """Run a composed, validated config to its end, or go on where it stopped; returns the manifest as its JSON has it.

    Raises UserError, RunError or Stopped.
    """
    config = as_launched(config)
    if config["train"]["processes"] > 1 and "WORLD_SIZE" not in os.environ:
        return _launch(config)
    with leaving_at_once():
        return _run(config)


def as_launched(config: dict[str, Any]) -> dict[str, Any]:
    """With `train.processes` as a launcher's environment has it. Raises UserError where that is not what was asked for."""
    asked, found = config["train"]["processes"], os.environ.get("WORLD_SIZE")
    if found is None:
        if "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:  # what accelerate launch sets then
            raise UserError(
                "train.processes: accelerate launch starts one process on a CPU, whatever its --num_processes; leave it out and "
                "say train.processes=2, or use torchrun --nproc-per-node 2"
            )
        return config
    if asked not in (1, int(found)):
        raise UserError(f"train.processes: {asked}, and the launcher has started {found}; leave one of them out")
    return {**config, "train": {**config["train"], "processes": int(found)}}


def _run(config: dict[str, Any]) -> dict[str, Any]:
    from posttrain.stages.stage import run_stage

    run, finished = _open_shared(config) if config["train"]["processes"] > 1 else _open(config)
    if finished:
        say(f"{run.dir} is finished already, with this very config: nothing to do")
        return finished
    cfg = typed_config(config)
    try:
        return run_stage(cfg, run, spec_of(cfg.stage).steps_of(cfg))
    except Stopped:
        _leave_group()
        raise
    except (UserError, RunError):
        raise
    except Exception as error:
        raise named(error, config, run.dir) or error from None
    finally:
        run.close()


def _open(config: dict[str, Any]) -> tuple[Run, dict[str, Any] | None]:
    """The run's directory, and its manifest where the run is finished."""
    run = open_run(config)
    return run, read_manifest(run.dir).to_dict() if run.finished else None


def _leave_group() -> None:
    """All processes stop at the same step: part in order, or torch complains about each of them."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _open_shared(config: dict[str, Any]) -> tuple[Run, dict[str, Any] | None]:
    """Rank 0 opens the directory, which the others may not see; they are told what it has found."""
    import torch
    from accelerate import InitProcessGroupKwargs, PartialState

    from posttrain.training.processes import Processes, keep_group

    options = InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs()
    state = PartialState(cpu=not torch.accelerator.is_available(), **options)
    keep_group()
    opened: list[Run] = []

    def open_here() -> tuple[str, dict[str, Any] | None]:
        run, finished = _open(config)
        opened.append(run)
        return str(run.dir), finished

    directory, finished = Processes(state.num_processes, state.process_index, state.device or torch.device("cpu")).told(open_here)
    return opened[0] if opened else Run(Path(directory), config), finished


def _launch(config: dict[str, Any]) -> dict[str, Any]:
    """`train.processes` copies of this worker on one machine, under torch's own launcher (what torchrun is made of)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_devices(config["train"]["processes"])
    run = open_run(config)  # refuses what can be refused before anything starts
    config = {**config, "run": {**config["run"], "dir": str(run.dir)}}
    if run.lock:
        run.lock.release()
    count = config["train"]["processes"]
    for name in [each for each in logging.root.manager.loggerDict if each.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # a step may be long, and saving takes its time
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with config_file(config) as file:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in caught()),
        )
        try:
            elastic_launch(launch, sys.executable)(*worker_command(str(file))[1:])
        except SignalException:
            raise Stopped("stopped by a signal; the same command goes on") from None
        except ChildFailedError as e:
            raise _meaning(e.get_first_failure()[1].exitcode, count) from None
    return read_manifest(run.dir).to_dict()


def check_devices(count: int) -> None:
    """Raises UserError where processes would have to share a GPU, which NCCL refuses late and in other words."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else count
    if count > found:
        raise UserError(f"train.processes: {count} on a machine with {found} GPUs; say train.processes={found}")


def _meaning(code: int, count: int) -> BaseException:
    """The error for the first of `count` processes that ended, with `code`. It has printed the details itself."""
    if code == Stopped.exit_code:
        return Stopped("stopped by a signal; the same command goes on")
    if code == UserError.exit_code:
        return UserError("the message is above")
    how = f"was ended by signal {-code}" if code < 0 else f"failed (exit {code}); its own message is above"
    return RunError(f"one of {count} processes {how}; the last checkpoint is kept, the same command goes on")


def main(path: str) -> int:
    """Exit code of the run that the file at `path` describes."""
    leave_with_parent()
    return guarded(lambda: run_config(read_yaml(Path(path))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
