"""Jobs beside each other on one machine: each has a GPU that no other has."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def one_gpu() -> Generator[dict[str, str]]:
    """The environment for one job: with a GPU that no other job of this machine holds, where there is any GPU."""
    all_gpus = gpus()
    with ExitStack() as held:
        while all_gpus:
            for gpu in all_gpus:
                try:
                    held.enter_context(_gpu_lock(gpu))
                except Timeout:
                    continue
                yield {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                return
            time.sleep(1.0)
        yield dict(os.environ)


def _gpu_lock(gpu: str) -> FileLock:
    """Of all users of this machine; where another's may not be opened (a sticky directory), of this user's own jobs."""
    folder = Path(tempfile.gettempdir())
    shared = folder / f"posttrain-gpu-{gpu}.lock"
    is_mine = not shared.exists() or (os.access(shared, os.W_OK) and shared.stat().st_uid == os.getuid())
    return FileLock(shared if is_mine else folder / f"posttrain-gpu-{gpu}-{os.getuid()}.lock", blocking=False, mode=0o666)


def gpus() -> list[str]:
    """Those that this process may use, by number."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return listed.stdout.split()
