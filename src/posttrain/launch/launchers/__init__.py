"""What starts the processes of a run, by the name that `train.launcher` has for it."""

from __future__ import annotations

from typing import Any


def launch(config: dict[str, Any], waits: bool) -> dict[str, Any]:
    """Have `config` run by its launcher; returns the manifest, or {} for a run that is queued and not waited for.

    Raises UserError before anything is written where the launcher's own parts are missing; then as `run_config`.
    """
    launcher = config["train"]["launcher"]
    if launcher == "slurm":
        from posttrain.launch.launchers.slurm import submit

        return submit(config, waits)
    if launcher == "ray":
        from posttrain.launch.launchers.ray_cluster import run_on_ray

        return run_on_ray(config)
    from posttrain.launch.launchers.torchrun import run_processes

    return run_processes(config)
