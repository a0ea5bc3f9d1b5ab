"""Every test run has a cache of its own and never asks the hub."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("POSTTRAIN_CACHE", str(Path(tempfile.gettempdir()) / f"posttrain-tests-{os.getuid()}"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what a test starts need not compile the package again
