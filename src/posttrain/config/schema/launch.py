"""Where a run's processes are started, and what each launcher is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from posttrain.config.fields import NonNegative, Positive, Strict

Launcher = Literal["local", "torchrun", "slurm", "ray"]
READS = {  # the keys of `launch` that each launcher reads
    "local": {"restarts"},
    "torchrun": {"nodes", "node_rank", "master", "restarts"},
    "slurm": {"nodes", "time", "partition", "account", "gpus_per_node", "sbatch"},
    "ray": {"address", "restarts"},
}


def _worded(value: Any) -> Any:
    """A time of so many minutes, or a number as a name: YAML reads them as numbers."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Word = Annotated[str, BeforeValidator(_worded), Field(pattern=r'^[^\x00-\x1f"\\]+$')]  # one that fits between quotes, in a line
Options = Annotated[str, Field(pattern=r"^--[a-z][\w-]*(=[^\x00-\x20]+)?( +--[a-z][\w-]*(=[^\x00-\x20]+)?)*$")]


class LaunchConfig(Strict):
    """`launch`: what `train.launcher` needs to know."""

    nodes: Positive
    node_rank: NonNegative | None
    master: Annotated[str, Field(pattern=r"^\S+:\d+$")] | None
    restarts: NonNegative
    time: Word | None
    partition: Word | None
    account: Word | None
    gpus_per_node: Word | None
    sbatch: Options | None
    address: Word | None

    def check(self, launcher: Launcher, processes: int) -> None:
        """Raises ValueError for what the launcher does not read, and for what it needs."""
        given = {key for key, value in self if value not in (None, 0) or (key == "node_rank" and value == 0)}
        given -= {"nodes"} if self.nodes == 1 else set()
        if unread := sorted(given - READS[launcher]):
            of = ", ".join(name for name, keys in READS.items() if unread[0] in keys)
            raise ValueError(f"launch.{unread[0]}: train.launcher={launcher} does not read it; leave it out, or use one of {of}")
        if processes % self.nodes:
            raise ValueError(
                f"train.processes: {processes} are not the same number on each of launch.nodes={self.nodes}; "
                f"say train.processes={self.nodes}, or a multiple"
            )
        if launcher == "torchrun" and self.nodes > 1 and (self.node_rank is None or self.master is None):
            missing = "node_rank" if self.node_rank is None else "master"
            what = {"node_rank": "0 on the first machine, 1 on the second, ...", "master": "HOST:PORT of the first machine"}
            raise ValueError(f"launch.{missing}: of several machines each is told; say launch.{missing}={what[missing]}")
        if (self.node_rank or 0) >= self.nodes:
            raise ValueError(f"launch.node_rank: {self.node_rank} is none of launch.nodes={self.nodes}, which count from 0")
