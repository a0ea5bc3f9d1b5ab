"""From exceptions to exit codes and one line of text: 0 done, 1 the run failed, 2 wrong input, 75 stopped, resumable."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from posttrain.errors import RunError, Stopped, UserError, is_out_of_memory
from posttrain.launch.failures import said_by_disk
from posttrain.secrets import redact


def guarded(command: Callable[[], Any]) -> int:
    """Run `command` and return the exit code; what went wrong is one line on standard error, never a traceback."""
    _quiet_libraries()
    _search_less_for_garbage()
    try:
        command()
    except (UserError, RunError, Stopped) as e:
        label = {2: "error", 1: "failed", 75: "stopped"}[e.exit_code]
        _tell(f"{label}: {e}", e.told_by)
        return e.exit_code
    except KeyboardInterrupt:
        _tell("stopped: interrupted before anything was trained", told_by=0)
        return Stopped.exit_code
    except Exception as e:
        if os.environ.get("POSTTRAIN_DEBUG"):
            raise
        if is_out_of_memory(e):
            _tell("failed: out of memory; end other programs, raise the limits (ulimit -v), or take a smaller model or batch")
            return RunError.exit_code
        if said := said_by_disk(e):
            where = getattr(e, "filename2", None) or getattr(e, "filename", None)
            _tell(f"failed: {f'{where}: ' if where else ''}{said}")
            return RunError.exit_code
        first = (str(e).strip().splitlines() or ["no message"])[0]
        _tell(f"failed: {type(e).__name__}: {first} (POSTTRAIN_DEBUG=1 shows the traceback)")
        return RunError.exit_code
    return 0


def _search_less_for_garbage() -> None:
    """Python looks for cycles after every 700 new objects: a third of the time that importing torch and its like takes. And its
    last act is to search all objects once more: two seconds after all is said and written."""
    gc.set_threshold(50_000, 10, 10)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def _quiet_libraries() -> None:
    """Silence the libraries' own messages, except errors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU: an optional kernel for inference is missing
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _tell(line: str, told_by: int | None = None) -> None:
    """Of several processes each with its number, unless it is known which one tells of it (posttrain/errors.py)."""
    from posttrain.console import printable

    rank = int(os.environ.get("RANK", "0"))
    # before they have met they read the same command, each machine its own files
    speaks = rank == told_by if told_by is not None else _have_met() or os.environ.get("LOCAL_RANK", "0") == "0"
    if line and speaks:
        with suppress(OSError):  # nobody may be there to read it
            print(printable(redact(f"rank {rank}: {line}" if rank else line)), file=sys.stderr, flush=True)


def _have_met() -> bool:
    """Are the processes of the run connected? Nobody imports torch to know."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_initialized())
