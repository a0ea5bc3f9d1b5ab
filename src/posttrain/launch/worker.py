"""One run in one process (or one of several): open its directory, hand over to its stage, end with the right exit code.

`python -m posttrain.launch.worker CONFIG.yaml` is what sweeps, recipes and multi-process runs start.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from posttrain.config.stages import typed_config
from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError, of_all
from posttrain.launch.exit_codes import guarded
from posttrain.launch.failures import named
from posttrain.launch.launchers import launch
from posttrain.runs.directory import Run, open_run
from posttrain.runs.manifest import read_manifest
from posttrain.runs.yaml_files import read_yaml
from posttrain.stages.spec import spec_of
from posttrain.training.signals import ignore, leave_with_parent, leaving_at_once

PATIENCE = timedelta(hours=6)  # rank 0 may read, tokenise, and write for long; a process that ends is noticed at once


def run_config(config: dict[str, Any], waits: bool = True) -> dict[str, Any]:
    """Run a composed, validated config to its end, or go on where it stopped; returns the manifest as its JSON has it.

    waits: False where a launcher that queues the run need not wait for its end; returns {} then. Raises UserError, RunError or
    Stopped.
    """
    config = as_launched(config)
    choose_allocator()
    if "WORLD_SIZE" not in os.environ and _needs_launcher(config):
        return launch(config, waits)
    with leaving_at_once():
        return _run(config)


def choose_allocator() -> None:
    """Before CUDA starts: packs differ in length, and blocks that can grow are not left too small for the next one. What is
    set already stays."""
    if sys.platform == "linux" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


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


def _needs_launcher(config: dict[str, Any]) -> bool:
    """Is this process none of the run's own?"""
    train = config["train"]
    return train["launcher"] != "local" or train["processes"] > 1 or config["launch"]["restarts"] > 0


def _run(config: dict[str, Any]) -> dict[str, Any]:
    from posttrain.reports.live import told_of

    run, manifest = _open_shared(config) if config["train"]["processes"] > 1 else _open(config)
    try:
        if manifest:
            say(f"{run.dir} is finished already, with this very config: nothing to do")
        else:
            with told_of(run.dir):
                manifest = _trained(config, run)
        if run.mirror:
            run.mirror.finish()
        return manifest
    finally:
        if run.mirror:
            run.mirror.leave()
        run.close()


def _trained(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """The manifest of a run that comes to its end here."""
    from posttrain.stages.stage import run_stage

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


def _open(config: dict[str, Any]) -> tuple[Run, dict[str, Any] | None]:
    """The run's directory, and its manifest where the run is finished."""
    run = open_run(config)
    if address := config["run"].get("mirror"):
        from posttrain.training.mirror import Mirror

        try:
            run.mirror = Mirror(address, run)
            run.mirror.begin()
        except BaseException:
            run.close()
            raise
    return run, read_manifest(run.dir).to_dict() if run.finished else None


def _leave_group() -> None:
    """All processes stop at the same step: part in order, or torch complains about each of them."""
    import torch.distributed as dist

    if dist.is_initialized():
        ignore()
        dist.destroy_process_group()


def _open_shared(config: dict[str, Any]) -> tuple[Run, dict[str, Any] | None]:
    """Rank 0 opens the directory, which the others may not see; they are told what it has found."""
    import torch
    from accelerate import InitProcessGroupKwargs, PartialState

    from posttrain.training.processes import Processes, keep_group

    take_device()
    options = InitProcessGroupKwargs(timeout=PATIENCE).to_kwargs()
    state = PartialState(cpu=not torch.accelerator.is_available(), **options, **_meeting())
    keep_group()
    opened: list[Run] = []

    def open_here() -> tuple[str, dict[str, Any] | None]:
        run, finished = _open(config)
        opened.append(run)
        return str(run.dir), finished

    directory, finished = Processes(state.num_processes, state.process_index, state.device or torch.device("cpu")).told(open_here)
    return opened[0] if opened else Run(Path(directory), config), finished


def _meeting() -> dict[str, Any]:
    """Where the processes find one another: in a part of the launcher's store that is of this try alone. A launcher that starts
    them again may keep its store, and in it the addresses of those that have ended."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": PrefixStore(f"try {again}", store), "rank": rank, "world_size": count}


def take_device() -> None:
    """Make this process's GPU the current one before NCCL looks for it. Raises UserError, in all processes of this machine, where
    they are more than its GPUs."""
    import torch

    from posttrain.launch.launchers.torchrun import check_devices

    if torch.cuda.is_available():
        try:
            check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        except UserError as error:
            raise of_all(error) from None
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def main(path: str) -> int:
    """Exit code of the run that the file at `path` describes."""
    leave_with_parent()
    return guarded(lambda: run_config(read_yaml(Path(path))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
