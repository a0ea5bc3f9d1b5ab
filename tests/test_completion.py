"""Completion in a real bash, as fingers meet it: after `=` too, and without a space after `key=`."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")]


class Bash:
    """An interactive shell on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb", "HOME": str(folder)}
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)

    def type(self, keys: str, expected: str) -> bool:
        """Whether `expected` is on the screen within some seconds of typing `keys`."""
        os.write(self.terminal, keys.encode())
        seen, end = "", time.monotonic() + 20
        while expected not in seen and time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.1)[0]:
                seen += os.read(self.terminal, 65536).decode(errors="replace")
        return expected in seen

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = [str(BIN / "posttrain"), "--show-completion", "bash"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "SHELL": "/bin/bash"})
    path = tmp_path_factory.mktemp("completion") / "script.sh"
    path.write_text(shown.stdout)
    (path.parent / "my_rows.jsonl").touch()
    return path


# X is typed after the tab: it shows where the cursor went
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("sf", "sft X"),
        ("sft +peft=ql", "sft +peft=qlora X"),
        ("sft peft=ql", "sft peft=qlora X"),
        ("sft optim.sch", "sft optim.schedule=X"),
        ("dpo dpo.be", "dpo dpo.beta=X"),
        ("run py", "run python_expert X"),
        ("sft data.path=my", "sft data.path=my_rows.jsonl X"),
    ],
)
def test_what_a_tab_adds(script: Path, keys: str, line: str) -> None:
    shell = Bash(script.parent)
    try:
        assert shell.type(f"source {script}; echo rea''dy\n", "ready")
        assert shell.type(f"posttrain {keys}\tX", f"posttrain {line}")
    finally:
        shell.close()
