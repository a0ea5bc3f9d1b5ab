"""Does posttrain work with the lowest and with the newest versions that pyproject.toml allows? A venv of each, and tests in it.

    python scripts/versions.py lowest                  # makes build/lowest and runs TESTS there
    python scripts/versions.py newest tests/losses     # build/newest, other tests

torch stays that of this environment: it is a gigabyte, and which of its versions has which card is a question of its own
(docs/gpu.md). What the bounds do not decide (packages that they need in turn) is taken from here where it fits. Where the
registry cannot be reached, that is said, and nothing is tested. Where the newest versions are those of this environment, its own
tests have tried them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_ALONE = ("torch",)
# the walks call preview, plan, sft, chat, export, merge, dpo, eval, report, run, ppo and generate; the others import a
# dependency, or failed with versions that the bounds leave out now
TESTS = [
    "tests/test_first_hour.py",
    "tests/config/test_compose.py::test_a_mistake_is_one_line_that_names_it",
    "tests/config/test_code.py",
    "tests/commands/checks/test_every.py",
    "tests/commands/docs/test_pages.py",
    "tests/commands/test_push.py",
    "tests/data/chat/test_encoder.py",
    "tests/data/chat/test_sandbox.py",
    "tests/data/sources/test_files.py",
    "tests/data/test_overlaps.py",
    "tests/devices/test_device.py",
    "tests/data/images/test_folder.py",
    "tests/launch/test_sweep_jobs.py",
    "tests/losses/test_diffusion.py",
    "tests/models/gguf/test_gguf.py",
    "tests/models/language/test_foreign_files.py",
    "tests/models/language/test_formats.py",
    "tests/models/language/test_reading.py",
    "tests/models/peft/test_attach.py",
    "tests/models/peft/test_experts.py",
    "tests/models/peft/test_tuners.py",
    "tests/models/test_quantization.py",
    "tests/models/test_quantized_experts.py",
    "tests/runs/test_manifest.py",
    "tests/runs/test_remote.py",
    "tests/runs/test_status.py",
    "tests/test_console.py",
    "tests/training/test_loss_scale.py",
    "tests/training/test_optimizer.py",
    "tests/training/test_optimizers.py",
]
AWAY = ("(from versions: none)", "NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError", "SSLError")
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--retries", "1", "--timeout", "30")


def dependencies() -> dict[str, str]:
    """Name -> its bounds, of what is tried."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [re.match(r"([\w-]+)(?:\[[\w,]+\])?(>=[\w.]+(?:,<[\w.]+)?)$", each) for each in wanted]
    assert all(found), "every dependency has a lower bound"
    return {each[1]: each[2] for each in found if each and each[1] not in LEFT_ALONE}


def lowest() -> list[str]:
    """name==version of every dependency, as its lower bound has it."""
    return [f"{name}=={bounds.partition(',')[0].removeprefix('>=')}" for name, bounds in dependencies().items()]


def newest() -> list[str]:
    """name==version of those of which the registry has a newer one within the bounds than is here."""
    out = _pip(sys.executable, "--dry-run", "--upgrade", "--report", "-", *(n + b for n, b in dependencies().items()))
    found = [each["metadata"] for each in json.loads(out)["install"]]
    return [f"{each['name']}=={each['version']}" for each in found if each["name"].lower() not in LEFT_ALONE]


class Away(Exception):
    """The registry of packages cannot be reached."""


def _pip(python: str | Path, *words: str) -> str:
    """What pip prints. Raises Away, or SystemExit with what pip says."""
    done = subprocess.run([python, *PIP, "--quiet", *words], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in AWAY):
        raise Away
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def installed(which: str, pins: list[str]) -> Path:
    """The Python of a venv that has these, and behind them what this environment has."""
    place = ROOT / "build" / which
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        behind = next(place.glob("lib/*/site-packages")) / "behind.pth"  # of what is found last; .pth files there are not read
        behind.write_text(f"{sysconfig.get_path('purelib')}\n{ROOT / 'src'}\n", encoding="utf-8")
        command = python.with_name("posttrain")
        command.write_text(f"#!{python}\nfrom posttrain.cli import main\n\nmain()\n", encoding="utf-8")
        command.chmod(0o755)
    _pip(python, *pins)
    return python


def main(which: str, tests: list[str]) -> int:
    """The exit code of the tests; 0 where there is nothing to try."""
    try:
        pins = {"lowest": lowest, "newest": newest}[which]()
        if not pins:
            print("the newest versions are those of this environment, whose tests have tried them")
            return 0
        python = installed(which, pins)
    except Away:
        print(f"SKIPPED: the registry of packages cannot be reached; nothing was tried with the {which} versions")
        return 0
    print(f"{which}: {' '.join(pins)}", flush=True)
    options = ["-q", "-p", "no:cacheprovider", "-n", "0", "-m", "not slow"]
    return subprocess.run([python, "-m", "pytest", *options, *(tests or TESTS)], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
