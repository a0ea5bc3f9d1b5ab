"""Does the code of an answer pass its unit tests?"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.rewards.builtin._columns import no_column

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


class Code:
    """The share of its tests that the Python of an answer passes, each in a fresh namespace; None where the row has no tests.

    It runs in a process of its own with limits of time and memory, an empty environment and directory, and without network: in a
    network namespace where the system lets one be made, and always by refusing sockets, processes and files elsewhere in Python.
    That holds off a model's blunders; it is no jail for an attacker, for which the whole run belongs in a container.

    Args:
        column: of the rows: a text of Python, or a list of such, which raise where a test fails.
        seconds, megabytes: limits of an answer's process.
        all_or_nothing: 1 only where all tests pass.
        at_once: answers that run at the same time.
    """

    def __init__(
        self, column: str = "tests", seconds: float = 10.0, megabytes: int = 512, all_or_nothing: bool = False, at_once: int = 4
    ) -> None:
        self.column, self.seconds, self.megabytes = column, seconds, megabytes
        self.all_or_nothing, self.at_once = all_or_nothing, at_once

    def __call__(self, answers: list[str], **columns: list[Any]) -> list[float | None]:
        """The last block between ``` marks is the code, else the whole answer."""
        if self.column not in columns:
            raise no_column("code", self.column, columns)
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._score, answers, columns[self.column]))

    def _score(self, answer: str, tests: str | Sequence[str] | None) -> float | None:
        if not tests:
            return None
        listed = [tests] if isinstance(tests, str) else list(tests)
        blocks = _BLOCK.findall(answer)
        passed = self._passed(blocks[-1] if blocks else answer, listed)
        return float(passed == len(listed)) if self.all_or_nothing else passed / len(listed)

    def _passed(self, code: str, tests: list[str]) -> int:
        """How many tests the code passes. What it prints is not read: the result is said with a word that it does not know."""
        word = secrets.token_hex(16)
        asked = json.dumps({"code": code, "tests": tests, "word": word, "seconds": self.seconds, "bytes": self.megabytes * 2**20})
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("_sandbox.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, env={},
                start_new_session=True,
            )  # fmt: skip
            try:
                said, _ = process.communicate(asked, timeout=self.seconds + 5)
            except subprocess.TimeoutExpired:
                return 0
            finally:
                process.kill()
                process.wait()
        found = re.findall(rf"^{word} (\d+)$", said[-10_000:], re.M)
        return int(found[-1]) if found else 0


REWARD = Code
