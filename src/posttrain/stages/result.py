"""6. The files of a result: adapter/ or model/, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from posttrain.errors import RunError


def write_result(directory: Path, kind: str, accelerator: Accelerator, write: Callable[[Path, bool], None]) -> Path:
    """Have `write(folder, is_writer)` fill a folder beside, which then takes the place of `directory`/`kind`.

    Every process must call it, for weights may have to be gathered; one of them writes. Raises RunError when the disk refuses.
    """
    final, temporary, main = directory / kind, directory / f".{kind}.tmp", accelerator.is_main_process
    try:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        write(temporary, main)
        if main:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    except OSError as e:
        raise RunError(f"{final} could not be written: {e}; the last checkpoint is kept, the same command goes on") from None
    accelerator.wait_for_everyone()
    return final
