"""Files of a run directory and of the cache: written complete or not at all, named by their content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.secrets import redact

_UMASK = os.umask(0o022)
os.umask(_UMASK)  # it can only be read by setting it
HOST = re.sub(r"\W", "_", platform.node()) or "here"
STATUS, PAGE = "status.json", "report.html"
LIVE = (STATUS, PAGE)  # of a run's directory: what tells of it while it goes on, and is no part of the result
TRACKING = "tracking"  # in a run's directory: what belongs to its tracker, and is no part of the result
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}  # suffixes of files that can run code when they are read


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def code_digest(directory: Path) -> str:
    """sha256 over the names and contents of a directory's Python files, at any depth."""
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        found.update(f"{file.relative_to(directory)} {sha256(file)}\n".encode())
    return found.hexdigest()


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of the result; checkpoints have records of their own."""
    others = {"job.log", ".ray"}  # who still write
    skip = {"checkpoints", TRACKING, ".lock", "manifest.json", *others, *LIVE}
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and stays_inside(p, directory))
    wanted = (p for p in files if p.relative_to(directory).parts[0] not in skip)
    return {str(p.relative_to(directory)): sha256(p) for p in wanted}


def stays_inside(path: Path, directory: Path) -> bool:
    """Does it lie in `directory`, all links followed? In a snapshot of the hub's cache the repository's blobs count as within."""
    root = directory.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    return path.resolve().is_relative_to(root)


def copy_own(files: Iterable[Path], directory: Path, out: Path, listed: Collection[str] | None = None) -> list[str]:
    """Copy files of `directory` to `out`, but for links that lead out of it and what is not `listed`; returns those' names."""
    left: list[str] = []
    for file in sorted(files):
        if stays_inside(file, directory) and file.is_file() and (listed is None or file.name in listed):
            shutil.copyfile(file, out / file.name)
        else:
            left.append(file.name)
    return left


def by_umask(path: Path) -> None:
    """Give a file, or all below a directory, the permissions that the umask says: safetensors makes files for one user."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(directory: Path) -> int:
    """Free space on the disk of a directory."""
    return shutil.disk_usage(directory).free


def is_inside(name: Any) -> bool:
    """Is it the name of something within a directory?"""
    return isinstance(name, str) and bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def temporary_beside(path: Path) -> Path:
    """A hidden name that no other process uses, and that says whose it is: of this machine and process."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def sweep_leftovers(directory: Path) -> None:
    """Take away what processes of this machine that are gone have left in a directory under names of `temporary_beside`."""
    for path in directory.glob(f".*.{HOST}-*-*.tmp"):
        found = re.fullmatch(rf".*\.{HOST}-(\d+)-[0-9a-f]{{8}}\.tmp", path.name)
        if found and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


@contextmanager
def scratch_beside(path: Path) -> Generator[Path]:
    """A new directory beside `path`, for what is to take its place; what earlier ones have left there is swept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(path.parent)
    scratch = temporary_beside(path)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A new file beside `path`, under a name that no other process uses; it takes `path`'s place when the block ends well.

    Whoever reads `path` sees the old content or the new one, never a part, and so does the disk after a power cut.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        by_umask(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Complete or absent, in UTF-8, without secrets."""
    with replacing(path) as temporary:
        temporary.write_text(redact(text), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, indented."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")
