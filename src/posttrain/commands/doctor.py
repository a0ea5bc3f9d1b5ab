"""What this machine offers to a run, as a table, with a word where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from posttrain.console import console
from posttrain.errors import UserError
from posttrain.runs.cache_place import cache_root
from posttrain.runs.identity import library_versions

if TYPE_CHECKING:
    from posttrain.models.kernels.choice import KernelReport

OPTIONAL = {
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_submitit_launcher": "sweep",
    "hydra_plugins.hydra_ray_launcher": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "liger_kernel": "liger",
}
GIB = 2**30


def examine() -> None:
    """Print the table."""
    table = Table("what", "here", box=SIMPLE_HEAD, pad_edge=False)
    for what, here in (*_machine(), *_places(), *library_versions().items(), *_kernels(), *_extras()):
        table.add_row(what, here)
    console.print(table)


def _machine() -> list[tuple[str, str]]:
    import torch

    from posttrain.config.interfaces import QUANTIZERS
    from posttrain.models.quantization import quantizer_of

    rows = [("system", platform.platform()), ("cores", f"{_cores()} usable"), ("memory", _memory())]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            rows.append((f"gpu {i}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"))
    else:
        rows.append(("gpu", "none: everything runs on the CPU"))
    for name in QUANTIZERS.names():
        try:
            if quantizer_of({"method": name}).try_out("cuda" if torch.cuda.is_available() else "cpu"):
                rows.append((name, "works"))
        except UserError as error:
            rows.append((name, str(error)))
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
        ("cache", f"{cache}, {_size(cache) / GIB:.2f} GiB (posttrain cache lists it, POSTTRAIN_CACHE moves it)"),
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


def _kernels() -> list[tuple[str, str]]:
    """Which modules of the installed transformers and peft compute what each kernel was written for."""
    import torch

    from posttrain.models.kernels.candidates import peft_differs
    from posttrain.models.kernels.inference_weights import missing

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, dict[str, str]] = {"RMSNorm": {}, "SwiGLU": {}}
    for family in FAMILIES:
        report = _report_of(family)
        for kernel in found:
            left = [each.why for each in report.left if each.kernel == kernel and each.expected]
            if left or kernel in report.taken:
                found[kernel][family] = left[0] if left else ""
    found["LoRA linear"] = {name: peft_differs(name == "NF4", device) for name in ("plain weights", "NF4")}
    rows = [(f"kernel {kernel}", _in_words(where)) for kernel, where in found.items()]
    lacks = f"torch has no {missing()}" if missing() else "" if torch.backends.mkldnn.is_available() else "torch has no oneDNN"
    return [*rows, ("kernel for sampling on a CPU", f"not used: {lacks}" if lacks else "used")]


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")


def _report_of(family: str) -> KernelReport:
    """On a small model of that family, of shapes alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.models.kernels.choice import use_kernels

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    config = AutoConfig.for_model(family, **shape, num_hidden_layers=1, pad_token_id=0)
    with torch.device("meta"):
        return use_kernels(AutoModelForCausalLM.from_config(config), "auto")


def _in_words(where: dict[str, str]) -> str:
    used = ", ".join(name for name, why in where.items() if not why)
    return "; ".join([*([f"used for {used}"] if used else []), *(f"not for {name}: {why}" for name, why in where.items() if why)])


def _extras() -> list[tuple[str, str]]:
    rows = []
    for module, extra in OPTIONAL.items():
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        rows.append((module.rsplit(".", 1)[-1], "installed" if found else f"not installed: pip install 'posttrain[{extra}]'"))
    return rows
