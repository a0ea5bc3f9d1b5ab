"""Data sets of the hub, against a server of the hub's interface on this machine: what is asked of it, and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FIRST, SECOND = "a" * 40, "b" * 40
pytestmark = pytest.mark.slow

READ = """
import json, sys
from itertools import islice
from posttrain.data.sources.source import fingerprint, read_rows
from posttrain.errors import UserError
options, most = json.loads(sys.argv[1]), int(sys.argv[2])
try:
    rows = list(islice(read_rows("org/name", **options), most))
    options.pop("few", None)
    print(json.dumps({"rows": rows, "fingerprint": fingerprint("org/name", **options)}))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


class HubOfOne:
    """The server, and reading from it in a process of its own: the hub's address is settled when its client is imported."""

    def __init__(self, files: Path, home: Path, address: str, log: Path) -> None:
        self.files, self.home, self.address, self.log = files, home, address, log

    def put(self, commit: str, parts: list[list[dict[str, Any]]]) -> None:
        for k, rows in enumerate(parts):
            (self.files / f"train-{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.files / ".commit").write_text(commit)

    def read(self, most: int = 1000, offline: bool = False, **options: Any) -> dict[str, Any]:
        known = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": str(int(offline))}
        words = [sys.executable, "-c", READ, json.dumps(options), str(most)]
        done = subprocess.run(words, env={**os.environ, **known}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]) | {"said": done.stdout + done.stderr}

    def served(self) -> list[str]:
        """Names of the files of which the content was sent since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return sorted({line.split("/")[-1] for line in lines if line.startswith("GET 20") and line.endswith(".jsonl")})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubOfOne]:
    files, log = tmp_path / "files", tmp_path / "log"
    files.mkdir()
    words = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(files), str(log)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield HubOfOne(files, tmp_path / "home", server.stdout.readline().strip(), log)
        server.terminate()


def parts(word: str = "q") -> list[list[dict[str, Any]]]:
    """Two files; every other row has another field in its object, as arguments of tools have."""
    return [
        [{"prompt": f"{word}{k}.{i}", "completion": "a", "meta": {"x": i} if i % 2 else {"y": [{"z": 1}]}} for i in range(60)]
        for k in range(2)
    ]


def test_a_look_reads_one_file_and_a_run_downloads_all_of_them_once(hub: HubOfOne) -> None:
    hub.put(FIRST, parts())
    rows = [[n, row] for n, row in enumerate([row for part in parts() for row in part], 1)]
    look = hub.read(5, few=True)
    assert look["rows"] == rows[:5] and look["fingerprint"] == f"hub:org/name@{FIRST}::train"
    assert hub.served() == ["train-0.jsonl"]
    assert hub.read(few=True)["rows"] == rows  # a stream gives the very rows that a copy gives, fields that are not there too
    hub.served()
    assert hub.read()["rows"] == rows
    assert hub.served() == ["train-0.jsonl", "train-1.jsonl"]
    assert hub.read()["rows"] == rows and hub.read(3, few=True)["rows"] == rows[:3]
    assert hub.served() == []


def test_a_new_commit_is_other_data(hub: HubOfOne) -> None:
    hub.put(FIRST, parts())
    before = hub.read()
    hub.put(SECOND, parts("new "))
    after = hub.read()
    assert after["rows"][0][1]["prompt"] == "new 0.0" and after["fingerprint"] == f"hub:org/name@{SECOND}::train"
    assert before["fingerprint"] != after["fingerprint"]
    assert hub.read(revision=SECOND)["rows"] == after["rows"] and "no data set" in hub.read(revision="v2")["error"]


def test_without_the_hub_the_copy_is_used_and_another_commit_is_never_taken_for_it(hub: HubOfOne) -> None:
    hub.put(FIRST, parts())
    online = hub.read()
    offline = hub.read(offline=True)
    assert (offline["rows"], offline["fingerprint"]) == (online["rows"], online["fingerprint"])
    assert hub.read(offline=True, revision=FIRST)["rows"] == online["rows"]
    assert f"commit {FIRST} is on this machine, not {SECOND}" in hub.read(offline=True, revision=SECOND)["error"]
    assert "whether that is v1 cannot be told" in hub.read(offline=True, revision="v1")["said"]


def test_what_is_wrong_with_a_data_set_is_one_line(hub: HubOfOne) -> None:
    hub.put(FIRST, [[{"prompt": "a", "completion": "b"}], [{"quite": "other"}]])
    said = hub.read()["error"]
    assert said.startswith("data.path: cannot load org/name from the hub (") and "\n" not in said and "quite" in said
    assert hub.read(split="tran", few=True)["error"].startswith("data.split: org/name has no split 'tran'")
    assert hub.read(subset="extra")["error"].startswith("data.subset: org/name has no subset 'extra'")
