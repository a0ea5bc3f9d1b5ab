"""A run's directory on disk: who owns it, what it was asked for, and the manifest that says it is complete. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from posttrain.errors import UserError
from posttrain.runs.identity import NOT_PART_OF_A_RUN, digest
from posttrain.secrets import redact

SCHEMA = 1
MIN_FREE_BYTES = 64 * 2**20


@dataclass
class Run:
    """An opened run directory, locked for this process until it ends."""

    dir: Path
    config: dict[str, Any]
    lock: FileLock | None = None

    @property
    def checkpoints(self) -> Path:
        return self.dir / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.dir / "metrics.jsonl"

    @property
    def manifest(self) -> Path:
        return self.dir / "manifest.json"

    @property
    def finished(self) -> bool:
        return self.manifest.exists()

    def close(self) -> None:
        """Let other processes have it."""
        if self.lock:
            self.lock.release()

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Write manifest.json, last and atomically: from here on the run is complete."""
        record = {"schema": SCHEMA, **manifest, "config_digest": digest(self.config), "code": code_state()}
        record |= {"versions": library_versions(), "files": file_hashes(self.dir)}
        write_json(self.manifest, record)
        return record


def open_run(config: dict[str, Any]) -> Run:
    """Create, or go on with, the run directory that this config asks for.

    Raises UserError when the directory belongs to another config, another process, or cannot be written.
    """
    directory = choose_dir(config)
    if secret := next((key for key, value in flatten(config).items() if redact(str(value)) != str(value)), None):
        raise UserError(f"{secret}: holds a token or password, which would stand in the run's files; leave it in the environment")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock", blocking=False)
        lock.acquire()
        run = Run(directory, config, lock)
        if (directory / "config.yaml").exists():
            if _allowed_changes(run):
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


def choose_dir(config: dict[str, Any]) -> Path:
    """`run.dir`, or the unfinished default directory of the same config, or a new default directory."""
    if config["run"]["dir"]:
        return Path(config["run"]["dir"]).expanduser()
    parent, short = Path("runs") / config["stage"], digest(config)[:8]
    for old in sorted(parent.glob(f"*-{short}"), reverse=True):
        if not (old / "manifest.json").exists():
            return old
    return parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{short}"


def write_config(run: Run) -> None:
    write_text(run.dir / "config.yaml", yaml.safe_dump(run.config, sort_keys=False))


def _allowed_changes(run: Run) -> list[str]:
    """Lines on what is not as this directory's config.yaml has it; UserError where the user has not allowed that."""
    then, now = identity_of(read_config(run.dir)), identity_of(run.config)
    return compare(then, now, allowed(run.config), f"{run.dir} belongs to another config")


def identity_of(config: dict[str, Any]) -> dict[str, Any]:
    """By key, every setting that makes a run itself."""
    return {key: value for key, value in flatten(config).items() if key.split(".")[0] not in NOT_PART_OF_A_RUN}


def allowed(config: dict[str, Any]) -> list[str]:
    """The keys that resume.allow names."""
    keys = config["resume"]["allow"]
    return [keys] if isinstance(keys, str) else list(keys or [])


def compare(then: dict[str, Any], now: dict[str, Any], allow: list[str], whose: str) -> list[str]:
    """A line for each key that has changed. Raises UserError unless `allow` has it, or a section of it."""
    changed = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    lines = [f"{key} was {then.get(key)}, is now {now.get(key)}" for key in changed]
    refused = [line for key, line in zip(changed, lines, strict=True) if not any(f"{key}.".startswith(f"{a}.") for a in allow)]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        allow_it = f"resume.allow={refused[0].split()[0]}"
        raise UserError(
            f"run.dir: {whose}: {'; '.join(refused[:3])}{more}; give another run.dir, the same settings, or {allow_it}"
        )
    return lines


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {"optim.lr": 0.001, ...}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def read_config(directory: Path) -> dict[str, Any]:
    """The config that a run was started with. Raises UserError when it cannot be read."""
    path = directory / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"{path} cannot be read ({str(e).splitlines()[0]})") from None
    if (
        not isinstance(found, dict)
        or not all(isinstance(found.get(section), dict) for section in _SECTIONS)
        or "stage" not in found
    ):
        raise UserError(f"{path} is no run's config")
    return found


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises UserError when there is none or it cannot be read."""
    path = directory / "manifest.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory} is no finished run (no manifest.json)") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    if wrong := _what_is_wrong(found):
        raise UserError(f"{path} is no manifest of a run: {wrong}")
    return found


def _what_is_wrong(manifest: Any) -> str:
    """Empty where a manifest has the parts that others rely on, and names no file outside of its directory."""
    if not isinstance(manifest, dict):
        return "it is no object"
    for name, kind in _PARTS.items():
        if name in manifest and not isinstance(manifest[name], kind):
            return f"{name} is {type(manifest[name]).__name__}, not {kind.__name__}"
        if name not in manifest and name not in _OPTIONAL:
            return f"{name} is missing"
    weights = manifest["weights"]
    if weights.get("kind") not in ("adapter", "model") or not is_inside(weights.get("path")):
        return "weights.kind or weights.path"
    outside = next((name for name, value in manifest["files"].items() if not is_inside(name) or not isinstance(value, str)), None)
    if outside is not None:
        return f"files has {outside!r}"
    odd = next((name for name, value in manifest["metrics"].items() if not is_number(value)), None)
    return f"metrics.{odd} is no number" if odd is not None else ""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_inside(name: Any) -> bool:
    """Is it the name of something within a directory?"""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


_PARTS: dict[str, type] = {
    **dict.fromkeys(("weights", "files", "metrics", "base", "tokenizer", "quant", "peft", "identity", "made_with"), dict),
    **dict.fromkeys(("parents", "data", "changes"), list),
    **dict.fromkeys(("stage", "config_digest"), str),
}
_OPTIONAL = {"tokenizer", "quant", "peft", "parents", "data", "identity", "made_with", "changes", "base"}
_SECTIONS = ("model", "data", "train", "optim", "run")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def checked_weights(directory: Path, manifest: dict[str, Any], field: str) -> Path:
    """The directory of a finished run's weights. Raises UserError, about `field`, where a file is not as its manifest says."""
    prefix = manifest["weights"]["path"] + "/"
    listed = {name: expected for name, expected in manifest["files"].items() if name.startswith(prefix)}
    if not any(name.endswith(".safetensors") for name in listed):
        raise UserError(f"{field}: the manifest of {directory} lists no safetensors file; give a run made by posttrain")
    if pickle := next((p for p in sorted((directory / prefix).rglob("*")) if p.suffix in PICKLES), None):
        raise UserError(f"{field}: {pickle} may be a pickle, which can run code; posttrain reads none, remove it")
    for name, expected in listed.items():
        if not (directory / name).exists():
            raise UserError(f"{field}: {directory / name} is missing, though the run's manifest lists it")
        if sha256(directory / name) != expected:
            raise UserError(f"{field}: {directory / name} is damaged: its sha256 is not the one in the run's manifest")
    return directory / manifest["weights"]["path"]


def parent_record(role: str, directory: Path) -> dict[str, str]:
    """One entry of a manifest's `parents`; the digest is that of the parent's own manifest."""
    return {"role": role, "path": str(directory), "digest": sha256(directory / "manifest.json")}


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of the result; checkpoints have records of their own."""
    skip = {"checkpoints", ".lock", "manifest.json"}
    files = (p for p in sorted(directory.rglob("*")) if p.is_file())
    wanted = (p for p in files if p.relative_to(directory).parts[0] not in skip)
    return {str(p.relative_to(directory)): sha256(p) for p in wanted}


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int:
    return shutil.disk_usage(directory).free


def write_text(path: Path, text: str) -> None:
    """Complete or absent: beside, flushed, renamed; without secrets."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as f:
        f.write(redact(text))
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def library_versions() -> dict[str, str]:
    import platform

    found = {"python": platform.python_version()}
    for name in ("posttrain", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_state() -> dict[str, Any]:
    """Commit and dirtiness of the checkout this code runs from; nulls for an installed package."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        tracked = bool(git("ls-files", "directory.py"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))} if tracked else _NO_GIT
    except (OSError, subprocess.CalledProcessError):
        return _NO_GIT


_NO_GIT: dict[str, Any] = {"commit": None, "dirty": None}
