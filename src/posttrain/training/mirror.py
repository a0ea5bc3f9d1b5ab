"""`run.mirror`: a copy of a run's directory at an address, kept up while it trains, and from which another machine goes on.

Training writes here, as ever. After each checkpoint a thread sends what is new: first the files beside the checkpoints, then the
checkpoint's, of which checkpoint.json comes last. What the run has deleted here is deleted there afterwards. A mirror that fails
ends no training: it is tried again at the next checkpoint and at the end, where it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain.console import say
from posttrain.errors import RunError, UserError
from posttrain.runs.directory import CONFIG, Run, read_config
from posttrain.runs.earlier import as_of_today
from posttrain.runs.files import LIVE, STATUS, TRACKING, scratch_beside
from posttrain.runs.identity import allowed, compare, identity_of
from posttrain.runs.manifest import MANIFEST, read_manifest
from posttrain.runs.remote import Entry, Place, RemoteError
from posttrain.training.checkpoint import FILES, RECORD, newest_checkpoint, steps_in

CHECKPOINTS = "checkpoints"
_NOT_SENT = {CHECKPOINTS, TRACKING, ".lock", MANIFEST, "job.log", ".ray", STATUS}
_AT_THE_END = {"adapter", "model", *LIVE}  # whole with the manifest; until then the page and status are of this machine


class Mirror:
    """Of one run, in the process that writes its directory. behind: why something is not there yet; '' where all is."""

    def __init__(self, address: str, run: Run) -> None:
        self.place, self.run, self.behind = Place(address, "run.mirror"), run, ""
        self._there: dict[str, Entry] = {}
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._sending: Future[None] | None = None

    def begin(self) -> None:
        """Fetch what is there and not here, and try whether it may be written. Raises UserError, before anything is loaded, where
        either cannot be done, and where another run's mirror is there."""
        try:
            found = self.place.read_listing()
            if found is None and self.place.names():
                raise UserError(f"run.mirror: {self.place.url} holds other files and no run; give a new or empty place")
            if found:
                self._there = dict(found.files)
                self._bring()
            else:
                self._there[CONFIG] = self.place.put(self.run.dir / CONFIG, CONFIG)
            self._list()
        except RemoteError as error:
            raise UserError(f"run.mirror: {error}") from None

    def _bring(self) -> None:
        """A finished run, or the newest checkpoint, where that here is older or none."""
        with scratch_beside(self.run.dir / ".mirror") as scratch:
            self.place.fetch(CONFIG, scratch / CONFIG, None)
            then, now = identity_of(read_config(scratch, as_written=True)), identity_of(self.run.config)
            compare(as_of_today(then, now)[0], now, allowed(self.run.config), f"{self.place.url} is of another run", "run.mirror")
        if self.run.finished:
            return
        others = [name for name in self._there if not name.startswith(f"{CHECKPOINTS}/") and name not in (CONFIG, MANIFEST)]
        if MANIFEST in self._there:
            self._fetch([*others, CONFIG, MANIFEST])  # the last: with it the run is finished
            say(f"run.mirror: the finished run was fetched from {self.place.url}")
            return
        steps = _whole_steps(self._there)
        if steps and steps[-1] > self._newest_here():
            self._fetch([*others, *self._of_step(steps[-1])])
            for step in _spared(self.run.checkpoints / _named(steps[-1])) & set(steps):
                self._fetch(self._of_step(step))
            say(f"run.mirror: the checkpoint of step {steps[-1]} was fetched from {self.place.url}")

    def _newest_here(self) -> int:
        with suppress(UserError):  # none is whole: one there will do
            found, _ = newest_checkpoint(self.run.checkpoints)
            return found.step if found else -1
        return -1

    def _of_step(self, step: int) -> list[str]:
        return [f"{CHECKPOINTS}/{_named(step)}/{name}" for name in (*FILES, RECORD)]

    def _fetch(self, names: Iterable[str]) -> None:
        """Those that are not here as they are there, in this order."""
        for name in names:
            file, entry = self.run.dir / name, self._there[name]
            if not (file.is_file() and entry.is_of(file)):
                with scratch_beside(file) as scratch:
                    self.place.fetch(name, scratch / file.name, entry)
                    (scratch / file.name).replace(file)

    @contextmanager
    def saving(self) -> Generator[None]:
        """Around a save, which may delete what is being sent; then what is new is sent, while training goes on."""
        self._settle()
        yield
        names = self._beside()
        self._sending = self._thread.submit(self._send, names)

    def leave(self) -> None:
        """The run stops or fails: what was saved is sent, or it is said that it could not be."""
        self._settle()
        if self.behind:
            self._sending = self._thread.submit(self._send, self._beside())
            self._settle()
        self._thread.shutdown()

    def finish(self) -> None:
        """The run is complete: all of it is sent. Raises RunError where that cannot be."""
        self._settle()
        try:
            self._send(self._beside())
            self._put({**self._listed(), MANIFEST: None})
        except RemoteError as error:
            raise RunError(
                f"the run in {self.run.dir} is finished, and its mirror is not whole: {error}; the same command sends the rest"
            ) from None
        finally:
            self.behind = ""  # it is said
        say(f"run.mirror: all of the run is at {self.place.url}")

    def _settle(self) -> None:
        """Wait for what is being sent. What could not be is said once, and tried again later."""
        if self._sending is None:
            return
        try:
            self._sending.result()
            self.behind = ""
        except RemoteError as error:
            if not self.behind:
                say(f"run.mirror: {error}; training goes on, and it is tried again at the next checkpoint")
            self.behind = str(error)
        self._sending = None

    def _beside(self) -> list[str]:
        """Names of the files that are no checkpoint's, as they are now."""
        skipped = _NOT_SENT if self.run.finished else _NOT_SENT | _AT_THE_END
        files = (file.relative_to(self.run.dir) for file in sorted(self.run.dir.rglob("*")) if file.is_file())
        return [str(name) for name in files if not (name.parts[0] in skipped or any(part.startswith(".") for part in name.parts))]

    def _send(self, beside: list[str]) -> None:
        """Raises RemoteError."""
        self._put(dict.fromkeys(beside))
        steps = steps_in(self.run.checkpoints)
        for step in reversed(steps):
            self._put_checkpoint(self.run.checkpoints / _named(step))
        gone = [step for step in _whole_steps(self._there) if step not in steps and steps and step < steps[-1]]
        if gone:
            self._there = {n: e for n, e in self._there.items() if not any(n in self._of_step(step) for step in gone)}
            self._list()
            for step in gone:
                self.place.remove(f"{CHECKPOINTS}/{_named(step)}")

    def _put_checkpoint(self, path: Path) -> None:
        """What is there of another checkpoint of its name is none any more, before a file of it is changed."""
        files, record = _entries(path), f"{CHECKPOINTS}/{path.name}/{RECORD}"
        if record in self._there and any(self._there.get(name) != entry for name, entry in files.items() if entry):
            del self._there[record]
            self._list()
        self._put(files)

    def _listed(self) -> dict[str, Entry | None]:
        """A finished run's files by its manifest, which will not change any more."""
        files = read_manifest(self.run.dir).files
        return {
            n: Entry((self.run.dir / n).stat().st_size, digest) for n, digest in files.items() if (self.run.dir / n).is_file()
        }

    def _put(self, files: dict[str, Entry | None]) -> None:
        """Those that are not there as they are here, in this order."""
        for name, entry in files.items():
            file = self.run.dir / name
            try:
                now = entry or Entry.of(file)
                if self._there.get(name) == now:
                    continue
                self._there[name] = self.place.put(file, name, entry)
            except FileNotFoundError:  # the run has deleted it meanwhile
                continue
            self._list()

    def _list(self) -> None:
        self.place.write_listing(self._there, whole=MANIFEST in self._there)


def _named(step: int) -> str:
    return f"step-{step:06d}"


def _whole_steps(there: dict[str, Entry]) -> list[int]:
    """Of checkpoints, in order, of which all files are listed."""
    found = [Path(name).parent.name for name in there if name.startswith(f"{CHECKPOINTS}/") and name.endswith(f"/{RECORD}")]
    whole = [each for each in found if all(f"{CHECKPOINTS}/{each}/{name}" in there for name in FILES)]
    return sorted(int(each.removeprefix("step-")) for each in whole)


def _entries(checkpoint: Path) -> dict[str, Entry | None]:
    """A checkpoint's files as its record says; the record comes last."""
    try:
        files = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return {}
    found: dict[str, Entry | None] = {
        f"{CHECKPOINTS}/{checkpoint.name}/{n}": Entry(e["bytes"], e["sha256"]) for n, e in files.items()
    }
    return found | {f"{CHECKPOINTS}/{checkpoint.name}/{RECORD}": None}


def _spared(checkpoint: Path) -> set[int]:
    """Steps whose checkpoints a run that goes on from this one may ask for."""
    state = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))["state"]
    return {step for step in (state.get("within_budget"), (state.get("best") or {}).get("step")) if step is not None}
