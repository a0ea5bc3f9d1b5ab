"""The bounds in pyproject.toml: the lowest versions can be named, ours are within them, CI tries others."""

from __future__ import annotations

import ast
import os
import subprocess
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import versions

ROOT = Path(versions.ROOT)


def test_every_dependency_has_a_lowest_version_that_is_below_ours() -> None:
    pins = [Requirement(each) for each in versions.lowest()]
    assert len(pins) >= 20 and not {each.name for each in pins} & set(versions.LEFT_ALONE)
    above = {each.name: str(each.specifier) for each in pins if Version(version(each.name)) < Version(str(each.specifier)[2:])}
    assert above == {}
    assert versions.dependencies()["hydra-core"] == ">=1.3.8,<1.4"


def test_what_is_tried_imports_every_dependency() -> None:
    """Itself, or the files of ours that it imports."""
    names = {name.lower() for name in versions.dependencies()}
    modules = {m for m, of in packages_distributions().items() if {each.lower().replace("_", "-") for each in of} & names}
    found = set[str]()
    for test in versions.TESTS:
        direct = _imports(ROOT / test.partition("::")[0])
        for each in direct:
            ours = ROOT / "src" / Path(*each.split(".")).with_suffix(".py")
            direct = direct | (_imports(ours) if ours.is_file() else set())
        found |= {each.split(".")[0] for each in direct}
    distributions = packages_distributions()
    tried = {of.lower().replace("_", "-") for module in modules & found for of in distributions[module]}
    assert names - tried == set()


def _imports(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return found


@pytest.mark.parametrize(
    ("said", "code", "printed"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement peft==0.19 (from versions: none)",
            0,
            "SKIPPED: the registry",
        ),
        ("ERROR: Could not find a version that satisfies the requirement peft==0.19 (from versions: 0.18)", "0.18", ""),
    ],
)
def test_no_registry_is_said_and_a_wrong_bound_fails(
    said: str, code: Any, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    python = tmp_path / "build" / "lowest" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    if printed:
        assert versions.main("lowest", []) == code and printed in capsys.readouterr().out
        return
    with pytest.raises(SystemExit, match=code):
        versions.main("lowest", [])


def test_the_newest_that_are_here_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, '{"install": []}', ""))
    assert versions.main("newest", []) == 0 and "are those of this environment" in capsys.readouterr().out


@pytest.mark.slow
def test_the_venv_has_the_package_without_a_path_that_somebody_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "_pip", lambda *words: "")
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    python = versions.installed("of_a_test", [])
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [python, "-c", "import posttrain.cli, yaml; print(posttrain.__file__)"],
        env=bare,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert Path(said.stdout.strip()).is_relative_to(tmp_path / "src")
    asked = subprocess.run([python.with_name("posttrain"), "--help"], env=bare, cwd=tmp_path, capture_output=True, text=True)
    assert asked.returncode == 0 and "preview" in asked.stdout, asked.stderr
