"""Trials in processes of their own: torch is imported once in each, and one that hangs or dies is put down and said so."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from architectures.tiny import Architecture
from architectures.trial import CELLS, Cell, Record, Trial, cleared

READY = "ready"
STARTING = 120  # seconds for a process to import everything


class Worker:
    """One process that tries one architecture after another."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if self.connection.poll(STARTING):
            self.connection.recv()

    def run(self, architecture: Architecture, limit: float) -> Record | None:
        """None: not done after `limit` seconds, or the process died; the worker is of no more use then."""
        self.connection.send(architecture)
        try:
            found = self.connection.recv() if self.connection.poll(limit) else None
            if found == READY:  # it was started on a busy machine, and is only now there
                found = self.connection.recv() if self.connection.poll(limit) else None
            return found
        except (EOFError, ConnectionError):
            return None

    def close(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()


def run_all(chosen: list[Architecture], jobs: int, limit: float) -> Iterator[Record]:
    """The records, in order, each as soon as it and those before it are there."""
    idle: SimpleQueue[Worker | None] = SimpleQueue()
    for _ in range(jobs):
        idle.put(None)

    def attempt(architecture: Architecture) -> Record:
        worker = idle.get() or Worker()
        record = worker.run(architecture, limit)
        if record is None:
            worker.close()
        idle.put(worker if record else None)
        return record or _lost(architecture, limit)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(attempt, chosen)
    while not idle.empty():
        if worker := idle.get():
            worker.close()


def _lost(architecture: Architecture, limit: float) -> Record:
    said = f"not done after {limit:.0f} seconds, or the process died"
    cells = {name: Cell("failed", said) for name in CELLS}
    return Record(architecture.name, architecture.class_name, architecture.mapping, cells=cells, seconds=limit)


def _work(connection: Connection) -> None:
    """What a worker does, until it is put down."""
    import torch

    import posttrain.stages.stage as stage
    from architectures.tiny import quiet

    torch.set_num_threads(1)
    quiet()
    without_pages: Any = lambda directory: directory / "report.html"  # noqa: E731  (drawing takes longer than the run)
    stage.run_page = without_pages
    with tempfile.TemporaryDirectory() as directory:
        connection.send(READY)
        while True:
            architecture = connection.recv()
            connection.send(Trial(architecture, cleared(Path(directory) / "trial")).run())
