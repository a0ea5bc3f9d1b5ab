"""Addresses, on fsspec's memory filesystem: what is fetched is checked and whole, what was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from posttrain.errors import UserError
from posttrain.runs import remote
from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING, Entry, Place, RemoteError, here, is_address, result_at

MEMORY: Any = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[None]:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    MEMORY.store.clear()
    yield
    MEMORY.store.clear()


def files(under: str) -> dict[str, bytes]:
    return {name.removeprefix(f"/{under}/"): MEMORY.cat_file(name) for name in MEMORY.store if name.startswith(f"/{under}/")}


def test_addresses() -> None:
    for name in ("s3://bucket/a", Path("s3://bucket/a"), "hf://org/name", "memory://x"):
        assert is_address(name)
    for name in ("runs/sft", "org/name", "C:/runs", "module:function", "builtin:general", "/s3:/x", ""):
        assert not is_address(name)
    assert Place(Path("memory://bucket/a/"), "init").url == "memory://bucket/a"
    for name in ("file:///tmp/a", "file://tmp/a", Path("file:///tmp/a/")):
        assert is_address(name) and Place(name, "init").url == "file:///tmp/a"


def test_what_is_written_is_whole_or_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[str] = []
    put = Place.put

    def counted(self: Place, file: Path, name: str, entry: Entry | None = None) -> Entry:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(name)
        return put(self, file, name, entry)

    def write(place: Path) -> None:
        (place / "deep").mkdir(parents=True)
        for name in ("a", "b", "deep/c"):
            (place / name).write_text(name)

    monkeypatch.setattr(Place, "put", counted)
    with pytest.raises(KeyboardInterrupt), result_at(Path("memory://out/x")) as place:
        write(place)
    with pytest.raises(UserError, match="init: memory://out/x is not whole yet"):
        here("memory://out/x", "init")
    sent[:] = []
    with result_at(Path("memory://out/x")) as place:
        write(place)
    assert sent == ["deep/c"]
    said = json.loads(files("out/x")[LISTING])
    assert said["whole"] and said["files"]["deep/c"] == {
        "bytes": 6,
        "sha256": sha256(Path(here("memory://out/x", "init")) / "deep" / "c"),
    }
    with pytest.raises(UserError, match="--out: memory://out/x exists already"), result_at(Path("memory://out/x")):
        pass


def test_a_failed_block_uploads_nothing() -> None:
    def fails() -> None:
        with result_at(Path("memory://out/x")) as place:
            place.mkdir()
            (place / "a").write_text("a")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert set(files("out/x")) == {LISTING} and not json.loads(files("out/x")[LISTING])["whole"]


def test_fetched_once_and_again_where_it_has_changed(tmp_path: Path) -> None:
    MEMORY.pipe_file("/some/model/config.json", b"{}")  # without a listing
    first = here("memory://some/model", "init")
    assert isinstance(first, Path) and (first / "config.json").read_text() == "{}" and first == here("memory:/some/model", "init")
    MEMORY.pipe_file("/some/model/config.json", b"{ }")
    second = here("memory://some/model", "init")
    assert second != first and isinstance(second, Path) and (second / "config.json").read_text() == "{ }"
    assert here("runs/x", "init") == "runs/x"


def test_damage_and_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    with result_at(Path("memory://out/x")) as place:
        place.mkdir()
        (place / "a").write_text("good")
    MEMORY.pipe_file("/out/x/a", b"evil")
    with pytest.raises(UserError, match="init: memory://out/x: a is damaged there"):
        here("memory://out/x", "init")
    for name in ("../a", "/etc/a"):
        entry = {"bytes": 1, "sha256": "0"}
        MEMORY.pipe_file(f"/out/x/{LISTING}", json.dumps({"whole": True, "files": {name: entry}}).encode())
        with pytest.raises(UserError, match="which lies outside of it"):
            here("memory://out/x", "init")
    MEMORY.pipe_file(f"/out/x/{LISTING}", b"[1]")
    with pytest.raises(UserError, match=r"posttrain\.json cannot be read"):
        here("memory://out/x", "init")


def test_refusals_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"init: no 'gss' is known in gss://x/y - did you mean 'gs'"):
        here("gss://x/y", "init")
    with pytest.raises(UserError, match="init: there is nothing at memory://no/thing"):
        here("memory://no/thing", "init")
    with pytest.raises(UserError, match="holds a password") as error:
        here(f"sftp://me:{'hunter2' * 2}@host/x", "init")
    assert "hunter2" not in str(error.value)

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", absent)
    with pytest.raises(UserError, match=r"init: s3:// needs a package that is not installed; pip install 'posttrain\[remote\]'"):
        here("s3://bucket/x", "init")


def test_a_network_is_asked_again_and_what_it_says_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    place, tries = Place("memory://x", "init"), list[int]()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdefgh12345678")

    def fails(times: int, error: Exception) -> Any:
        tries.append(1)
        if len(tries) <= times:
            raise error
        return "done"

    assert place.ask(lambda: fails(2, OSError("reset")), "x") == "done" and len(tries) == 3
    tries[:] = []
    with pytest.raises(RemoteError, match=r"memory://x: cannot be read .no such key <hidden>") as error:
        place.ask(lambda: fails(9, OSError("no such key abcdefgh12345678")), "cannot be read")
    assert len(tries) == remote.TRIES and "abcdefgh" not in str(error.value)
    tries[:] = []
    with pytest.raises(RemoteError, match="the credentials may not do that"):
        place.ask(lambda: fails(9, PermissionError("no")), "cannot be read")
    assert len(tries) == 1  # trying again does not help
