"""The one folder for what can be made again: converted models, tokenised data, reference log-probs, measurements.

A file in it is whole or not there, knows its own checksum, and may be asked for by any number of processes at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.console import say
from posttrain.runs.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
CHECKSUM = "sha256"  # the key of a file's metadata that holds it


def cache_root() -> Path:
    """$POSTTRAIN_CACHE, or posttrain in the platform's cache directory."""
    if chosen := os.environ.get("POSTTRAIN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "posttrain"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "posttrain"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "posttrain"


def alone(mine: bool) -> bool:
    """What all processes say, where there is one."""
    return mine


def cached_tensors(
    path: Path, make: Callable[[], dict[str, Tensor]], *, writes: bool = True, agree: Callable[[bool], bool] = alone
) -> dict[str, Tensor]:
    """The tensors of the safetensors file at `path`; where it is not there, or damaged, those of `make`, which are written to it.

    Args:
        make: Called by every process or by none, so it may have parts in which all of them work together.
        writes: Whether this process is the one that writes.
        agree: Whether all processes of the run say yes. A file that only some of them have (another run has just written it; the
            disks are not shared) is made by all.

    Returns:
        Name -> tensor, as `make` left it (on its device) or on the CPU.
    """
    return _cached(path, _read_tensors, make, write_tensors, writes, agree)


def cached_json(path: Path, make: Callable[[], T], *, writes: bool = True, agree: Callable[[bool], bool] = alone) -> T:
    """The same for a value that JSON can hold, and returns as it was."""
    return _cached(path, _read_json, make, write_cached_json, writes, agree)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """As `cached_tensors` reads them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"format": "pt", CHECKSUM: _sha256_of(kept)}

    def fill(file: Path) -> None:
        try:
            save_file(kept, file, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    _write(path, fill)


def write_cached_json(path: Path, value: Any) -> None:
    """As `cached_json` reads it."""
    text = json.dumps({CHECKSUM: _sha256_of_text(json.dumps(value)), "content": value}, indent=2)
    _write(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    """What the disk refuses is said, and not raised: it can be made again, and the run goes on with what it has."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            fill(temporary)
    except OSError as error:
        say(f"cache: {path} could not be written ({error}); the next run has to make it again")


def _cached(
    path: Path,
    read: Callable[[Path], T | None],
    make: Callable[[], T],
    write: Callable[[Path, T], None],
    writes: bool,
    agree: Callable[[bool], bool],
) -> T:
    found = _read_or_none(path, read)
    if agree(found is not None):
        assert found is not None
        return found
    made = make()
    if writes:
        write(path, made)
    return made


def _read_or_none(path: Path, read: Callable[[Path], T | None]) -> T | None:
    """None, with a word where there is something that is not whole."""
    if not path.exists():
        return None
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        say(f"cache: {path} is damaged ({(str(error).splitlines() or [type(error).__name__])[0]}); it is made again")
        return None


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """None for a file of version 0.1, which has no checksum. Raises ValueError for what is not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(CHECKSUM)
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if expected is not None and _sha256_of(found) != expected:
        raise ValueError("it does not match its checksum")
    return found if expected is not None else None


def _read_json(path: Path) -> Any:
    """None for a file of version 0.1, which has no checksum. Raises ValueError for what is not as it was written."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if CHECKSUM not in found:
        return None
    if found[CHECKSUM] != _sha256_of_text(json.dumps(found["content"])):
        raise ValueError("it does not match its checksum")
    return found["content"]


def _sha256_of(tensors: dict[str, Tensor]) -> str:
    """Of names, types, shapes and all bytes."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
