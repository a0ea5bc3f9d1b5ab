"""The Dockerfile, read as text: it is not built here. Who it runs as, where its cache is, and that what it names exists."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="runs from a checkout only")


def instructions() -> list[tuple[str, str]]:
    """(word, the rest), with continued lines joined."""
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def last(word: str) -> str:
    return [rest for name, rest in instructions() if name == word][-1]


def project() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_it_runs_as_a_user_that_it_makes_and_not_as_root() -> None:
    user, found = last("USER"), instructions()
    assert user not in ("root", "0")
    made = next(
        i for i, (name, rest) in enumerate(found) if name == "RUN" and "useradd" in rest and rest.split(" && ")[0].endswith(user)
    )
    assert made < found.index(("USER", user)) < next(i for i, (name, rest) in enumerate(found) if "pip install" in rest)
    assert re.search(rf"chown {user} [^&]*/cache", found[made][1])  # else a new volume would be root's


def test_every_cache_is_in_the_volume() -> None:
    volume, caches = last("VOLUME"), dict(re.findall(r"(\w*CACHE\w*|HF_HOME)=(/\S+)", last("ENV")))
    assert set(caches) == {"POSTTRAIN_CACHE", "HF_HOME", "TRITON_CACHE_DIR"}
    assert all(place.startswith(f"{volume}/") for place in caches.values())


def test_the_entry_point_and_the_extras_are_the_projects() -> None:
    known = project()["project"]
    assert json.loads(last("ENTRYPOINT"))[0] in known["scripts"]
    named = next(rest for name, rest in instructions() if name == "ARG" and rest.startswith("EXTRAS=")).removeprefix("EXTRAS=")
    comments = re.findall(r"EXTRAS=([\w,]+)", (ROOT / "Dockerfile").read_text())
    assert set(",".join([named, *comments]).split(",")) <= set(known["optional-dependencies"]) and "liger" in named


def test_what_is_copied_is_there_is_let_in_and_is_all_that_the_wheel_is_made_of() -> None:
    copied = {each for name, rest in instructions() if name == "COPY" for each in rest.split()[1:-1]}
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_in and all((ROOT / name).exists() for name in copied)
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]  # pyright: ignore
    assert {*wheel["force-include"], "pyproject.toml", "src", "README.md", "LICENSE"} == copied  # pyright: ignore


def test_from_is_a_cuda_runtime_of_the_version_that_torchs_wheel_is_for() -> None:
    """A driver that is too old for torch is then refused as the container starts, not in a run."""
    found = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-(base|runtime)-ubuntu\d\d\.04", last("FROM"))
    said = re.search(r"its wheel on PyPI is for CUDA (\d+)", (ROOT / "docs" / "gpu.md").read_text())
    assert found and said and found[1] == said[1] and "580" in (ROOT / "Dockerfile").read_text()
