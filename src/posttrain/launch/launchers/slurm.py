"""A run as a job of Slurm: the script is written, shown, kept in the run's directory, and handed to sbatch.

Slurm asks the run to stop two minutes before its time (USR1), or when another job is to have its place (TERM): the run saves and
ends with 75, and the job is queued again. It then goes on, with its own run directory.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from posttrain.console import say
from posttrain.errors import Stopped, UserError
from posttrain.launch.launchers.opened import finished, opened
from posttrain.launch.subprocess_runner import worker_command
from posttrain.runs.files import write_text
from posttrain.runs.identity import digest

SCRIPT, ASKED, LOG = "job.sh", "job.yaml", "job.log"  # in the run's directory
BODY = """
cd {cwd} || exit 1
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
export LOCAL_WORLD_SIZE={here} WORLD_SIZE={count}
# the rest is given two minutes once one has ended
srun --wait=120 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' run {worker}
code=$?
# saved before its end: another turn, unless Slurm is ending the job itself
if [ $code = {stopped} ] && [ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def submit(config: dict[str, Any], waits: bool) -> dict[str, Any]:
    """Hand the run to sbatch; returns its manifest where it `waits` for the job's end (or is finished already), else {}.

    Raises UserError where there is no sbatch or it refuses the job.
    """
    if not (sbatch := shutil.which("sbatch")):
        raise UserError("train.launcher: sbatch is not installed on this machine; submit from one of the cluster's, or say local")
    config, manifest = opened(config)
    if manifest:
        return manifest
    directory = Path(config["run"]["dir"])
    script = directory / SCRIPT
    write_text(script, script_of(config, Path.cwd()))
    write_text(directory / ASKED, yaml.safe_dump(config, sort_keys=False))  # of this start: config.yaml is of the first
    for line in script.read_text(encoding="utf-8").splitlines():
        say(f"  {line}")
    options = ["--parsable", *(["--wait"] if waits else [])]
    say(f"submitted with sbatch {script}; its output goes to {directory / LOG}")
    asked = subprocess.run([sbatch, *options, str(script)], capture_output=True, text=True)
    number = asked.stdout.strip().split(";")[0]
    if not number:
        why = (asked.stderr.strip().splitlines() or ["it has not said why"])[-1].removeprefix("sbatch: error: ")
        raise UserError(f"launch: sbatch refuses the job: {why}")
    say(f"job {number}: squeue --jobs={number} shows it, scancel {number} ends it; the same command goes on where it has stopped")
    return finished(config, asked.returncode, config["train"]["processes"]) if waits else {}


def script_of(config: dict[str, Any], cwd: Path) -> str:
    """The script of a job that runs `config`, whose directory is there, from the folder `cwd`."""
    launch, directory, count = config["launch"], Path(config["run"]["dir"]), config["train"]["processes"]
    here = count // launch["nodes"]
    options: dict[str, Any] = {
        "job-name": f"posttrain-{config['stage']}-{digest(config)[:8]}",
        "dependency": "singleton",  # never two of one run
        "nodes": launch["nodes"],
        "ntasks-per-node": here,
        "time": launch["time"],
        "partition": launch["partition"],
        "account": launch["account"],
        "gpus-per-node": launch["gpus_per_node"],
        "signal": "USR1@120",
        "output": f'"{str(directory / LOG).replace("%", "%%")}"',
        "open-mode": "append",
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lines = [*lines, "--requeue", *(launch["sbatch"] or "").split()]
    worker = shlex.join(worker_command(str(directory / ASKED)))
    body = BODY.format(cwd=shlex.quote(str(cwd)), here=here, count=count, worker=worker, stopped=Stopped.exit_code)
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in lines)]) + "\n" + body
