"""`posttrain cache`: what lies in the cache, and how room is made there without taking anything from a run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from posttrain.console import console, say
from posttrain.errors import UserError, did_you_mean
from posttrain.runs.cache import NOTE
from posttrain.runs.cache_place import KINDS, Kind, cache_places, unused
from posttrain.runs.files import sweep_leftovers, temporary_beside

CLEAN = "clean"
DAY = 24 * 3600
UNITS = ("B", "KB", "MB", "GB", "TB")


class Entry(NamedTuple):
    """Something in the cache that is made, and cleaned, as a whole. used: seconds since 1970."""

    kind: str
    path: Path
    bytes: int
    used: float
    origin: str


def kinds(places: list[Path]) -> dict[str, Kind]:
    """Those of posttrain, and each further folder, as an extension may have made it."""
    folders = {kind.pattern.split("/")[0] for kind in KINDS.values()}
    there = [path for place in places if place.is_dir() for path in place.iterdir()]
    others = sorted({path.name for path in there if path.is_dir() and path.name not in folders})
    return KINDS | {name: Kind(name, f"{name}/*", "of an extension") for name in others if not name.startswith(".")}


def chosen_kinds(words: list[str], known: dict[str, Kind]) -> list[Kind]:
    """All of them where no word is given. Raises UserError, with a near name."""
    for word in words:
        if word not in known:
            hint = did_you_mean(word, [*known, CLEAN]) or f"; there are: {', '.join(known)}"
            raise UserError(f"cache: there is no kind '{word}' of entries{hint}")
    return [known[word] for word in dict.fromkeys(words)] or list(known.values())


def entries(places: list[Path], of: Iterable[Kind]) -> list[Entry]:
    """What lies in them, but for locks and what is being written, the least recently used first."""
    found = [
        _entry(kind.name, path)
        for kind in of
        for place in places
        for path in place.glob(kind.pattern)
        if path.suffix != ".lock" and not path.name.startswith(".")
    ]
    return sorted((entry for entry in found if entry), key=lambda entry: entry.used)


def _entry(kind: str, path: Path) -> Entry | None:
    """None for what has gone meanwhile."""
    try:
        size = sum(p.lstat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.lstat().st_size
        return Entry(kind, path, size, path.stat().st_mtime, _origin(path))
    except OSError:
        return None


def _origin(path: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        if (path / NOTE).is_file():
            return str(json.loads((path / NOTE).read_text(encoding="utf-8"))["origin"])
        if (path / "recipe.json").is_file():
            return f"pictures of '{json.loads((path / 'recipe.json').read_text(encoding='utf-8'))['prompt']}'"
    return ""


def list_cache(words: list[str]) -> dict[str, Any]:
    """Every kind with its entries, as JSON has it. words: the kinds that are meant; none: all."""
    places, now = cache_places(), time.time()
    of = chosen_kinds(words, kinds(places))
    found = entries(places, of)
    rows: list[dict[str, Any]] = []
    for kind in of:
        mine = [entry for entry in found if entry.kind == kind.name]
        told = [
            {"path": str(e.path), "bytes": e.bytes, "unused_days": round((now - e.used) / DAY, 2), "origin": e.origin}
            for e in mine
        ]
        rows.append({"kind": kind.name, "about": kind.about, "bytes": sum(e.bytes for e in mine), "entries": told})
    return _directories(places) | {"bytes": sum(entry.bytes for entry in found), "kinds": rows}


def _directories(places: list[Path]) -> dict[str, Any]:
    return {"directory": str(places[0]), "in its place": [str(place) for place in places[1:]]}


def clean_cache(words: list[str], days: float | None, everything: bool) -> dict[str, Any]:
    """Take away what was chosen and nobody is making or using.

    words: kinds; none: all that are made again by themselves. days: only what was not used for so long. everything: must be said
    where nothing else is.

    Raises UserError where nothing was chosen.
    """
    places, now = cache_places(), time.time()
    known = kinds(places)
    of = chosen_kinds(words, known)
    if days is not None and days < 0:
        raise UserError(f"--older-than: {days:g} days are none; give 0 or more")
    if everything and (words or days is not None):
        raise UserError("--all: takes everything, so leave out kinds and --older-than, or leave out --all")
    if not (words or everything or days is not None):
        raise UserError(f"cache clean: say what: a kind ({', '.join(known)}), --older-than DAYS, or --all")
    of = [kind for kind in of if words or kind.again]
    found = [entry for entry in entries(places, of) if days is None or now - entry.used >= days * DAY]
    result: dict[str, Any] = _directories(places) | {"bytes": 0, "removed": [], "left": []}
    for entry in found:
        why = _remove(entry.path)
        told = {"kind": entry.kind, "path": str(entry.path), "bytes": entry.bytes}
        if why:
            result["left"].append(told | {"why": why})
        else:
            result["removed"].append(told)
            result["bytes"] += entry.bytes
    for folder in {place / kind.pattern.split("/")[0] for place in places for kind in of}:
        sweep_leftovers(folder)
    return result


def _remove(path: Path) -> str:
    """Why it was left, in words; '' where it is gone. A directory goes at once, by its name, so that nobody reads a half."""
    try:
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return ""
        with unused(path) as free:
            if not free:
                return "in use"
            aside = temporary_beside(path)
            path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def show_cache(found: dict[str, Any], each: bool) -> None:
    """As a table: a line a kind, or an entry."""
    title = ("entry", "size", "last used", "from") if each else ("kind", "entries", "size", "last used", "what it is for")
    table = Table(*title, box=SIMPLE_HEAD, pad_edge=False)
    for kind in found["kinds"]:
        mine = kind["entries"]
        if each:
            for entry in mine:
                name = Path(entry["path"]).name
                table.add_row(name, size(entry["bytes"]), _days(entry["unused_days"]), entry["origin"])
        elif mine:
            newest = _days(min(entry["unused_days"] for entry in mine))
            table.add_row(kind["kind"], f"{len(mine):,}", size(kind["bytes"]), newest, kind["about"])
    console.print(table)
    say(f"{size(found['bytes'])} in {_where(found)} (POSTTRAIN_CACHE moves it); posttrain cache clean frees some")


def show_cleaned(found: dict[str, Any]) -> None:
    """A line a kind, and why something was left."""
    for name in dict.fromkeys(each["kind"] for each in found["removed"]):
        mine = [each for each in found["removed"] if each["kind"] == name]
        say(f"{name}: {_entries(len(mine))}, {size(sum(each['bytes'] for each in mine))}")
    for why in dict.fromkeys(each["why"] for each in found["left"]):
        mine = [each for each in found["left"] if each["why"] == why]
        say(f"left: {_entries(len(mine))} ({why}), such as {mine[0]['path']}")
    say(f"{size(found['bytes'])} freed in {_where(found)}")


def _where(found: dict[str, Any]) -> str:
    return " and ".join([found["directory"], *found["in its place"]])


def size(count: float) -> str:
    """1,234,567 -> 1.2 MB."""
    for unit in UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == UNITS[0] or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {UNITS[-1]}"


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"


def _days(days: float) -> str:
    return "today" if days < 1 else "yesterday" if days < 2 else f"{days:.0f} days ago"
