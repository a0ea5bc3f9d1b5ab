"""A base with an adapter merged into it, kept in the cache: what a chained stage's new adapter belongs to."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from posttrain.cache import cache_root
from posttrain.models.adapters import merge_into
from posttrain.models.base import BaseInfo, resolve
from posttrain.models.causal import load_causal


def merged_directory(base: BaseInfo, adapter_dir: Path, identity: str) -> Path:
    """W0 + change, computed in float32 and written in the base's own dtype; made at the first call.

    identity: names the adapter's content, as `base.digest` names the base's.
    """
    name = hashlib.sha256(f"{base.digest} {identity}".encode()).hexdigest()[:32]
    directory = cache_root() / "models" / f"merged-{name}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory) + ".lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                made = Path(scratch) / "merged"
                _merge(base, adapter_dir, made)
                made.rename(directory)
    return directory


def _merge(base: BaseInfo, adapter_dir: Path, out: Path) -> None:
    source = resolve(base.path, base.revision)
    model: Any = merge_into(load_causal(base.path, base.revision, "float32", "cpu", False, None), adapter_dir)
    config = json.loads((source.directory / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    model.to(getattr(torch, dtype)).save_pretrained(out)
    for file in adapter_dir.iterdir():  # the tokenizer, with its template
        if not file.name.startswith("adapter_") and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(file, out / file.name)
