"""What the comments in a YAML file say of its keys.

The comment of a key stands behind its value, and may go on in the lines below it, further in than the key. The comment at the top
of a file says what the file is for. What a file leaves unexplained is explained by the files that its defaults list includes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Explained:
    """One key in one YAML file: its value as it is written, and the comment behind it."""

    value: str | None  # None: a section
    comment: str


@cache
def explained(path: Path) -> dict[str, Explained]:
    """Dotted key -> what one file says of it."""
    lines = path.read_text().splitlines()
    found: dict[str, Explained] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        assert isinstance(node, yaml.MappingNode)
        for key, value in node.value:
            section = isinstance(value, yaml.MappingNode) and bool(value.value) and not value.flow_style
            line = key.start_mark.line
            begin = key.end_mark.column + 1 if section else value.end_mark.column
            text = None if section else lines[line][key.end_mark.column + 1 : begin].strip()
            found[prefix + key.value] = Explained(text, _comment(lines, line, begin, key.start_mark.column))
            if section and key.value != "defaults":
                walk(value, f"{prefix}{key.value}.")

    if tree := yaml.compose(path.read_text()):
        walk(tree, "")
    found.pop("defaults", None)
    return found


def _comment(lines: list[str], line: int, begin: int, indent: int) -> str:
    """The comment behind column `begin`, with the lines of comment below it that stand further in than `indent`."""
    at = lines[line].find("#", begin)
    if at < 0:
        return ""
    parts = [lines[line][at:]]
    for below in lines[line + 1 :]:
        if below.strip()[:1] != "#" or below.index("#") <= indent:
            break
        parts.append(below)
    return " ".join(part.strip().lstrip("#").strip() for part in parts)


def header(path: Path) -> str:
    """The comment that a file begins with."""
    found = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        found.append(line.lstrip("#").strip())
    return " ".join(line for line in found if not line.startswith("@package"))


def included(path: Path, package: str = "") -> Iterator[tuple[Path, str]]:
    """The file, then those that its defaults list includes: each with the section that its keys lie in."""
    whole = path.read_text()
    package = "" if "@package _global_" in whole else package
    yield path, package
    for entry in (yaml.safe_load(whole) or {}).get("defaults", []):
        group, option = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if option == "_self_" or (group and group.startswith("override ")):
            continue
        below = path.parent / f"{group}/{option}.yaml" if group else path.parent / f"{option}.yaml"
        if below.exists():
            yield from included(below, f"{group}." if group else package)


def said(path: Path, package: str = "") -> dict[str, Explained]:
    """Dotted key -> what a file and those that it includes say of it; the outer file first, a comment before none."""
    found: dict[str, Explained] = {}
    for file, prefix in included(path, package):
        for key, here in explained(file).items():
            name = prefix + key
            before = found.get(name)
            found[name] = Explained(before.value, before.comment or here.comment) if before else here
    return found
