"""A run's directory on disk: who owns it, what it was asked for, and when it is complete. No torch."""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from filelock import FileLock, Timeout

from posttrain.errors import UserError
from posttrain.runs.earlier import as_it_ran, as_of_today, current_config
from posttrain.runs.files import STATUS, by_umask, file_hashes, sweep_leftovers, write_json, write_text
from posttrain.runs.identity import allowed, code_state, compare, digest, flatten, identity_of, library_versions
from posttrain.runs.manifest import CARD, MANIFEST, SCHEMA, Manifest, is_finished
from posttrain.runs.yaml_files import read_yaml
from posttrain.secrets import redact

CONFIG = "config.yaml"
MIN_FREE_BYTES = 64 * 2**20
_SECTIONS = ("model", "data", "train", "optim", "run")


class Copy(Protocol):
    """A copy of a run's directory elsewhere, kept up."""

    def saving(self) -> AbstractContextManager[None]:
        """Around each save of a checkpoint."""
        ...

    def finish(self) -> None:
        """The run is complete. Raises RunError where the copy cannot be."""
        ...

    def leave(self) -> None:
        """The process leaves the run, however it ended."""
        ...


@dataclass
class Run:
    """An opened run directory, locked for this process until it ends."""

    dir: Path
    config: dict[str, Any]
    lock: FileLock | None = None
    mirror: Copy | None = None  # in the process that writes the directory

    @property
    def checkpoints(self) -> Path:
        """The directory of checkpoints."""
        return self.dir / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The file of metrics, a JSON line each."""
        return self.dir / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        """The file that says that the run is complete."""
        return self.dir / MANIFEST

    @property
    def finished(self) -> bool:
        """Is the manifest there?"""
        return is_finished(self.dir)

    def close(self) -> None:
        """Let other processes have it."""
        if self.lock:
            self.lock.release()

    def finish(self, said: dict[str, Any]) -> Manifest:
        """Write manifest.json, last and atomically: from here on the run is complete. said: its fields but for those that every
        run has."""
        by_umask(self.dir)
        record = {"schema": SCHEMA, **said, "config_digest": digest(self.config), "code": code_state()}
        files = {name: value for name, value in file_hashes(self.dir).items() if Path(name).name != CARD}
        record |= {"versions": library_versions(), "files": files}
        manifest = Manifest.model_validate(record)
        write_json(self.manifest, manifest.to_dict())
        (self.dir / STATUS).unlink(missing_ok=True)  # the manifest says it now
        return manifest


def open_run(config: dict[str, Any]) -> Run:
    """Create, or go on with, the run directory that this config asks for.

    Raises UserError when the directory belongs to another config, another process, or cannot be written.
    """
    directory = choose_dir(config)
    refuse_secrets(config)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", blocking=False)
        lock.acquire()
        sweep_leftovers(directory)
        run = Run(directory, config, lock)
        if (directory / CONFIG).exists():
            if not _is_as_written(run) and not run.finished:
                write_config(run)
        elif any(p.name not in (".lock", "job.log") for p in directory.iterdir()):
            raise UserError(f"run.dir: {directory} holds other files and no run; give a new or empty directory")
        else:
            write_config(run)
        free = shutil.disk_usage(directory).free
    except Timeout:
        raise UserError(f"run.dir: another process is at work in {directory}; wait for it or give another run.dir") from None
    except OSError as e:
        raise UserError(f"run.dir: cannot write to {directory}: {e.strerror or e}; give another run.dir") from None
    if free < MIN_FREE_BYTES:
        raise UserError(f"run.dir: only {free / 2**20:.0f} MiB free under {directory}; free some or give another run.dir")
    return run


def refuse_secrets(config: dict[str, Any]) -> None:
    """Raises UserError, without repeating it, for a setting that holds a token or password: before any file has it."""
    if secret := next((key for key, value in flatten(config).items() if redact(str(value)) != str(value)), None):
        raise UserError(f"{secret}: holds a token or password, which would stand in the run's files; leave it in the environment")


def choose_dir(config: dict[str, Any]) -> Path:
    """`run.dir`, or the unfinished default directory of the same config, or a new default directory."""
    if config["run"]["dir"]:
        return Path(config["run"]["dir"]).expanduser()
    parent, short = Path("runs") / config["stage"], digest(config)[:8]
    for old in sorted(parent.glob(f"*-{short}"), reverse=True):
        if not is_finished(old):
            return old
    return parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{short}"


def write_config(run: Run) -> None:
    """Write the run's config.yaml."""
    write_text(run.dir / CONFIG, yaml.safe_dump(run.config, sort_keys=False))


def _is_as_written(run: Run) -> bool:
    """Is the config that of this directory's config.yaml, word for word? UserError where a setting differs that the user has not
    allowed to."""
    stored, now = read_config(run.dir, as_written=True), identity_of(run.config)
    then, _ = as_of_today(identity_of(stored), now)
    compare(then, now, allowed(run.config), f"{run.dir} belongs to another config")
    return digest(stored) == digest(run.config)


def read_config(directory: Path, as_written: bool = False) -> dict[str, Any]:
    """The config that a run was started with, its keys by today's names unless it is wanted as it was written.

    Raises UserError when it cannot be read.
    """
    path = directory / CONFIG
    try:
        found = read_yaml(path)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0]})") from None
    if (
        not isinstance(found, dict)
        or not all(isinstance(found.get(section), dict) for section in _SECTIONS)
        or "stage" not in found
    ):
        raise UserError(f"{path} is no run's config")
    return found if as_written else as_it_ran(current_config(found))
