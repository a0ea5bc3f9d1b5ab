"""`run.mirror` with gcsfs and a local stand-in of Google's storage: another machine goes on, and what a bucket refuses."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import posttrain
from posttrain.commands.export.export import export_run
from posttrain.errors import UserError
from posttrain.runs import remote
from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING

WHY = "not installed: pip install 'posttrain[remote]' gcp-storage-emulator"
gcsfs: Any = pytest.importorskip("gcsfs", reason=WHY)
emulator: Any = pytest.importorskip("gcp_storage_emulator.server", reason=WHY)
pytestmark = pytest.mark.slow

WORDS = (
    "model=tiny", "train.max_steps=4", "train.batch_size=2", "train.save_steps=1", "data.max_rows=30", "data.eval_rows=0",
    "eval.sets=null", "peft=lora", "peft.r=2",
)  # fmt: skip
URL = "gs://bucket/deep/run"


async def plain_bucket(fs: Any, bucket: str) -> Any:
    from gcsfs.extended_gcsfs import BucketType  # pyright: ignore

    return BucketType.NON_HIERARCHICAL


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    made = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    made.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{made._api._httpd.server_port}")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    monkeypatch.setattr(remote, "PAUSE", 0.1)
    for kind in type(fsspec.url_to_fs("gs://bucket", skip_instance_cache=True)[0]).__mro__:
        if "_get_bucket_type" in vars(kind):  # newer gcsfs asks for it by a protocol that the stand-in does not have
            monkeypatch.setattr(kind, "_get_bucket_type", plain_bucket)
    yield
    made.stop()


def test_another_machine_goes_on(server: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", f"run.mirror={URL}")
    fs = gcsfs.GCSFileSystem(token="anon", use_listings_cache=False, skip_instance_cache=True)
    listed = json.loads(fs.cat_file(f"bucket/deep/run/{LISTING}"))
    steps = {Path(name).name for name in fs.ls("bucket/deep/run/checkpoints")}
    assert listed["whole"] and steps == {"step-000003", "step-000004"}  # what is deleted here is deleted there
    kept = {name: entry for name, entry in listed["files"].items() if "step-000003" in name or name == "config.yaml"}
    fs.pipe_file(f"bucket/deep/run/{LISTING}", json.dumps({"whole": False, "files": kept}).encode())  # as after a kill
    posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'b'}", f"run.mirror={URL}")
    assert "going on from step 3 of 4" in capfd.readouterr().out
    weights = Path("adapter") / "adapter_model.safetensors"
    assert sha256(tmp_path / "b" / weights) == sha256(tmp_path / "a" / weights)
    assert fs.cat_file(f"bucket/deep/run/{weights}") == (tmp_path / "b" / weights).read_bytes()
    export_run(Path(URL), "vllm", Path("gs://bucket/served"), None, 0.05)
    assert fs.exists("bucket/served/serve.sh") and json.loads(fs.cat_file(f"bucket/served/{LISTING}"))["whole"]


def test_no_bucket_is_one_line(server: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.mirror: gs://none/run: .*there is no such bucket") as error:
        posttrain.run("sft", *WORDS, f"run.dir={tmp_path / 'a'}", "run.mirror=gs://none/run")
    assert "\n" not in str(error.value)
