"""What this machine offers to a run, as a table, with a word where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from posttrain.console import console
from posttrain.errors import UserError
from posttrain.runs.cache import cache_root
from posttrain.runs.identity import library_versions

OPTIONAL = {
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_submitit_launcher": "sweep",
    "hydra_plugins.hydra_ray_launcher": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}
GIB = 2**30


def examine() -> None:
    """Print the table."""
    table = Table("what", "here", box=SIMPLE_HEAD, pad_edge=False)
    for what, here in (*_machine(), *_places(), *library_versions().items(), *_extras()):
        table.add_row(what, here)
    console.print(table)


def _machine() -> list[tuple[str, str]]:
    import torch

    from posttrain.models.quantization import nf4

    rows = [("system", platform.platform()), ("cores", f"{_cores()} usable"), ("memory", _memory())]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            rows.append((f"gpu {i}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"))
    else:
        rows.append(("gpu", "none: everything runs on the CPU"))
    try:
        nf4(double_quant=True, compute_dtype="bfloat16", device="cuda" if torch.cuda.is_available() else "cpu")
        rows.append(("nf4", "works"))
    except UserError as error:
        rows.append(("nf4", str(error)))
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _places() -> list[tuple[str, str]]:
    cache = cache_root()
    return [
        ("disk here", f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free"),
        ("cache", f"{cache}, {_size(cache) / GIB:.2f} GiB (POSTTRAIN_CACHE moves it)"),
        ("hub", "reachable" if _hub() else "not reachable: give models and data as directories and files"),
    ]


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.is_dir() else 0


def _hub() -> bool:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    from urllib.parse import urlsplit

    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


def _extras() -> list[tuple[str, str]]:
    rows = []
    for module, extra in OPTIONAL.items():
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        rows.append((module.rsplit(".", 1)[-1], "installed" if found else f"not installed: pip install 'posttrain[{extra}]'"))
    return rows
