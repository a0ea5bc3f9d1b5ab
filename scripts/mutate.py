"""Does a test fail where the code is wrong? Faults of scripts/faults.toml, one at a time, each with the tests that should see it.

    python scripts/mutate.py                    # all of them; exit code 1 where one survives
    python scripts/mutate.py --only 'KL|clip'   # those whose name matches
    python scripts/mutate.py --list             # their names
    python scripts/mutate.py --write            # all of them, and the table goes to docs/testing.md

A fault is put into a copy of the package in a temporary directory; the working tree is only read. Its tests run in a process of
their own with a cache of their own, so that nothing that a fault has computed reaches the next one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "scripts" / "faults.toml"
PAGE = ROOT / "docs" / "testing.md"
BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"
COPIED = ("src", "tests", "configs", "recipes", "docs", "pyproject.toml")
LIMIT = 300  # seconds for the tests of one fault; a fault that makes them hang is caught too
# imported once, before the processes fork; nothing of ours is among them
PRELOADED = ["pytest", "torch", "accelerate", "peft", "transformers.models.llama.modeling_llama", "safetensors.torch", "pydantic"]
# a run must not ask the hub, and as many threads as processes are enough
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Fault:
    """file: below src/posttrain, or a pattern of files. old: what stands there once in all of them; new: what takes its place.
    tests: files or node ids of pytest, one of which must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """by: the first test that failed; empty where none did. trouble: why nothing can be said."""

    by: str
    seconds: float
    trouble: str = ""


def read_faults(only: str = "") -> list[Fault]:
    found = [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in tomllib.loads(TABLE.read_text())["fault"]]
    return [fault for fault in found if re.search(only, fault.name)]


def place_of(fault: Fault, root: Path = ROOT) -> Path:
    """The file that holds the snippet. Raises ValueError unless it stands exactly once: then the table is stale."""
    files = {path: path.read_text().count(fault.old) for path in sorted((root / "src" / "posttrain").glob(fault.file))}
    if sum(files.values()) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} stands {sum(files.values())} times in {fault.file}; mend {TABLE.name}")
    return next(path for path, count in files.items() if count)


class Workshop:
    """A copy of the package and its tests. seed: a cache that holds the built-in models."""

    def __init__(self, directory: Path, seed: Path) -> None:
        self.home, self.cache, self.seed = directory / "copy", directory / "cache", seed
        self.home.mkdir(parents=True)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.home / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, self.home / name)

    def judge(self, fault: Fault, number: int) -> Verdict:
        """number: of the fault, which no other has."""
        path = place_of(fault, self.home)
        kept, times = path.read_text(), path.stat()
        path.write_text(kept.replace(fault.old, fault.new))
        # compiled files are told apart by second and size alone, which two faults of one file may share
        os.utime(path, (1e9 + number, 1e9 + number))
        try:
            return self.run(fault.tests)
        finally:
            path.write_text(kept)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def run(self, tests: tuple[str, ...], limit: float = LIMIT) -> Verdict:
        shutil.rmtree(self.cache, ignore_errors=True)
        if self.seed.is_dir():
            shutil.copytree(self.seed, self.cache)
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_tests, args=(self.home, self.cache, tests, theirs))
        began = time.monotonic()
        process.start()
        theirs.close()
        process.join(limit)
        seconds = time.monotonic() - began
        if process.is_alive():
            process.kill()
            return Verdict("(they hang)", seconds)
        if not ours.poll():
            return Verdict("(they crash)", seconds)
        code, failed = ours.recv()
        if code not in (0, 1):
            said = (self.home.parent / "said.txt").read_text().strip().splitlines()
            return Verdict("", seconds, f"the tests do not run: {said[-1] if said else f'exit code {code}'}")
        return Verdict(failed, seconds)


class Watch:
    """A plugin of pytest's: the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _tests(home: Path, cache: Path, tests: tuple[str, ...], answer: Connection) -> None:
    """In a process of its own: the copy's tests on the copy's package."""
    import pytest

    os.environ |= {"POSTTRAIN_CACHE": str(cache), "PYTHONPATH": str(home / "src")}
    os.chdir(home)
    sys.path[:0] = [str(home / "src"), str(home)]
    with (home.parent / "said.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    watch, scratch = Watch(), home.parent / "pytest"
    options = ["-x", "-q", "--tb=short", "-m", "not slow", "-p", "no:cacheprovider", f"--basetemp={scratch}"]
    code = pytest.main([*options, *tests], plugins=[watch])
    answer.send((int(code), watch.failed))
    answer.close()
    sys.stdout.flush()


def judge_all(faults: list[Fault], jobs: int) -> list[Verdict]:
    """In the order of `faults`. Raises SystemExit where a test fails without any fault."""
    os.environ |= ENVIRONMENT
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory(prefix="posttrain-mutate-") as scratch:
        seed = Path(scratch) / "seed"
        first = Workshop(Path(scratch) / "0", seed)
        every = dict.fromkeys(test for fault in faults for test in fault.tests)
        sound = first.run(tuple(every), limit=LIMIT * len(every))
        if sound.by or sound.trouble:
            raise SystemExit(f"without any fault: {sound.by or sound.trouble}\n{(first.home.parent / 'said.txt').read_text()}")
        print(f"without any fault all tests pass ({sound.seconds:.0f} s)", flush=True)
        built_in = shutil.ignore_patterns("merged-*")
        if (first.cache / "models").is_dir():
            shutil.copytree(first.cache / "models", seed / "models", ignore=built_in)
        free: SimpleQueue[Workshop] = SimpleQueue()
        for workshop in (first, *(Workshop(Path(scratch) / str(i), seed) for i in range(1, jobs))):
            free.put(workshop)

        def judge(number: int) -> Verdict:
            workshop = free.get()
            try:
                found = workshop.judge(faults[number], number)
            finally:
                free.put(workshop)
            print(f"{faults[number].name}: {found.trouble or found.by or 'SURVIVES'} ({found.seconds:.0f} s)", flush=True)
            return found

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(judge, range(len(faults))))


def table(faults: list[Fault], places: list[str], verdicts: list[Verdict]) -> str:
    """In Markdown, by file. places: of each fault, below src/posttrain."""
    caught = sum(bool(verdict.by) for verdict in verdicts)
    lines = [f"{caught} of {len(faults)} are caught.", "", "| fault | caught by | seconds |", "|---|---|---|"]
    for place, group in groupby(zip(places, faults, verdicts, strict=True), key=lambda each: each[0]):
        lines.append(f"| **{place}** | | |")
        for _, fault, verdict in group:
            by = verdict.by.removeprefix("tests/").replace("|", "\\|")
            lines.append(f"| {fault.name} | {f'`{by}`' if by else '**nothing**'} | {verdict.seconds:.0f} |")
    return "\n".join(lines)


def write(text: str) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="faults whose name matches")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="faults that are tried at a time")
    parser.add_argument("--write", action="store_true", help="put the table into docs/testing.md")
    asked = parser.parse_args()
    faults = read_faults(asked.only)
    if asked.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in faults))
        return
    if asked.write and asked.only:
        parser.error("--write is of all faults; leave --only out")
    try:
        places = [place_of(fault).relative_to(ROOT / "src" / "posttrain").as_posix() for fault in faults]
    except ValueError as error:
        parser.error(str(error))
    verdicts = judge_all(faults, asked.jobs)
    text = table(faults, places, verdicts)
    print(f"\n{text}")
    if asked.write:
        write(text)
    raise SystemExit(any(verdict.trouble or not verdict.by for verdict in verdicts))


if __name__ == "__main__":
    main()
