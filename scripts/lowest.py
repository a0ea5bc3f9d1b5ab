"""Does posttrain work with the lowest versions that pyproject.toml allows? A venv of its own with those, and small runs in it.

    python scripts/lowest.py                   # makes build/lowest and runs TESTS there; torch is the one of this environment
    python scripts/lowest.py tests/losses      # other tests

torch itself is not lowered: it is a gigabyte, and which of its versions has which card is a question of its own (docs/gpu.md).
What the lowest versions do not decide (packages that they need in turn) is taken from this environment where it fits.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "lowest"
NOT_LOWERED = ("torch",)
# the walks call preview, plan, sft, chat, export, merge, dpo, eval, report, run, ppo and generate
TESTS = [
    "tests/test_first_hour.py",
    "tests/config/test_compose.py",
    "tests/models/test_quantization.py",
    "tests/data/test_overlaps.py",
]


def lowest() -> list[str]:
    """name==version of every dependency, as its lower bound has it."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [re.match(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", each) for each in wanted]
    assert all(found), "every dependency has a lower bound"
    return [f"{each[1]}=={each[2]}" for each in found if each and each[1] not in NOT_LOWERED]


def main(tests: list[str]) -> int:
    """The exit code of the tests."""
    python = PLACE / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PLACE)], check=True)
        behind = next(PLACE.glob("lib/*/site-packages")) / "behind.pth"  # of what is found last
        behind.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lowest()], check=True)
    environment = ["-p", "no:cacheprovider", "-n", "0"]
    return subprocess.run([python, "-m", "pytest", "-q", *environment, *(tests or TESTS)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
