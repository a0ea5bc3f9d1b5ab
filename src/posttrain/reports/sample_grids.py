"""Samples that a run has left, as grids for its page: one a prompt, one column an evaluation."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 192  # pixels of a picture on the page; the files in samples/ keep their size


def sample_grids(run_dir: Path) -> list[dict[str, Any]]:
    """{kind, prompt, shots: [{label, images}]} of every prompt, the images as data URIs; empty where there are no samples."""
    folder = run_dir / "samples"
    if not (folder / "index.json").exists():
        return []
    steps = sorted(folder.glob("step-*"))
    grids: list[dict[str, Any]] = []
    for number, about in enumerate(json.loads((folder / "index.json").read_text(encoding="utf-8"))):
        shots = [
            {"label": _label(step), "images": [as_uri(file) for file in sorted(step.glob(f"{number}-*.png"))]} for step in steps
        ]
        grids.append({**about, "shots": shots})
    return grids


def _label(step: Path) -> str:
    done = int(step.name.removeprefix("step-"))
    return f"step {done}" if done else "before"


def as_uri(file: Path) -> str:
    """A picture as a page can carry it: small ones as they are, larger ones shrunk."""
    with Image.open(file) as image:
        image.load()
    buffer = io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
    else:
        image.save(buffer, format="PNG")
    kind = "jpeg" if buffer.getvalue()[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
