"""From exceptions to exit codes and one line of text: 0 done, 1 the run failed, 2 wrong input, 75 stopped, resumable."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from posttrain.errors import RunError, Stopped, UserError
from posttrain.secrets import redact


def guarded(command: Callable[[], Any]) -> int:
    """Run `command` and return the exit code; what went wrong is one line on standard error, never a traceback."""
    _quiet_libraries()
    try:
        command()
    except (UserError, RunError, Stopped) as e:
        label = {2: "error", 1: "failed", 75: "stopped"}[e.exit_code]
        _tell(f"{label}: {e}")
        return e.exit_code
    except KeyboardInterrupt:
        _tell("stopped: interrupted before anything was trained")
        return Stopped.exit_code
    except Exception as e:
        if os.environ.get("POSTTRAIN_DEBUG"):
            raise
        first = (str(e).strip().splitlines() or ["no message"])[0]
        _tell(f"failed: {type(e).__name__}: {first} (POSTTRAIN_DEBUG=1 shows the traceback)")
        return RunError.exit_code
    return 0


def _quiet_libraries() -> None:
    """Silence the libraries' own messages, except errors."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU: an optional kernel for inference is missing
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _tell(line: str) -> None:
    if line and os.environ.get("RANK", "0") == "0":
        print(redact(line), file=sys.stderr, flush=True)
