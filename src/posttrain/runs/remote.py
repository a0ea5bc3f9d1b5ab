"""Directories at addresses such as s3://bucket/run, through fsspec: fetched whole, and written so that readers see all or none.

Beside the files lies a listing with the size and sha256 of each, which is what there is: a file is listed once it is there, so
that an upload that was cut off goes on with what is missing. Who has the right to read or write is the environment's to say.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from posttrain.console import Meter, say
from posttrain.errors import RunError, UserError, did_you_mean, first_line
from posttrain.runs.cache import cached_directory
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import is_inside, scratch_beside, sha256
from posttrain.runs.identity import content_hash
from posttrain.secrets import redact

T = TypeVar("T")
LISTING = "posttrain.json"
TRIES, PAUSE = 4, 1.0  # of what a network may refuse; seconds before the second, twice as many before each after it
# pathlib makes one slash of two; file:///tmp has three
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):(?:/{1,2}|(?<=file:)/{3})(?=[^/])(.*)")
_NEAR = ["s3", "gs", "hf", "az", "file", "memory", "sftp", "https"]
_PACKAGES = {"s3": "posttrain[remote]", "s3a": "posttrain[remote]", "gs": "posttrain[remote]", "gcs": "posttrain[remote]"}
_KEYS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "HF_TOKEN, or run `hf auth login`",
}


@dataclass(frozen=True)
class Entry:
    """A file that is there, whole."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> Entry:
        """As a file is now."""
        return cls(file.stat().st_size, sha256(file))

    def is_of(self, file: Path) -> bool:
        """Is the file as it says? One of another size is not read."""
        return file.stat().st_size == self.bytes and sha256(file) == self.sha256


@dataclass(frozen=True)
class Listing:
    """What is there, by name below the place. whole: is that all there will be?"""

    files: dict[str, Entry]
    whole: bool


class RemoteError(RunError):
    """What could not be read or written there, in one line without secrets."""


def is_address(name: object) -> bool:
    """Does it say where something is that is not on this disk?"""
    return _ADDRESS.fullmatch(str(name)) is not None


class Place:
    """A directory at `address`. field: the config key or argument that it stands in.

    Raises UserError for an address that is none, a scheme that is not known, a package that is missing, a password in it.
    """

    def __init__(self, address: object, field: str) -> None:
        found = _ADDRESS.fullmatch(str(address))
        if not found:
            raise UserError(f"{field}: '{address}' is no address; write s3://BUCKET/DIRECTORY, gs://... or hf://...")
        self.field, self.scheme = field, found[1]
        self.url = f"{found[1]}://{found[2].rstrip('/')}"
        if found[1] == "file":
            self.url = f"file:///{found[2].strip('/')}"
        if redact(self.url) != self.url:
            raise UserError(f"{field}: the address holds a password, which would stand in files; leave it in the environment")
        self.fs, self.root = self._opened()

    def _opened(self) -> tuple[Any, str]:
        import fsspec
        from fsspec.registry import known_implementations

        if self.scheme not in known_implementations and self.scheme not in fsspec.available_protocols():
            near = did_you_mean(self.scheme, _NEAR)
            raise UserError(f"{self.field}: no '{self.scheme}' is known in {self.url}{near}; write s3://, gs:// or hf://")
        try:
            fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            package = _PACKAGES.get(self.scheme)
            fix = f"pip install '{package}'" if package else first_line(error)
            raise UserError(f"{self.field}: {self.scheme}:// needs a package that is not installed; {fix}") from None
        except Exception as error:  # of every filesystem its own
            raise UserError(f"{self.field}: {self.url} cannot be opened ({self._reason(error)})") from None
        return fs, str(root).rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(self.url).name

    def path(self, name: str) -> str:
        """Of a file below it, as the filesystem has it."""
        return f"{self.root}/{name}"

    def ask(self, do: Callable[[], T], what: str) -> T:
        """What `do` gives, tried again where a network may be why not. Raises RemoteError: `what` could not be done."""
        for left in reversed(range(TRIES)):
            try:
                self.fs.invalidate_cache()
                return do()
            except Exception as error:  # of every filesystem its own
                if not left or _is_final(error):
                    raise RemoteError(f"{self.url}: {what} ({self._reason(error)})") from None
                time.sleep(PAUSE * 2 ** (TRIES - 1 - left))
        raise AssertionError

    def read_listing(self) -> Listing | None:
        """None where there is none. Raises RemoteError, and UserError for one that says what it may not."""

        def read() -> bytes | None:
            try:
                return self.fs.cat_file(self.path(LISTING))
            except FileNotFoundError:
                return None

        content = self.ask(read, "cannot be read")
        return None if content is None else self._parsed(content)

    def _parsed(self, content: bytes) -> Listing:
        try:
            said = json.loads(content)
            files = {name: Entry(int(e["bytes"]), str(e["sha256"])) for name, e in said["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.field}: {self.url}/{LISTING} cannot be read ({first_line(error)}); give another place"
            ) from None
        if odd := next((name for name in files if not is_inside(name)), None):
            raise UserError(f"{self.field}: {self.url}/{LISTING} names {odd!r}, which lies outside of it; give another place")
        return Listing(files, said.get("whole") is True)

    def write_listing(self, files: dict[str, Entry], whole: bool) -> None:
        """Have the listing say that these are there."""
        said = {name: asdict(entry) for name, entry in sorted(files.items())}
        content = json.dumps({"whole": whole, "files": said}, indent=1).encode()
        self.ask(lambda: self.fs.pipe_file(self.path(LISTING), content), "cannot be written")

    def put(self, file: Path, name: str, entry: Entry | None = None) -> Entry:
        """A file there, under `name`. entry: what it is, where that is known and it will not change; else a copy is taken first.
        Raises FileNotFoundError where the file has gone."""
        target = self.path(name)
        if not self.fs.async_impl:  # who has real directories; a store of objects would make a bucket
            self.ask(lambda: self.fs.makedirs(target.rpartition("/")[0], exist_ok=True), f"{name} cannot be written")
        if entry is None:
            content = file.read_bytes()
            entry = Entry(len(content), hashlib.sha256(content).hexdigest())
            self.ask(lambda: self.fs.pipe_file(target, content), f"{name} cannot be written")
        else:
            file.stat()
            self.ask(lambda: self.fs.put_file(str(file), target), f"{name} cannot be written")
        size = self.ask(lambda: self.fs.size(target), f"{name} cannot be read again")
        if size != entry.bytes:
            raise RemoteError(f"{self.url}: {name} has {size} bytes there, and {entry.bytes} here")
        return entry

    def fetch(self, name: str, file: Path, entry: Entry | None) -> None:
        """The file of this name at `file`. Raises RemoteError, also where it is not as it is listed."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self.ask(lambda: self.fs.get_file(self.path(name), str(file)), f"{name} cannot be read")
        if entry and not entry.is_of(file):
            raise RemoteError(f"{self.url}: {name} is damaged there: its sha256 is not the one that is listed")

    def remove(self, name: str) -> None:
        """A directory below it, with all that it holds."""
        path = self.path(name)
        self.ask(lambda: self.fs.rm(path, recursive=True) if self.fs.exists(path) else None, f"{name} cannot be deleted")

    def names(self, under: str = "") -> list[str]:
        """Of all files below it, or below a directory of it, whatever the listing says."""
        start = self.path(under) if under else self.root

        def find() -> list[str]:
            try:
                return [str(path) for path in self.fs.find(start)]
            except FileNotFoundError:
                return []

        return [path.split(f"{self.root.strip('/')}/", 1)[-1] for path in self.ask(find, "cannot be read")]

    def state(self, name: str) -> str:
        """What tells a file from an earlier one of its name, without reading it."""
        return str(self.ask(lambda: self.fs.ukey(self.path(name)), f"{name} cannot be read"))

    def _reason(self, error: BaseException) -> str:
        """In words, without secrets."""
        kind, line = type(error).__name__, redact(first_line(error))
        if "Credentials" in kind or "credentials" in line.lower() or "anonymous caller" in line.lower():
            return f"no credentials, or none that are taken; set {_KEYS.get(self.scheme, 'those of its filesystem')}"
        if isinstance(error, PermissionError) or "Forbidden" in line or "401" in line or "403" in line:
            return f"the credentials may not do that: {line}"
        if isinstance(error, FileNotFoundError) or "NoSuchBucket" in line:
            return "there is no such bucket or directory"
        return line


def _is_final(error: Exception) -> bool:
    """Will trying again not help?"""
    said = f"{type(error).__name__} {error}"
    return isinstance(error, FileNotFoundError | PermissionError | NotImplementedError) or any(
        word in said for word in ("Credentials", "NoSuchBucket", "Forbidden", "Unauthorized", "RepositoryNotFound")
    )


def here(name: T, field: str) -> T | Path:
    """The directory on this disk that an address stands for: fetched into the cache, once for each state of what is there.
    Anything else as it is. Raises UserError where it cannot be had."""
    if not is_address(name):
        return name
    place = Place(name, field)
    try:
        listed = place.read_listing()
        names = {n: e.sha256 for n, e in listed.files.items()} if listed else {n: place.state(n) for n in place.names()}
    except RemoteError as error:
        raise UserError(f"{field}: {error}") from None
    if listed and not listed.whole:
        raise UserError(f"{field}: {place.url} is not whole yet; end what writes it first, with its own command")
    wanted = {n: state for n, state in names.items() if not n.startswith("checkpoints/") and is_inside(n)}
    if not wanted:
        raise UserError(f"{field}: there is nothing at {place.url}")
    files = listed.files if listed else {}

    def fill(directory: Path) -> str:
        with Meter(f"fetching {place.name}", len(wanted)) as meter:
            for each in wanted:
                place.fetch(each, directory / each, files.get(each))
                meter.advance()
        return place.url

    try:
        found, _ = cached_directory(cache_root() / "remote" / f"{place.name}-{content_hash(place.url, wanted)[:8]}", fill)
    except RemoteError as error:
        raise UserError(f"{field}: {error}") from None
    say(f"{field}: {place.url} is in {found}")
    return found


@contextmanager
def result_at(out: Path) -> Generator[Path]:
    """Where a new directory is to be made that will lie at `out`: there, or where `out` is an address in a temporary directory,
    which is uploaded when the block has ended well. Raises UserError, before the block, where nothing can be written there."""
    if not is_address(out):
        yield out
        return
    place = Place(out, "--out")
    try:
        there = place.read_listing()
        if there.whole if there else place.names():
            raise UserError(f"--out: {place.url} exists already; give a new directory")
        done = there.files if there else {}
        place.write_listing(done, whole=False)  # may it be written there?
    except RemoteError as error:
        raise UserError(f"--out: {error}") from None
    with scratch_beside(cache_root() / "remote" / place.name) as scratch:
        yield scratch / place.name
        upload(scratch / place.name, place, done)
    say(f"uploaded to {place.url}")


def upload(directory: Path, place: Place, there: dict[str, Entry]) -> None:
    """All files of a directory that `there` does not have; the listing says that it is whole when all are there."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    entries = {str(file.relative_to(directory)): Entry.of(file) for file in files}
    done = {name: entry for name, entry in there.items() if entries.get(name) == entry}
    with Meter(f"uploading {place.name}", len(entries)) as meter:
        for name, entry in entries.items():
            if name not in done:
                done[name] = place.put(directory / name, name, entry)
                place.write_listing(done, whole=False)
            meter.advance()
    place.write_listing(entries, whole=True)
