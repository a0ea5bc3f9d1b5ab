"""`run.mirror` with huggingface_hub's own filesystem and a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

import posttrain
from posttrain.errors import UserError
from posttrain.runs import remote
from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING

TOKEN = "hf_" + "a" * 34
WORDS = (
    "model=tiny", "train.max_steps=4", "train.batch_size=2", "train.save_steps=1", "data.max_rows=30", "data.eval_rows=0",
    "eval.sets=null", "peft=lora", "peft.r=2",
)  # fmt: skip
URL = "hf://me/runs/deep/run"


class Hub(BaseHTTPRequestHandler):
    """One repository, me/runs, with its files."""

    files: dict[str, bytes]
    commits: list[list[str]]

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": "0" * 40, "ETag": '"1"', **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self) -> dict[str, dict[str, Any]]:
        found = {name: {"type": "file", "path": name, "size": len(c), "oid": "1"} for name, c in self.files.items()}
        folders = {str(parent) for name in self.files for parent in PurePosixPath(name).parents} - {"."}
        return found | {name: {"type": "directory", "path": name, "size": 0, "oid": "2"} for name in folders}

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if path.startswith("/me/runs/resolve/main/"):
            content = self.files.get(path.removeprefix("/me/runs/resolve/main/"))
            return self.answer(404, b"", X_Error_Code="EntryNotFound") if content is None else self.answer(200, content)
        if not path.startswith("/api/models/me/runs"):
            return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
        if not path.startswith("/api/models/me/runs/tree/main"):
            return self.answer(200, {"id": "me/runs", "sha": "0" * 40, "private": True, "tags": [], "siblings": []})
        under = path.removeprefix("/api/models/me/runs/tree/main").strip("/")
        deep = parse_qs(parts.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        found = [e for name, e in self.entries().items() if not under or name.startswith(f"{under}/")]
        found = [e for e in found if deep or str(PurePosixPath(e["path"]).parent) == (under or ".")]
        return self.answer(200, found) if found or not under else self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        path = urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "no"})
        if path.endswith("/paths-info/main"):
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            return self.answer(200, [e for name, e in self.entries().items() if name in wanted])
        lines = [json.loads(line) for line in body.splitlines()]
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return self.answer(200, {"files": files})
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] in ("deletedFile", "deletedFolder"):
                gone = line["value"]["path"].rstrip("/")
                for name in [n for n in self.files if n == gone or n.startswith(f"{gone}/")]:
                    del self.files[name]
        self.commits.append([line["value"].get("path", "") for line in lines])
        return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/me/runs/commit/1", "commitOid": "1"})

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[type[Hub]]:
    made = type("ThisHub", (Hub,), {"files": {"README.md": b"#"}, "commits": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(remote, "PAUSE", 0.1)
    yield made
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_another_machine_goes_on(hub: type[Hub], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={URL}")
    listed = json.loads(hub.files[f"deep/run/{LISTING}"])
    steps = {name.split("/")[3] for name in hub.files if "/checkpoints/" in name}
    assert listed["whole"] and steps == {"step-000003", "step-000004"}  # what is deleted here is deleted there
    kept = {name: entry for name, entry in listed["files"].items() if "step-000003" in name or name == "config.yaml"}
    hub.files[f"deep/run/{LISTING}"] = json.dumps({"whole": False, "files": kept}).encode()  # as after a kill
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'b'}", f"run.mirror={URL}")
    said = capfd.readouterr()
    assert "going on from step 3 of 4" in said.out and TOKEN not in said.out + said.err
    weights = Path("adapter") / "adapter_model.safetensors"
    assert sha256(tmp_path / "b" / weights) == sha256(tmp_path / "a" / weights)
    assert hub.files[f"deep/run/{weights}"] == (tmp_path / "b" / weights).read_bytes()
    assert hub.files["README.md"] == b"#"


def test_no_repository_and_no_right_are_one_line(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [("hf://me/none/run", TOKEN, "there is no such"), (URL, "hf_" + "b" * 34, "may not do that|no credentials")]
    for url, token, why in cases:
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError, match=rf"run\.mirror: {url}: .*({why})") as error:
            posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={url}")
        assert "\n" not in str(error.value) and token not in str(error.value)
    assert not hub.commits
