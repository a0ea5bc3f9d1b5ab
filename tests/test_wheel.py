"""What a user gets from the wheel: the package with its configs and recipes, away from any checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from posttrain.config.paths import root

pytestmark = pytest.mark.slow
CHECKOUT = root("configs").parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as pip would lay it into an environment's site-packages."""
    if not (CHECKOUT / "pyproject.toml").exists():
        pytest.skip("runs from a checkout only")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=CHECKOUT, check=True)
    site = folder / "site"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


def test_configs_and_recipes_come_along(unpacked: Path) -> None:
    for kind in ("configs", "recipes"):
        shipped = {p.relative_to(root(kind)) for p in root(kind).rglob("*.yaml")}
        assert shipped and shipped == {p.relative_to(unpacked / "posttrain" / kind) for p in unpacked.rglob(f"{kind}/**/*.yaml")}
    assert list(unpacked.rglob("general.txt")) and list(unpacked.rglob("templates/run.html"))
    assert (unpacked / "posttrain" / "py.typed").exists()


def test_the_docs_come_along_and_are_read_offline(unpacked: Path, tmp_path: Path) -> None:
    """From the unpacked wheel, in a process that may open no socket: every page of mkdocs.yml, with its pictures."""
    code = """
import socket
socket.socket.connect = None
from posttrain.commands.docs.pages import pages, root
from posttrain.commands.docs.server import answer
assert str(root("docs")).startswith(PLACE), root("docs")
found = {name: answer(f"/{name}.html")[0] for name in pages()}
assert set(found.values()) == {200} and len(found) > 40, found
assert answer("/methods.svg")[0] == 200 and "Gated models" in pages()["hub"].text
from posttrain.cli import app
app(["docs", "first-hour"])
"""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", code.replace("PLACE", repr(str(unpacked)))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# The first hour")


def test_a_run_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    words = ["sft", "model=tiny", "+peft=lora", "train.max_steps=1", "train.batch_size=2", "data.max_rows=8", "data.eval_rows=2"]
    code = f"import sys, posttrain; print(posttrain.__file__); posttrain.run(*{words!r}, 'run.dir=out')"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked))
    assert (tmp_path / "out" / "manifest.json").exists() and (tmp_path / "out" / "report.html").exists()
