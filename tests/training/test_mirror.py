"""`run.mirror`, on fsspec's memory filesystem: another machine goes on to the same bits; what fails is said and sent later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import posttrain
from posttrain.errors import RunError, Stopped, UserError
from posttrain.models.language.loading import load_model
from posttrain.runs import remote
from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING, Place, RemoteError
from posttrain.training.checkpoint import RECORD

MEMORY: Any = fsspec.filesystem("memory")
WORDS = (
    "model=tiny", "train.max_steps=6", "train.batch_size=2", "train.save_steps=1", "train.keep_checkpoints=2", "data.max_rows=30",
    "data.eval_rows=0", "eval.sets=null", "optim.lr=0.01", "peft=lora", "peft.r=2", "train.log_steps=1",
)  # fmt: skip
URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    MEMORY.store.clear()
    yield
    MEMORY.store.clear()


def train(folder: Path, *more: str) -> dict[str, Any]:
    return posttrain.run("sft", *WORDS, f"run.dir={folder}", f"run.mirror={URL}", *more)


def there() -> dict[str, Any]:
    return json.loads(MEMORY.cat_file(f"/bucket/run/{LISTING}"))


def steps_there() -> set[str]:
    return {name.split("/")[4] for name in MEMORY.store if name.startswith("/bucket/run/checkpoints/")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    posttrain.run("sft", *WORDS, f"run.dir={folder}")
    return folder


def test_another_machine_goes_on_to_the_same_bits(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        train(tmp_path / "a", "run.stop_after=3")
    assert steps_there() == {"step-000002", "step-000003"} and not there()["whole"]  # retention too
    for name, said in there()["files"].items():
        assert (said["bytes"], said["sha256"]) == (len(MEMORY.cat_file(f"/bucket/run/{name}")), sha256(tmp_path / "a" / name))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match=r"run.mirror: memory://bucket/run is of another run: optim.lr was 0.01, is now 0.02"):
        train(tmp_path / "other", "optim.lr=0.02")
    capsys.readouterr()
    train(tmp_path / "b")
    said = capsys.readouterr().out
    assert "the checkpoint of step 3 was fetched from memory://bucket/run" in said and "going on from step 3 of 6" in said
    weights = Path("adapter") / "adapter_model.safetensors"
    assert sha256(tmp_path / "b" / weights) == sha256(straight / weights)
    losses = [
        [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").open()] for run in (tmp_path / "b", straight)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    assert there()["whole"] and there()["files"]["manifest.json"]["sha256"] == sha256(tmp_path / "b" / "manifest.json")
    assert steps_there() == {"step-000005", "step-000006"}
    # a third machine has nothing to do, and others take the result by its address
    train(tmp_path / "c")
    assert "is finished already" in capsys.readouterr().out and sha256(tmp_path / "c" / weights) == sha256(straight / weights)
    assert load_model(URL).artifact.finished().steps == 6


@pytest.mark.slow
def test_a_mirror_that_fails_is_said_and_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, broken = Place.put, [True]

    def fails(self: Place, file: Path, name: str, entry: Any = None) -> Any:
        if broken[0] and "step-" in name:
            raise RemoteError("memory://bucket/run: no route to host")
        return put(self, file, name, entry)

    monkeypatch.setattr(Place, "put", fails)
    with pytest.raises(
        RunError, match=r"is finished, and its mirror is not whole: .*no route to host; the same command sends the rest"
    ):
        train(tmp_path / "a")
    assert capsys.readouterr().out.count("training goes on, and it is tried again") == 1
    assert (tmp_path / "a" / "manifest.json").exists() and not there()["whole"] and not steps_there()
    broken[0] = False
    train(tmp_path / "a")
    assert there()["whole"] and steps_there() == {"step-000005", "step-000006"}


@pytest.mark.slow
def test_an_upload_that_was_cut_off_is_no_checkpoint_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, sent = Place.put, list[str]()

    def dies(self: Place, file: Path, name: str, entry: Any = None) -> Any:
        if "step-000003" in name and name.endswith(RECORD):
            raise RemoteError("memory://bucket/run: killed")
        sent.append(name)
        return put(self, file, name, entry)

    monkeypatch.setattr(Place, "put", dies)
    with pytest.raises(Stopped):
        train(tmp_path / "a", "run.stop_after=3")
    assert "checkpoints/step-000003/weights.safetensors" in sent
    shutil.copytree(tmp_path / "a", tmp_path / "kept")
    shutil.rmtree(tmp_path / "a")
    monkeypatch.setattr(Place, "put", put)
    with pytest.raises(Stopped):  # on another machine: the newest that is whole is the second
        train(tmp_path / "a", "run.stop_after=1")
    assert sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert "step-000003" in steps_there()
    sent[:] = []
    monkeypatch.setattr(Place, "put", lambda self, file, name, entry=None: sent.append(name) or put(self, file, name, entry))
    with pytest.raises(Stopped):
        train(tmp_path / "kept", "run.stop_after=1")
    again = [name for name in sent if "step-000003" in name]  # it has the same tensors, and took another time
    assert again == [f"checkpoints/step-000003/{RECORD}"] and any("step-000004" in name for name in sent)


def test_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.launch.worker.run_stage", None, raising=False)
    MEMORY.pipe_file("/bucket/run/holiday.jpg", b"1")
    with pytest.raises(UserError, match=r"run.mirror: memory://bucket/run holds other files and no run"):
        train(tmp_path / "a")
    with pytest.raises(UserError, match=r"run.mirror: 'somewhere' is no address; write s3://BUCKET/DIRECTORY"):
        train(tmp_path / "b", "run.mirror=somewhere")
    with pytest.raises(UserError, match=r"run.dir: a run writes on this machine; give a directory, and run.mirror=s3://b/x"):
        posttrain.run("sft", *WORDS, "run.dir=s3://b/x")

    def forbidden(*args: Any) -> None:
        raise PermissionError("no")

    MEMORY.store.clear()
    monkeypatch.setattr(type(MEMORY), "pipe_file", forbidden)
    with pytest.raises(UserError, match=r"run.mirror: memory://bucket/run: .* .the credentials may not do that"):
        train(tmp_path / "c")
