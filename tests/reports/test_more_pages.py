"""Pages beside those of runs, in a browser: a preview, the demo of DreamBooth, the docs. axe finds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.reports.test_browser import CHROMIUM, LOOKS, complaints, page, shown  # noqa: F401

import dreambooth_demo as demo
from posttrain.commands.docs.server import answer
from posttrain.commands.preview.page import preview_page
from posttrain.commands.preview.preview import make_preview

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")]
DOCS = ("first-hour", "configuration", "metrics", "models", "api/models")


def check(tab: Any, file: Path) -> None:
    for width, scheme in LOOKS:
        assert complaints(tab, f"file://{file}", width, scheme) == [], (file.name, width, scheme)


@pytest.mark.parametrize("stage", ["sft", "dpo", "cpt"])
def test_a_preview(shown: Any, stage: str, tmp_path: Path) -> None:  # noqa: F811
    found = make_preview(stage, ["model=tiny", "data.max_rows=30", "data.eval_rows=4"], 30, 2)
    check(shown, preview_page(found, tmp_path / "preview.html"))


def test_the_demo_of_dreambooth(shown: Any, tmp_path: Path) -> None:  # noqa: F811
    photos = tmp_path / "photos"
    photos.mkdir()
    image = Image.new("RGB", (64, 64), (200, 90, 40))
    image.save(photos / "0.png")
    shares = {"individual": 0.5, **{prompt.split()[-1]: 0.25 for prompt in demo.PROMPTS}}
    of_prompt = {"images": [image] * 2, "shares": shares}
    found = {"before": dict.fromkeys(demo.PROMPTS, of_prompt)}
    demo.write_outcome(found, {}, 0.98, photos, tmp_path, 60.0)
    check(shown, tmp_path / "report.html")


@pytest.mark.skipif(
    not find_spec("material") or not (ROOT / "mkdocs.yml").exists(), reason="needs mkdocs-material, and a checkout"
)
def test_the_site_of_the_docs(page: Any, tmp_path: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    for name in ("index", *DOCS):
        check(page, tmp_path / f"{name}.html")


def test_the_docs_that_are_served(page: Any, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "api").mkdir()
    for name in ("index", *DOCS):
        (tmp_path / f"{name}.html").write_bytes(answer(f"/{name}.html")[2])
        check(page, tmp_path / f"{name}.html")
