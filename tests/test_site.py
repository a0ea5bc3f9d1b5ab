"""The docs as a site: mkdocs finds nothing wrong, its search knows the pages, and nothing is fetched from the network."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.commands.docs.pages import pages

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "mkdocs.yml").exists(), reason="runs from a checkout only"),
    pytest.mark.skipif(not find_spec("material"), reason="needs mkdocs-material: pip install 'posttrain[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_every_page_is_there_and_search_knows_it(site: Path) -> None:
    there = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")} - {"404"}
    assert there == {name.replace("README", "index") for name in pages()}
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    gated = [entry for entry in index["docs"] if entry["title"] == "Gated models"]
    assert [entry["location"] for entry in gated] == ["hub.html#gated-models"]


def test_nothing_comes_from_the_network(site: Path) -> None:
    fetched = re.compile(
        r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(https?:)?//[^>]*>|@import|url\(["']?https?:"""
    )
    found = {
        path.name: hit[0]
        for path in site.rglob("*")
        if path.suffix in (".html", ".css") and (hit := fetched.search(path.read_text(encoding="utf-8")))
    }
    assert found == {}
