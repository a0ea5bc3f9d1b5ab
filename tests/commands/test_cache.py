"""`posttrain cache`: what lies there, and what may be taken away."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.cli.machine import _cache_words
from posttrain.commands.cache import clean_cache, list_cache, size
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory
from posttrain.models.hub import resolve
from posttrain.runs.cache import cached_directory, cached_json
from posttrain.runs.cache_place import KINDS, hold, locked, release

DAY = 24 * 3600


def fill(directory: Path, count: int) -> Path:
    def make(out: Path) -> str:
        out.mkdir()
        (out / "file").write_bytes(b"\0" * count)
        return "made of nothing"

    place, _ = cached_directory(directory, make)
    release(place)
    return place


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two models, a merged base, tokens of 40 days ago, a figure, and something of an extension."""
    root = tmp_path / "cache"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(root))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fill(root / "models" / "one-v1", 1000)
    fill(root / "models" / "two-v1", 500)
    fill(root / "models" / "merged-abc", 300)
    cached_json(root / "measured" / "x.json", lambda: 1)
    fill(root / "mine" / "a", 50)
    old = fill(root / "data" / "k", 200)
    then = time.time() - 40 * DAY
    os.utime(old, (then, then))
    return root


def names(found: dict[str, Any], key: str) -> list[str]:
    return sorted(Path(each["path"]).name for each in found[key])


def test_what_is_there_by_kind(root: Path) -> None:
    found = list_cache([])
    entries = {kind["kind"]: [Path(entry["path"]).name for entry in kind["entries"]] for kind in found["kinds"]}
    assert {kind: sorted(each) for kind, each in entries.items() if each} == {
        "models": ["one-v1", "two-v1"], "merged": ["merged-abc"], "data": ["k"], "measured": ["x.json"], "mine": ["a"],
    }  # fmt: skip
    assert set(entries) == {*KINDS, "mine"} and found["directory"] == str(root)
    note = len((root / "models" / "one-v1" / "source.json").read_bytes())
    models = found["kinds"][0]
    assert models["bytes"] == 1500 + 2 * note - 1 and models["about"]  # 500 is a figure shorter than 1000
    (data,) = next(kind["entries"] for kind in found["kinds"] if kind["kind"] == "data")
    assert abs(data["unused_days"] - 40) < 0.1 and data["origin"] == "made of nothing"
    assert found["bytes"] == sum(kind["bytes"] for kind in found["kinds"])
    assert [kind["kind"] for kind in list_cache(["data", "data"])["kinds"]] == ["data"]


def test_what_was_made_in_place_of_a_cache_that_may_not_be_written_is_there_too(root: Path, tmp_path: Path) -> None:
    detour = tmp_path / f"posttrain-cache-{os.getuid()}"
    assert list_cache([])["in its place"] == [] and not detour.exists()  # who lists makes nothing
    detour.mkdir(mode=0o700)
    fill(detour / "data" / "k2", 10)
    found = list_cache(["data"])
    assert found["in its place"] == [str(detour)] and names(found["kinds"][0], "entries") == ["k", "k2"]
    shown = CliRunner().invoke(app, ["cache"]).output.replace("\n", "")
    assert f"in {root} and {detour}" in shown.replace("  ", " ")
    assert names(clean_cache(["data"], None, False), "removed") == ["k", "k2"] and not (detour / "data" / "k2").exists()
    detour.chmod(0o755)  # another could have put something there: it is not taken for ours
    assert list_cache([])["in its place"] == []


def test_only_what_was_chosen_is_taken_away(root: Path) -> None:
    assert names(clean_cache([], 30, False), "removed") == ["k"]
    found = clean_cache(["models"], None, False)
    assert names(found, "removed") == ["one-v1", "two-v1"] and found["bytes"] > 1500 and found["left"] == []
    assert names(clean_cache(["data", "mine"], 30, False), "removed") == []
    assert names(clean_cache([], None, True), "removed") == ["a", "x.json"], "what some run still needs is asked for by name"
    assert names(clean_cache(["merged"], None, False), "removed") == ["merged-abc"]
    assert [path for path in root.rglob("*") if not path.is_dir()] == [], "no lock, and nothing half gone"


def test_what_is_made_or_used_is_left(root: Path) -> None:
    """By another process, of whose locks this one knows by the system alone."""
    code = (
        "import sys; from pathlib import Path; from posttrain.runs.cache_place import hold, locked\n"
        "root = Path(sys.argv[1]); hold(root / 'one-v1')\n"
        "with locked(root / 'two-v1'): print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(root / "models")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "there\n"
        found = clean_cache(["models"], None, False)
        assert names(found, "left") == ["one-v1", "two-v1"] and found["removed"] == [] and found["bytes"] == 0
        assert {each["why"] for each in found["left"]} == {"in use"}
        other.communicate()
    assert names(clean_cache(["models"], None, False), "removed") == ["one-v1", "two-v1"]


def test_half_written_entries_are_left_but_for_those_of_the_dead(root: Path) -> None:
    import platform
    import re

    host = re.sub(r"\W", "_", platform.node()) or "here"
    mine, dead = (root / "data" / f".k.{host}-{number}-0123abcd.tmp" for number in (os.getpid(), 2**22 - 1))
    mine.mkdir()
    dead.mkdir()
    clean_cache(["data"], None, False)
    assert mine.exists() and not dead.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cache modles", "cache: there is no kind 'modles' of entries - did you mean 'models'?"),
        ("cache claen", "cache: there is no kind 'claen' of entries - did you mean 'clean'?"),
        ("cache clean dta", "cache: there is no kind 'dta' of entries - did you mean 'data'?"),
        ("cache clean xyzzy", "cache: there is no kind 'xyzzy' of entries; there are: models, merged, "),
        ("cache clean", "cache clean: say what: a kind (models, merged, "),
        ("cache clean --older-than -3", "--older-than: -3 days are none; give 0 or more"),
        ("cache clean models --all", "--all: takes everything, so leave out kinds and --older-than, or leave out --all"),
        ("cache --all", "--older-than and --all say what to clean: posttrain cache clean --older-than 30"),
    ],
)
def test_a_wrong_word_is_one_line_and_takes_nothing(root: Path, words: str, said: str) -> None:
    before = sorted(root.rglob("*"))
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2 and said in result.stderr and sorted(root.rglob("*")) == before
    assert len(result.stderr.strip().splitlines()) == 1


def test_on_the_terminal_and_as_json(root: Path) -> None:
    shown = CliRunner().invoke(app, ["cache"], env={"COLUMNS": "120"}).stdout
    assert "rows as tokens" in shown and "40 days ago" in shown and f"in {root}" in shown
    shown = CliRunner().invoke(app, ["cache", "models"], env={"COLUMNS": "120"}).stdout
    assert "one-v1" in shown and "made of nothing" in shown and "merged-abc" not in shown
    hold(root / "models" / "one-v1")
    shown = CliRunner().invoke(app, ["cache", "clean", "--all"], env={"COLUMNS": "120"}).stdout
    assert "data: 1 entry, " in shown and "left: 1 entry (in use), such as " in shown and f"freed in {root}" in shown
    release(root / "models" / "one-v1")
    found = json.loads(CliRunner().invoke(app, ["cache", "clean", "models", "--json"]).stdout)
    assert names(found, "removed") == ["one-v1"]
    assert json.loads(CliRunner().invoke(app, ["cache", "--json"]).stdout)["kinds"][0]["bytes"] == 0


def test_words_are_completed() -> None:
    assert _cache_words("cl") == ["clean", "class_images"] and _cache_words("da") == ["data"]


def test_no_cache_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "none"))
    assert list_cache([])["bytes"] == 0 and clean_cache([], None, True)["removed"] == []
    with pytest.raises(UserError, match="no kind"):
        list_cache(["x"])


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 123_456, 2_345_678, 1.5e10, 3e15)] == [
        "0 B", "999 B", "1.0 KB", "123 KB", "2.3 MB", "15.0 GB", "3000.0 TB",
    ]  # fmt: skip


def test_a_built_in_base_that_was_cleaned_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache has moved: a run names its base by its place there."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "old"))
    place, _ = builtin_directory("tiny")
    weights = (place / "model.safetensors").read_bytes()
    release(place)
    clean_cache(["models"], None, False)
    assert not place.exists() and resolve(str(place), None).directory == place
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "new"))
    release(place)
    clean_cache([], None, True)
    import shutil

    shutil.rmtree(tmp_path / "old")
    found = resolve(str(place), None).directory
    assert found == tmp_path / "new" / "models" / "tiny-v1" and (found / "model.safetensors").read_bytes() == weights


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    with locked(tmp_path / "x"):
        assert (tmp_path / "x.lock").exists()
    assert list(tmp_path.iterdir()) == []
