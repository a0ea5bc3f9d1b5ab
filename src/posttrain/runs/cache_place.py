"""Where the cache is, what lies in it, who is at work in it, and what happens where it may not be written."""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from posttrain.console import say
from posttrain.errors import RunError, UserError
from posttrain.runs.files import temporary_beside

try:
    import fcntl
except ImportError:  # not on Windows, which lets nobody delete what is open
    fcntl = None

FORBIDS = (errno.EACCES, errno.EPERM, errno.EROFS)  # what a system says to who may not write
NO_PLACE = (*FORBIDS, errno.ENOTDIR, errno.EEXIST)  # and where the cache can be no directory
_held = dict[tuple[str, int], int]()  # path and inode -> what holds it


class Kind(NamedTuple):
    """What lies in the cache under `pattern`. again: whether the next run that lacks it makes it by itself."""

    name: str
    pattern: str
    about: str
    again: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind("models", "models/*-v1", "the built-in models (tiny, smollm2)"),
        Kind("merged", "models/merged-*", "bases of runs with chain.mode=merge, needed as long as those are used", False),
        Kind("layers", "layers/*", "the layers of bases that are not held in memory (train.offload=layers)"),
        Kind("pipelines", "pipelines/*", "the built-in diffusion pipelines"),
        Kind("data", "data/*", "rows as tokens"),
        Kind("digests", "digests/*", "sha256 of models' weights"),
        Kind("measured", "measured/*", "figures of eval.sets"),
        Kind("reference", "reference/*", "log-probs of DPO's reference"),
        Kind("difficulty", "difficulty/*", "how hard rows are, for a curriculum"),
        Kind("fisher", "fisher/*", "Fisher information, for EWC"),
        Kind("replay", "replay/*", "texts that a base has written (data.replay)"),
        Kind("answers", "answers/*", "answers that posttrain eval has scored"),
        Kind("judged", "judged/*", "what a judge has said of answers"),
        Kind("latents", "latents/*", "pictures as latents"),
        Kind("class_images", "class_images/*", "pictures for prior preservation"),
        Kind("remote", "remote/*", "what was fetched from addresses such as s3://, needed as long as it is used", False),
        Kind("runs", "runs/*", "files of runs whose directory is on another machine"),
    )
}


def cache_root() -> Path:
    """$POSTTRAIN_CACHE, or posttrain in the platform's cache directory."""
    if chosen := os.environ.get("POSTTRAIN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "posttrain"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "posttrain"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "posttrain"


def cache_places() -> list[Path]:
    """The cache, and where it may not be written the directory that has what was made in its place."""
    detour = _detour_path()
    return [cache_root(), *([detour] if detour and _is_mine(detour) else [])]


def place_of(path: Path) -> Path:
    """`path`, if its directory may be written; else the same name in a temporary directory of this user, which is said once."""
    reason = _refusal(path.parent)
    return detour_of(path, reason) if reason else path


def detour_of(path: Path, reason: str) -> Path:
    """`path`'s name in the temporary directory. reason: why it may not be written. Raises UserError where that cannot be had."""
    detour = _detour()
    if detour is None:
        raise refused(path, OSError(errno.EACCES, reason))
    if path.is_relative_to(detour):
        return path
    _say_once(path.parent.parent, reason, detour)
    place = detour / path.parent.name / path.name
    place.parent.mkdir(exist_ok=True)
    return place


def make_directory(directory: Path) -> None:
    """With the permissions of the one above it: what several users may write stays so."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not directory.is_dir():
        directory.mkdir(exist_ok=True)
        with suppress(OSError):
            directory.chmod(stat.S_IMODE(directory.parent.stat().st_mode))


def refused(path: Path, error: OSError) -> UserError | RunError:
    """What to raise where what a run needs cannot be put into the cache: UserError for who may not write there."""
    kind = UserError if error.errno in NO_PLACE else RunError
    said = error.strerror or str(error)
    return kind(f"cache: {path} cannot be written ({said}); free some space there, or set POSTTRAIN_CACHE to another directory")


def used(path: Path) -> None:
    """It is as old as its last use; who may not write it leaves it as it is."""
    with suppress(OSError):
        os.utime(path)


@contextmanager
def locked(path: Path, wait: bool = True) -> Generator[None]:
    """Be the only one at work on `path`, of all users. Raises Timeout, without `wait`, where another is."""
    file = f"{path}.lock"
    with FileLock(file, timeout=-1 if wait else 0, mode=0o666):
        try:
            yield
        finally:
            with suppress(OSError):  # those who wait for it find what was made, by whatever lock
                os.unlink(file)


def hold(directory: Path) -> None:
    """Have `posttrain cache clean` leave a directory alone until this process ends, or `release`."""
    if fcntl is None:
        return
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        key = (str(directory), os.fstat(descriptor).st_ino)
        if key in _held:
            os.close(descriptor)
            return
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _held[key] = descriptor


def release(directory: Path) -> None:
    """It has been read, or is mapped into memory: whoever cleans may have it."""
    for key in [key for key in _held if key[0] == str(directory)]:
        os.close(_held.pop(key))


@contextmanager
def unused(path: Path) -> Generator[bool]:
    """Whether nobody makes or holds `path`; meanwhile nobody begins to."""
    try:
        with locked(path, wait=False):
            if fcntl is None or not path.is_dir():
                yield True
                return
            descriptor = os.open(path, os.O_RDONLY)
            try:
                yield _alone(descriptor)
            finally:
                os.close(descriptor)
    except Timeout:
        yield False


def _alone(descriptor: int) -> bool:
    assert fcntl
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@lru_cache
def _refusal(directory: Path) -> str:
    """Why nothing may be written into `directory`, in the system's words; '' where it may."""
    try:
        there = next(path for path in (directory, *directory.parents) if path.is_dir())  # who only reads makes no directory
        probe = temporary_beside(there / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in FORBIDS:
            return error.strerror or str(error)
    return ""


@lru_cache
def _say_once(root: Path, reason: str, detour: Path) -> None:
    say(f"cache: {root} may not be written ({reason}); what it lacks is made in {detour}")


@lru_cache
def _detour() -> Path | None:
    """A directory that is this user's alone; None where there is none to be had."""
    path = _detour_path()
    try:
        if path:
            path.mkdir(mode=0o700, exist_ok=True)
        return path if path and _is_mine(path) else Path(tempfile.mkdtemp(prefix="posttrain-cache-"))
    except OSError:
        return None


def _detour_path() -> Path | None:
    """Where a user's next process finds it again; None where a system has no numbers for users."""
    return Path(tempfile.gettempdir()) / f"posttrain-cache-{os.getuid()}" if hasattr(os, "getuid") else None


def _is_mine(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
