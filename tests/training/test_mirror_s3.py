"""`run.mirror` with s3fs and a local S3 server: a kill in the middle of an upload, and what a bucket refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.commands.export.export import export_run
from posttrain.errors import UserError
from posttrain.runs import remote
from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING
from posttrain.training.checkpoint import RECORD

WHY = "not installed: pip install 'posttrain[remote]' 'moto[s3]' flask flask-cors'"
s3fs: Any = pytest.importorskip("s3fs", reason=WHY)
moto: Any = pytest.importorskip("moto.server", reason=WHY)
pytestmark = pytest.mark.slow

WORDS = (
    "model=tiny", "train.max_steps=4", "train.batch_size=2", "train.save_steps=1", "data.max_rows=30", "data.eval_rows=0",
    "eval.sets=null", "peft=lora", "peft.r=2",
)  # fmt: skip
URL = "s3://bucket/deep/run"


class Server:
    """S3 on this machine. stalls: the end of a name whose upload is held up, and then refused; stalled: it is."""

    def __init__(self) -> None:
        from werkzeug.serving import make_server

        self.stalls, self.stalled, self.released = "", threading.Event(), threading.Event()
        self.inner = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.http = make_server("127.0.0.1", 0, self.answer, threaded=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, environ: Any, start: Any) -> Any:
        if self.stalls and environ["REQUEST_METHOD"] == "PUT" and environ["PATH_INFO"].endswith(self.stalls):
            self.stalled.set()
            self.released.wait(60)
            start("403 Forbidden", [("Content-Length", "0")])
            return [b""]
        return self.inner(environ, start)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Generator[Server]:
    made = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.http.server_port}")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret-of-mine",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE", 0.1)
    yield made
    made.released.set()
    made.http.shutdown()
    made.http.server_close()


def test_a_kill_in_the_middle_of_an_upload(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"run.mirror: s3://bucket/deep/run: .*there is no such bucket"):
        posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={URL}")
    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    fs.mkdir("bucket")
    server.stalls = "step-000003/optimizer.safetensors"
    command = [sys.executable, "-m", "posttrain", "sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={URL}"]
    with subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL) as first:
        assert server.stalled.wait(120)
        first.kill()
    server.stalls = ""
    server.released.set()
    listed = json.loads(fs.cat_file(f"bucket/deep/run/{LISTING}"))
    assert not listed["whole"] and f"checkpoints/step-000002/{RECORD}" in listed["files"]
    assert f"checkpoints/step-000003/{RECORD}" not in listed["files"]
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'b'}", f"run.mirror={URL}")
    said = capfd.readouterr()
    assert "going on from step 2 of 4" in said.out and "secret-of-mine" not in said.out + said.err
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'straight'}")
    weights = Path("adapter") / "adapter_model.safetensors"
    assert sha256(tmp_path / "b" / weights) == sha256(tmp_path / "straight" / weights)
    assert json.loads(fs.cat_file(f"bucket/deep/run/{LISTING}"))["whole"]
    assert fs.cat_file(f"bucket/deep/run/{weights}") == (tmp_path / "b" / weights).read_bytes()
    assert {Path(name).name for name in fs.ls("bucket/deep/run/checkpoints")} <= {f"step-00000{i}" for i in (1, 2, 3, 4)}
    export_run(Path(URL), "vllm", Path("s3://bucket/served"), None, 0.05)
    assert fs.exists("bucket/served/serve.sh") and json.loads(fs.cat_file(f"bucket/served/{LISTING}"))["whole"]


def test_no_credentials_are_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"run.mirror: .*no credentials.*set AWS_ACCESS_KEY_ID") as error:
        posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={URL}")
    assert "\n" not in str(error.value)
