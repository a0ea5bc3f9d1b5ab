"""What can go wrong with a run that is taken up again: each fault is named, or the run ends as if nothing had been."""

import hashlib
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import posttrain
from posttrain.errors import Stopped, UserError
from posttrain.runs.cache import write_tensors
from posttrain.runs.files import sha256
from posttrain.training.checkpoint import FILES, RECORD, _sha256_of

STEPS, STOPPED, SAVE = 9, 6, 2
ROWS = [f"question {i} has {i * i} words" for i in range(64)]


def options(home: Path, run: str) -> list[str]:
    return [
        *("sft", "model=tiny", "+peft=lora", "peft.r=4", "peft.dropout=0.1", f"train.max_steps={STEPS}", "train.batch_size=2"),
        *(f"train.save_steps={SAVE}", "eval.rows=1", "data.eval_rows=2", f"data.path={home / 'rows.jsonl'}"),
        f"run.dir={home / run}",
    ]


def write_rows(home: Path, texts: list[str]) -> None:
    rows = ([{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in texts)
    (home / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went straight through, one that was stopped after six steps of nine, and one of another learning rate."""
    found = tmp_path_factory.mktemp("faults")
    write_rows(found, ROWS)
    posttrain.run(*options(found, "straight"))
    with pytest.raises(Stopped, match="after step 6 of 9"):
        posttrain.run(*options(found, "stopped"), f"run.stop_after={STOPPED}")
    with pytest.raises(Stopped):
        posttrain.run(*options(found, "other"), "optim.lr=1e-3", "run.stop_after=7")
    return found


@pytest.fixture
def stopped(home: Path) -> Path:
    """The stopped run, to be damaged; no test sees another one's."""
    target = home / "run"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(home / "stopped", target)
    write_rows(home, ROWS)
    return target


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("a base model was loaded before the fault was named")

    monkeypatch.setattr("posttrain.stages.language.build.load_causal", load)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    for each in file.parent.iterdir():
        each.unlink()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("EXPLODED").write_text, ("by a pickle",))


def plant(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb()))


DAMAGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a bit of the weights flipped": (flip, FILES[0], "weights.safetensors does not match its sha256"),
    "a bit of the optimizer flipped": (flip, FILES[1], "optimizer.safetensors does not match its sha256"),
    "weights cut short": (truncate, FILES[0], "weights.safetensors has"),
    "no optimizer state": (Path.unlink, FILES[1], "optimizer.safetensors is missing"),
    "no state of the method": (Path.unlink, FILES[2], "method.safetensors is missing"),
    "no record": (Path.unlink, RECORD, "No such file"),
    "a record cut short": (truncate, RECORD, "step-000006 is damaged"),
    "a bit of the record flipped": (flip, RECORD, "step-000006 is damaged"),
    "an empty directory": (empty, RECORD, "step-000006 is damaged"),
} | {f"a pickle for {name}": (plant, name, "step-000006 is damaged") for name in (*FILES, RECORD)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    fault: str, home: Path, stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    damage, name, words = DAMAGES[fault]
    damage(newest(stopped) / name)
    posttrain.run(*options(home, "run"))
    said = capsys.readouterr().out
    assert words in said and "going on from the newest good one" in said and "going on from step 4 of 9" in said
    assert sha256(stopped / "adapter" / "adapter_model.safetensors") == straight(home)
    assert not (home / "EXPLODED").exists()


def straight(home: Path) -> str:
    return sha256(home / "straight" / "adapter" / "adapter_model.safetensors")


@pytest.mark.usefixtures("no_model")
def test_no_checkpoint_that_is_whole_is_an_error(home: Path, stopped: Path) -> None:
    for each in (stopped / "checkpoints").glob("step-*"):
        flip(each / FILES[1])
    with pytest.raises(UserError, match=r"no usable checkpoint .*step-000006 is damaged.*step-000004 is damaged"):
        posttrain.run(*options(home, "run"))


CHANGES = {
    "optim.lr=1e-3": "optim.lr was 0.0002, is now 0.001",
    "train.grad_accum=4": "train.grad_accum was 2, is now 4",
    "train.batch_size=4": "train.batch_size was 2, is now 4",
    "train.seed=1": "train.seed was 42, is now 1",
    "peft.alpha=3": "peft.alpha was 32, is now 3",
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused(change: str, home: Path, stopped: Path) -> None:
    with pytest.raises(UserError) as found:
        posttrain.run(*options(home, "run"), change)
    assert CHANGES[change] in str(found.value)
    assert f"resume.allow={change.split('=')[0]}" in str(found.value)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("rows", [ROWS[:48], ROWS[::-1], [*ROWS[:-1], "another one"]], ids=["fewer", "reordered", "other"])
def test_changed_rows_are_refused(rows: list[str], home: Path, stopped: Path) -> None:
    write_rows(home, rows)
    with pytest.raises(UserError, match=r"data.content was .*resume.allow=data.content"):
        posttrain.run(*options(home, "run"))


@pytest.mark.usefixtures("no_model")
def test_another_order_of_the_same_rows_is_refused(home: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later version might draw them."""
    monkeypatch.setattr("posttrain.data.queues.permutation", lambda size, *_: np.arange(size)[::-1])
    with pytest.raises(UserError, match=r"data.order was .*resume.allow=data.order"):
        posttrain.run(*options(home, "run"))


@pytest.mark.usefixtures("no_model")
def test_a_checkpoint_of_another_run_is_refused(home: Path, stopped: Path) -> None:
    """It is whole, and in the right place, but was made with another rate."""
    shutil.copytree(newest(home / "other"), stopped / "checkpoints" / "step-000007")
    with pytest.raises(UserError, match=r"step-000007 is of another run: optim.lr was 0.001, is now 0.0002"):
        posttrain.run(*options(home, "run"))


def test_references_that_follow_from_an_allowed_change_are_not_asked_about(tmp_path: Path) -> None:
    """A longer run draws more pairs, so its table of references is another."""
    words = ["dpo", "model=tiny", "+peft=lora", "train.batch_size=2", "eval.sets=null", "data.max_rows=20", "data.eval_rows=2"]
    with pytest.raises(Stopped):
        posttrain.run(*words, "train.max_steps=3", f"run.dir={tmp_path}/run", "run.stop_after=2")
    manifest = posttrain.run(*words, "train.max_steps=5", f"run.dir={tmp_path}/run", "resume.allow=train.max_steps")
    assert [change["change"].split()[0] for change in manifest["changes"]] == ["train.max_steps", "dpo.reference"]


@pytest.mark.slow
def test_other_references_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-probs that DPO compares with are a part of the run, though they lie in the cache."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    words = ["dpo", "model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=4", "train.batch_size=2", "eval.sets=null"]
    words += ["data.max_rows=20", "data.eval_rows=2"]
    posttrain.run(*words, f"run.dir={tmp_path}/straight")
    with pytest.raises(Stopped):
        posttrain.run(*words, f"run.dir={tmp_path}/run", "run.stop_after=2")
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    kept = load_file(file)
    changed = kept["reference"] + torch.tensor([0.5, 0.0])
    write_tensors(file, {"reference": changed})
    digests = [hashlib.sha256(table.numpy().tobytes()).hexdigest()[:32] for table in (kept["reference"], changed)]
    said = "step-000002 is of another run: dpo.reference was {}, is now {}; .*resume.allow=dpo.reference".format(*digests)
    with pytest.raises(UserError, match=said):
        posttrain.run(*words, f"run.dir={tmp_path}/run")
    shutil.copytree(tmp_path / "run", tmp_path / "allowed")
    manifest = posttrain.run(*words, f"run.dir={tmp_path}/allowed", "resume.allow=dpo.reference")
    assert manifest["changes"] == [{"step": 2, "change": "dpo.reference was {}, is now {}".format(*digests)}]
    file.unlink()  # made again, it is what it was
    posttrain.run(*words, f"run.dir={tmp_path}/run")
    results = [sha256(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "run", "allowed")]
    assert results[0] == results[1] != results[2]


def test_an_allowed_change_is_recorded(home: Path, stopped: Path) -> None:
    change = ("optim.lr=1e-3", "resume.allow=optim.lr")
    manifest = posttrain.run(*options(home, "run"), *change)
    assert manifest["changes"] == [{"step": 6, "change": "optim.lr was 0.0002, is now 0.001"}]
    rates = _rates(stopped)
    ratio = {step: rates[step] / line for step, line in _rates(home / "straight").items() if line}
    assert [round(ratio[step], 6) for step in range(1, STEPS + 1)] == [1.0] * 6 + [5.0] * 3


def _rates(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}


def test_tensors_that_are_missing_are_named(home: Path, stopped: Path) -> None:
    """Even where all sizes and hashes have been made to agree."""
    folder = newest(stopped)
    kept = load_file(folder / FILES[0])
    gone = sorted(kept)[:4]
    save_file({name: value for name, value in kept.items() if name not in gone}, folder / FILES[0])
    record = json.loads((folder / RECORD).read_text())
    del record["sha256"]
    record["files"][FILES[0]] = {"bytes": (folder / FILES[0]).stat().st_size, "sha256": sha256(folder / FILES[0])}
    text = json.dumps(record, indent=2, sort_keys=True)
    (folder / RECORD).write_text(json.dumps({"sha256": _sha256_of(text), **json.loads(text)}))
    with pytest.raises(UserError, match=r"does not fit this model: .*lora_A.* \(and 3 more\) differ"):
        posttrain.run(*options(home, "run"))


def test_random_states_outside_do_not_matter(home: Path, stopped: Path) -> None:
    """There is none in a checkpoint, so none can be missing: every step is seeded from its number."""
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    (stopped / "checkpoints" / ".step-000008.1.tmp").mkdir()  # what a kill within a save leaves
    posttrain.run(*options(home, "run"))
    assert sha256(stopped / "adapter" / "adapter_model.safetensors") == straight(home)
    assert not list((stopped / "checkpoints").glob(".*"))
