"""Pushing, against a stand-in of the hub's HTTP interface: what is sent, what is refused, and that no token is shown."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import posttrain
from posttrain.commands.push import push_run
from posttrain.errors import RunError, UserError

TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    """One hub: its repositories, and what was asked of it."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, Any]]
    refuses = False
    private = True
    card = 200  # what the check of cards answers

    def answer(self, status: int, content: Any, **headers: str) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        name = self.path.split("?")[0].removeprefix("/api/models/")
        if name in self.repositories:
            files = [{"rfilename": file} for file in self.repositories[name]]
            self.answer(200, {"id": name, "modelId": name, "private": self.private, "tags": [], "siblings": files})
        else:
            self.answer(404, {"error": "not found"}, **{"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.endswith("validate-yaml"):
            return self.answer(401, {"error": "no"})
        lines = [json.loads(line) for line in body.decode().splitlines()]
        self.asked.append((path, lines))
        if path == "/api/validate-yaml" and self.card != 200:
            return self.answer(self.card, {"errors": [{"message": "license must be one of"}]})
        if path == "/api/repos/create":
            name = "/".join(part for part in (lines[0].get("organization"), lines[0]["name"]) if part)
            self.repositories[name] = {}
            return self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in lines[0]["files"]]
            return self.answer(200, {"files": files})
        if path.endswith("/commit/main"):
            if self.refuses:
                return self.answer(403, {"error": "no"})
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.repositories[name] |= {f["path"]: base64.b64decode(f["content"]) for f in files}
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.repositories[name][line["value"]["path"]]
            return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1"})
        return self.answer(200, {"errors": [], "warnings": []})

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[type[Hub]]:
    made = type("ThisHub", (Hub,), {"repositories": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push") / "mine"
    words = ("model=tiny", "train.max_steps=1", "train.batch_size=2", "data.max_rows=10", "data.eval_rows=2", "eval.sets=null")
    posttrain.run("sft", *words, "peft=lora", "peft.r=4", f"run.dir={folder}")
    return folder


def test_adapter_and_card_in_one_commit_to_a_private_repository(
    hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_run(run, "me/mine")
    made = next(lines[0] for path, lines in hub.asked if path == "/api/repos/create")
    assert made.get("private") is True or made.get("visibility") == "private"
    files = hub.repositories["me/mine"]
    listed = {
        name.removeprefix("adapter/") for name in json.loads((run / "manifest.json").read_text())["files"] if "adapter/" in name
    }
    assert set(files) == listed | {"README.md"}
    weights = "adapter_model.safetensors"
    assert files[weights] == (run / "adapter" / weights).read_bytes()
    assert files["README.md"] == (run / "adapter" / "README.md").read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny-v1"  # no path of this machine
    assert len([path for path, _ in hub.asked if path.endswith("/commit/main")]) == 1
    said = capsys.readouterr()
    assert "me/mine made, private" in said.out + said.err and TOKEN not in said.out + said.err


def test_what_exists_is_written_over_only_with_update(hub: type[Hub], run: Path) -> None:
    hub.repositories["me/mine"] = {"other.txt": b"1"}
    with pytest.raises(UserError, match="me/mine exists already"):
        push_run(run, "me/mine")
    assert hub.repositories["me/mine"] == {"other.txt": b"1"} and not hub.asked
    push_run(run, "me/mine", update=True)
    assert "adapter_model.safetensors" in hub.repositories["me/mine"]


def test_weights_of_another_result_do_not_stay_beside_the_new_ones(
    hub: type[Hub], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loader takes an adapter that lies beside a model, and a listing of shards for what it lists."""
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"2", "notes.txt": b"3", "figure.png": b"4"}
    hub.repositories["me/mine"] = {**old, "adapter_config.json": b"5"}
    hub.private = False
    push_run(run, "me/mine", update=True)
    files = hub.repositories["me/mine"]
    assert {"notes.txt", "figure.png"} <= set(files) and not set(files) & set(list(old)[:2])
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA"
    assert len([path for path, _ in hub.asked if path.endswith("/commit/main")]) == 1
    said = capsys.readouterr()
    assert "me/mine is public" in said.out + said.err
    assert "2 files of another result, such as model-00001-of-00002.safetensors, are deleted there" in said.out + said.err


def test_refusals_are_one_line(hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "a/b/c", "me/my run"):
        with pytest.raises(UserError, match="write org/name"):
            push_run(run, name)
    hub.refuses = True
    with pytest.raises(RunError, match=r"the token may not write there \(me/mine is there and empty: --update goes on\)"):
        push_run(run, "me/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    with pytest.raises(UserError, match="does not take the token") as error:
        push_run(run, "me/other")
    assert "bbb" not in str(error.value)
    monkeypatch.setattr("posttrain.commands.push.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the hub"):
        push_run(run, "me/other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push_run(run, "me/other")


def test_a_card_that_the_hub_does_not_take_is_said_before_anything_is_made(hub: type[Hub], run: Path) -> None:
    hub.card = 400
    with pytest.raises(UserError, match=r"the hub does not take the card \(.*license must be one of.*mend .*README.md"):
        push_run(run, "me/mine")
    assert not hub.repositories
    hub.card = 200
    push_run(run, "me/mine")
    [checked] = [lines[0]["content"] for path, lines in hub.asked[1:] if path == "/api/validate-yaml"][:1]
    assert checked == (run / "adapter" / "README.md").read_text()


def test_no_network_is_one_line(hub: type[Hub], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub could not be written to") as error:
        push_run(run, "me/mine")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
