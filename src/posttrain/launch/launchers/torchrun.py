"""The processes of this machine under torch's own launcher (what torchrun is made of): the only one, or one of several."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from typing import Any

from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.launchers.opened import finished, opened, threads
from posttrain.launch.subprocess_runner import config_file, private_config_file, worker_command
from posttrain.runs.identity import digest
from posttrain.training.signals import caught

MEETING = 900  # seconds in which all machines must have come


def run_processes(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config` to its end; {} on a machine that has not its directory. Raises UserError, RunError or Stopped."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    launch, count = config["launch"], config["train"]["processes"]
    here = count // launch["nodes"]
    check_devices(here)
    first = not launch["node_rank"]
    if first:
        config, manifest = opened(config)
        if manifest and launch["nodes"] == 1:
            return manifest
    for name in [each for each in logging.root.manager.loggerDict if each.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # each has a level of its own
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # a step may be long, and saving takes its time
    os.environ["OMP_NUM_THREADS"] = threads(here)
    if launch["nodes"] > 1:
        say(f"machine {launch['node_rank']} of {launch['nodes']}, {here} processes; waits for the others at {launch['master']}")
    with config_file(config) if first else private_config_file(config) as file:
        try:
            elastic_launch(_launch_config(config, here), sys.executable)(*worker_command(str(file))[1:])
        except SignalException:
            raise Stopped("stopped by a signal; the same command goes on") from None
        except ChildFailedError as e:
            return finished(config, e.get_first_failure()[1].exitcode, count)
        except (DistError, TimeoutError) as e:
            said = str(e).splitlines()[0][:200]
            raise RunError(f"launch.master: the machines did not meet at {launch['master']} ({said})") from None
    return finished(config, 0, count) if first else {}


def _launch_config(config: dict[str, Any], here: int) -> Any:
    """As torchrun would make it of its options: of several machines with --node-rank and --master-addr."""
    from torch.distributed.launcher.api import LaunchConfig

    launch = config["launch"]
    alone = launch["nodes"] == 1
    return LaunchConfig(
        min_nodes=launch["nodes"],
        max_nodes=launch["nodes"],
        nproc_per_node=here,
        run_id=uuid.uuid4().hex if alone else digest(config)[:16],
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else launch["master"],
        rdzv_configs={} if alone else {"rank": launch["node_rank"], "timeout": MEETING},
        max_restarts=launch["restarts"],
        signals_to_handle=",".join(number.name for number in caught()),
    )


def check_devices(count: int) -> None:
    """Raises UserError where processes would have to share a GPU, which NCCL refuses late and in other words."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else count
    if count > found:
        raise UserError(f"train.processes: {count} on a machine with {found} GPUs; say train.processes={found}")
