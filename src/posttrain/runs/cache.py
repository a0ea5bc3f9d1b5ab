"""The one folder for what can be made again: converted models, tokenised data, reference log-probs, measurements.

A file in it is whole or not there, knows its own checksum, and may be asked for by any number of processes at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.console import say
from posttrain.errors import first_line, is_out_of_memory
from posttrain.runs.cache_place import FORBIDS, detour_of, hold, locked, make_directory, place_of, refused, release, used
from posttrain.runs.files import by_umask, file_hashes, replacing, scratch_beside, sha256

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
NOTE = "source.json"  # in a directory: where its content is from, and its files
READ_WHOLE = 2**30  # bytes of a directory's file; of a larger one the size is compared
CHECKSUM = "sha256"  # the key of a file's metadata that holds it


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


def cached_directory(directory: Path, make: Callable[[Path], str], *, whole: bool = False) -> tuple[Path, str]:
    """`directory`, filled by `make` where it is not there or damaged, and what `make` said of the content's origin.

    It is made elsewhere where the cache may not be written (`place_of`), and returned as held: `release` it, once read.

    Args:
        make: gets a path that is not there yet. Only who makes it writes and locks, so that a cache for reading alone will do.
        whole: whether files of any size are read and checked, not only those up to READ_WHOLE.

    Raises UserError or RunError, about the directory, where it can be written nowhere.
    """
    hold(directory)
    if (origin := _origin(directory, whole)) is not None:
        return directory, origin
    release(directory)
    place = place_of(directory)
    if place != directory:
        return cached_directory(place, make, whole=whole)
    try:
        make_directory(directory.parent)
        with locked(directory):
            if (origin := _origin(directory, whole, quietly=True)) is None:  # nobody else has made it meanwhile
                origin = _fill(directory, make)
    except OSError as error:
        if not _is_of(error, directory.parent):
            raise
        place = detour_of(directory, error.strerror or "") if error.errno in FORBIDS else directory
        if place != directory:  # what another user has left there is not to be replaced
            return cached_directory(place, make, whole=whole)
        raise refused(directory, error) from None
    except Exception as error:
        if "os error 28" in str(error):  # of safetensors
            raise refused(directory, OSError(errno.ENOSPC, "the disk is full")) from None
        raise
    hold(directory)
    return directory, origin


def _is_of(error: OSError, directory: Path) -> bool:
    """Is it about a file there, or on the way there? One without a name is, if only writing ends so."""
    if error.filename:
        file = Path(str(error.filename))
        return file.is_relative_to(directory) or directory.is_relative_to(file)
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _fill(directory: Path, make: Callable[[Path], str]) -> str:
    with scratch_beside(directory) as scratch:
        made = scratch / directory.name
        origin = make(made)
        by_umask(made)
        files = {name: {"bytes": (made / name).stat().st_size, "sha256": value} for name, value in file_hashes(made).items()}
        note = {"origin": origin, "files": files}
        (made / NOTE).write_text(json.dumps(note | {CHECKSUM: _sha256_of_note(note)}), encoding="utf-8")
        if directory.exists():  # damaged
            directory.rename(scratch / "damaged")
        made.rename(directory)
    return origin


@lru_cache
def _check(note: Path, whole: bool, stats: tuple[tuple[str, int, int], ...]) -> None:
    """Raises ValueError where a directory's files are not as its note says, and OSError. stats: name, size, time of each."""
    files = json.loads(note.read_text(encoding="utf-8")).get("files", {})
    for name, size, _ in stats:
        each = files[name]
        wanted = whole or size <= READ_WHOLE
        if size != each["bytes"] or (wanted and sha256(note.parent / name) != each["sha256"]):
            raise ValueError(f"{name} is not as it was written")


def _sha256_of_note(note: dict[str, Any]) -> str:
    return _sha256_of_text(json.dumps(note, sort_keys=True))


def _origin(directory: Path, whole: bool, quietly: bool = False) -> str | None:
    note = directory / NOTE
    try:
        if not note.exists():
            return None
        told = json.loads(note.read_text(encoding="utf-8"))
        if told.pop(CHECKSUM, None) not in (None, _sha256_of_note(told)):  # earlier versions have none
            raise ValueError(f"{NOTE} is not as it was written")
        stats = ((name, (directory / name).stat()) for name in told.get("files", {}))  # version 0.1 has none
        _check(note, whole, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
        origin = told["origin"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if not quietly:
            say(f"cache: {directory} is damaged ({first_line(error)}); it is made again")
        return None
    used(directory)
    return origin


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
    place = place_of(path)
    try:
        make_directory(place.parent)
        with replacing(place) as temporary:
            fill(temporary)
    except OSError as error:
        if error.errno in FORBIDS and (elsewhere := detour_of(path, error.strerror or "")) != place:
            _write(elsewhere, fill)
            return
        say(f"cache: {place} could not be written ({error}); the next run has to make it again")


def _cached(
    path: Path,
    read: Callable[[Path], T | None],
    make: Callable[[], T],
    write: Callable[[Path, T], None],
    writes: bool,
    agree: Callable[[bool], bool],
) -> T:
    found = _read_or_none(path, read)
    if found is None and (place := place_of(path)) != path:
        found = _read_or_none(place, read)
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
        found = read(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if is_out_of_memory(error):
            raise
        say(f"cache: {path} is damaged ({first_line(error)}); it is made again")
        return None
    used(path)
    return found


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
