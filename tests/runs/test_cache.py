"""Files that can be made again: made once, whole or not there, found out when damaged, and safe for processes side by side."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.data.example_store import Store
from posttrain.errors import RunError, UserError
from posttrain.models.builtin import builtin_directory
from posttrain.runs import cache, cache_place
from posttrain.runs.cache import cached_json, cached_tensors, write_cached_json, write_tensors
from posttrain.runs.files import replacing, write_json


class Maker:
    """Counts how often it was asked."""

    def __init__(self, value: Any) -> None:
        self.value, self.times = value, 0

    def __call__(self) -> Any:
        self.times += 1
        return self.value


def tensors() -> dict[str, Tensor]:
    return {
        "a": torch.tensor([[1.0, float("nan")], [2.5, -3.0]]),
        "half": torch.tensor([0.1, 0.2], dtype=torch.bfloat16),
        "one": torch.tensor(7, dtype=torch.int64),
        "none": torch.zeros(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "yes": torch.tensor([True, False]),
    }


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    def bits(value: Tensor) -> bytes:
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    about = {n: (v.dtype, v.shape, bits(v)) for n, v in first.items()}
    return about == {n: (v.dtype, v.shape, bits(v)) for n, v in second.items()}


def test_tensors_are_made_once_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    make, path = Maker(tensors()), tmp_path / "new" / "x.safetensors"
    assert cached_tensors(path, make) is make.value
    assert same(cached_tensors(path, make), tensors()) and make.times == 1
    assert same(load_file(path), tensors()) and [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("value", [{"loss": 0.1 + 0.2, "n": 3, "odd": float("inf")}, "ab" * 32, [1, None]])
def test_json_is_made_once_and_comes_back(value: Any, tmp_path: Path) -> None:
    make, path = Maker(value), tmp_path / "new" / "x.json"
    assert [cached_json(path, make) for _ in range(3)] == [value] * 3 and make.times == 1


def test_every_flipped_bit_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the header, the checksum and the tensors alike: the file is named and made again."""
    path = tmp_path / "x.safetensors"
    cached_tensors(path, lambda: {"reference": torch.arange(4.0)})
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found = cached_tensors(path, lambda: {"reference": torch.arange(4.0)})
        assert same(found, {"reference": torch.arange(4.0)}), at
        assert path.read_bytes() == whole or load_file(path)["reference"].tolist() == [0, 1, 2, 3], at
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 0.8 * len(whole), "the other bits are padding, or the checksum's own name"
    assert all(line.startswith(f"cache: {path} is damaged (") and line.endswith("; it is made again") for line in lines)


@pytest.mark.parametrize("kept", [0, 5, 60, -3])
def test_a_file_that_was_cut_short_is_made_again(kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, make, read in (
        (tmp_path / "x.safetensors", Maker(tensors()), cached_tensors),
        (tmp_path / "x.json", Maker({"loss": 1.5}), cached_json),
    ):
        read(path, make)
        path.write_bytes(path.read_bytes()[:kept])
        read(path, make)
        assert make.times == 2 and f"cache: {path} is damaged" in capsys.readouterr().out
        read(path, make)
        assert make.times == 2


def test_a_changed_number_in_json_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, make = tmp_path / "x.json", Maker({"loss": 1.5})
    cached_json(path, make)
    path.write_text(path.read_text().replace("1.5", "1.6"))
    assert cached_json(path, make) == {"loss": 1.5} and "does not match its checksum" in capsys.readouterr().out


def test_a_file_of_version_0_1_is_made_again_without_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    write_json(tmp_path / "x.json", {"loss": 9.0})
    assert cached_tensors(tmp_path / "x.safetensors", lambda: {"a": torch.ones(2)})["a"].tolist() == [1, 1]
    assert cached_json(tmp_path / "x.json", lambda: {"loss": 1.0}) == {"loss": 1.0}
    assert capsys.readouterr().out == ""


def test_only_a_writer_writes(tmp_path: Path) -> None:
    assert cached_json(tmp_path / "x.json", lambda: 1, writes=False) == 1
    cached_tensors(tmp_path / "x.safetensors", tensors, writes=False)
    assert not list(tmp_path.iterdir())


def test_a_file_that_not_all_processes_have_is_made_by_all(tmp_path: Path) -> None:
    """Else one of them would wait for the others in the middle of making it."""
    make, asked = Maker({"a": torch.ones(1)}), []
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)})

    def some_lack_it(mine: bool) -> bool:
        asked.append(mine)
        return False

    cached_tensors(tmp_path / "x.safetensors", make, agree=some_lack_it)
    cached_tensors(tmp_path / "y.safetensors", make, agree=some_lack_it)
    assert asked == [True, False] and make.times == 2


def test_a_disk_that_refuses_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert same(cached_tensors(tmp_path / "x.safetensors", tensors), tensors())
    assert cached_json(tmp_path / "x.json", lambda: 1) == 1
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out.count("No space left on device") == 2


def test_what_is_left_half_done_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")

    def fail() -> None:
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "x").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


RACE = """
import sys, time
from pathlib import Path
import torch
from posttrain.runs.cache import cached_tensors
folder, made = Path(sys.argv[1]), 0
(folder / f"ready-{sys.argv[2]}").touch()
while len(list(folder.glob("ready-*"))) < 3:
    time.sleep(0.001)
for i in range(40):
    def make():
        global made
        made += 1
        return {"x": torch.full((20_000,), float(i))}
    found = cached_tensors(folder / "cache" / f"{i}.safetensors", make)["x"]
    assert found.shape == (20_000,) and bool((found == i).all()), i
print("made", made)
"""


def test_processes_that_race_for_the_same_files(tmp_path: Path) -> None:
    """Nobody reads a half, nothing is called damaged, and no scratch file is left."""
    commands = [[sys.executable, "-c", RACE, str(tmp_path), str(number)] for number in range(3)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [child.communicate(timeout=120)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0] and [words[0] for words in said] == ["made"] * 3
    assert 40 <= sum(int(words[1]) for words in said) <= 120
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(f"{i}.safetensors" for i in range(40))


def test_what_is_written_by_hand_is_read(tmp_path: Path) -> None:
    write_cached_json(tmp_path / "x.json", {"loss": 2.0})
    assert cached_json(tmp_path / "x.json", Maker(None)) == {"loss": 2.0}
    assert json.loads((tmp_path / "x.json").read_text())["content"] == {"loss": 2.0}
    assert cache.alone(True) and not cache.alone(False)


APART = """
import os, sys
os.environ["POSTTRAIN_CACHE"] = f"{sys.argv.pop(1)}-{os.environ['RANK']}"
from posttrain.cli import main
main()
"""


@pytest.mark.slow
def test_processes_whose_caches_are_not_one(tmp_path: Path) -> None:
    """As on two nodes: DPO's reference, in which both work together, lies with one of them; nobody waits for ever."""
    (tmp_path / "apart.py").write_text(APART)
    for rank in range(2):
        shutil.copytree(builtin_directory("tiny")[0], tmp_path / f"cache-{rank}" / "models" / "tiny-v1")
    words = ["dpo", "model=tiny", "+peft=lora", "train.max_steps=1", "train.batch_size=1", "data.max_rows=8", "data.eval_rows=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "apart.py")]
    losses = []
    for name in ("first", "second"):
        command = [*launch, str(tmp_path / "cache"), *words, "eval.rows=1", f"run.dir={tmp_path / name}"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses += [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "cache-0" / "reference").iterdir())) == 1 and not (tmp_path / "cache-1" / "reference").exists()


def filled(directory: Path, times: list[int] | None = None, error: OSError | None = None) -> tuple[Path, str]:
    """A cached directory of two files, one of them below."""

    def make(out: Path) -> str:
        if error:
            raise error
        (out / "deep").mkdir(parents=True)
        (out / "a.bin").write_bytes(b"\0" * 1000)
        (out / "deep" / "b.json").write_text("{}")
        if times is not None:
            times.append(1)
        return "made here"

    return cache.cached_directory(directory, make)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "a.bin").write_bytes(b"\0" * 999 + b"\1"),  # a flipped bit
        lambda d: (d / "a.bin").write_bytes(b"\0" * 10),
        lambda d: (d / "deep" / "b.json").unlink(),
        lambda d: (d / "source.json").write_text("{"),
        lambda d: (d / "source.json").write_text("[]"),
        lambda d: (d / "source.json").write_text((d / "source.json").read_text().replace("made here", "made hare")),
    ],
)
def test_a_damaged_directory_is_named_and_made_again(damage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A built-in model, a merged base, a pipeline."""
    times = list[int]()
    assert filled(tmp_path / "m", times) == filled(tmp_path / "m", times) == (tmp_path / "m", "made here")
    assert len(times) == 1 and capsys.readouterr().out == ""
    damage(tmp_path / "m")
    assert filled(tmp_path / "m", times)[1] == "made here" and len(times) == 2
    assert (tmp_path / "m" / "a.bin").read_bytes() == b"\0" * 1000
    assert f"cache: {tmp_path / 'm'} is damaged" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "no lock, no half, nothing of the damaged one is left"


def test_a_cache_for_reading_alone_will_do_when_it_is_warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written and nothing locked."""
    filled(tmp_path / "m")

    def refuses(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    for name in ("locked", "place_of", "make_directory"):
        monkeypatch.setattr(cache, name, refuses)
    monkeypatch.setattr(os, "utime", refuses)
    assert filled(tmp_path / "m")[1] == "made here"


def test_what_a_cache_for_reading_alone_lacks_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run goes on with a cold or damaged one, says so in one line, and makes each thing once."""
    root, spare = tmp_path / "cache", tmp_path / "spare"
    filled(root / "models" / "m")
    (root / "models" / "m" / "a.bin").write_bytes(b"other")
    spare.mkdir()
    monkeypatch.setattr(cache_place, "_refusal", lambda directory: "Read-only" if directory.is_relative_to(root) else "")
    monkeypatch.setattr(cache_place, "_detour", lambda: spare)
    before = sorted(root.rglob("*"))
    for kind, name in (("models", "m"), ("data", "n")):
        times = list[int]()
        places = [filled(root / kind / name, times)[0] for _ in range(2)]
        assert places == [spare / kind / name] * 2 and len(times) == 1
    made = [Maker({"loss": 1.0}), Maker(tensors())]
    for _ in range(2):
        assert cached_json(root / "measured" / "x.json", made[0]) == {"loss": 1.0}
        assert same(cached_tensors(root / "reference" / "x.safetensors", made[1]), tensors())
    assert [each.times for each in made] == [1, 1] and sorted(root.rglob("*")) == before
    said = capsys.readouterr().out
    assert said.count("may not be written") == 1
    assert f"cache: {root} may not be written (Read-only); what it lacks is made in {spare}" in said
    assert said.count("is damaged") == 2, "at each look, for there it stays"


def test_where_there_is_no_other_place_a_cold_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_place, "_refusal", lambda directory: "Permission denied")
    monkeypatch.setattr(cache_place, "_detour", lambda: None)
    with pytest.raises(UserError, match=rf"^cache: {tmp_path / 'n'} cannot be written \(Permission denied\); .*POSTTRAIN_CACHE"):
        filled(tmp_path / "n")
    (tmp_path / "file").touch()
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"^cache: {tmp_path}/file/models/n cannot be written \("):
        filled(tmp_path / "file" / "models" / "n")


def test_a_full_disk_of_the_cache_is_named_by_its_own_path(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / ".m.x" / "m" / "a"))
    with pytest.raises(RunError, match=rf"^cache: {tmp_path / 'm'} cannot be written \(No space left on device\)"):
        filled(tmp_path / "m", error=full)
    assert list(tmp_path.iterdir()) == []
    elsewhere = OSError(28, "No space left on device", "/elsewhere/x")
    with pytest.raises(OSError, match="No space left on device: '/elsewhere/x'"):
        filled(tmp_path / "m", error=elsewhere)
    with pytest.raises(OSError, match="Input/output error"):  # of a file that is read, as far as anyone knows
        filled(tmp_path / "m", error=OSError(5, "Input/output error"))

    def tokens(out: Path) -> str:
        store = Store(out)
        store._path = Path("/dev/full")  # below which nothing can be written
        store.close({})
        return ""

    with pytest.raises(NotADirectoryError, match="'/dev/full/report"):
        cache.cached_directory(tmp_path / "data" / "k", tokens)


def test_tokens_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not say which file it was; the store does."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def tokens(out: Path) -> str:
        store = Store(out)
        monkeypatch.setattr(Path, "write_text", full)
        store.close({})
        return ""

    with pytest.raises(RunError, match=rf"^cache: {tmp_path / 'data' / 'k'} cannot be written \(No space left on device\)"):
        cache.cached_directory(tmp_path / "data" / "k", tokens)


def test_files_of_any_size_are_read_where_that_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "READ_WHOLE", 100)

    def make(out: Path) -> str:
        out.mkdir()
        (out / "tokens").write_bytes(b"\0" * 200)
        return "made"

    for whole, left in ((False, b"\1"), (True, b"\0")):
        cache.cached_directory(tmp_path / "m", make, whole=whole)
        (tmp_path / "m" / "tokens").write_bytes(b"\0" * 199 + b"\1")
        place, _ = cache.cached_directory(tmp_path / "m", make, whole=whole)
        assert (place / "tokens").read_bytes()[-1:] == left


def test_an_entry_is_as_old_as_its_last_use(tmp_path: Path) -> None:
    for path, read in (
        (tmp_path / "m", lambda: filled(tmp_path / "m")),
        (tmp_path / "x.json", lambda: cached_json(tmp_path / "x.json", lambda: 1)),
    ):
        read()
        os.utime(path, (1e9, 1e9))
        read()
        assert path.stat().st_mtime > 1.7e9


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be two users")
def test_two_users_of_one_cache() -> None:
    """In a directory that both may write, each finds what the other has made, and makes what the other keeps from him."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # pytest's own is for one user
        root = Path(name)
        root.chmod(0o755)
        (root / "cache").mkdir()
        (root / "cache").chmod(0o1777)
        os.environ["TMPDIR"], before = name, os.environ.get("TMPDIR")
        said = [_as_user(number, root) for number in (1234, 4321)]
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before
    assert said == ["1 1 1", "0 0 1"]


def _as_user(number: int, root: Path) -> str:
    """How often this user has to make three things, the last of which its maker lets nobody else read."""
    out = root / f"said-{number}"
    out.touch()
    out.chmod(0o666)
    child = os.fork()
    if child == 0:
        try:
            os.setgid(number)
            os.setuid(number)
            os.umask(0o022)
            cache_here = root / "cache"
            times, one, two = list[int](), Maker({"loss": 1.0}), Maker({"loss": 2.0})
            filled(cache_here / "models" / "m", times)
            cached_json(cache_here / "measured" / "x.json", one)
            cached_json(cache_here / "measured" / "y.json", two)
            with contextlib.suppress(OSError):
                (cache_here / "measured" / "y.json").chmod(0o600)
            out.write_text(f"{len(times)} {one.times} {two.times}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return out.read_text()
