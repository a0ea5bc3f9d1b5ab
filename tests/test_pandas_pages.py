"""The Python of docs/metrics.md and docs/sweeps.md, on files that look as a run and a sweep leave them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DOCS.exists(), reason="runs from a checkout only")]


def run(page: str) -> dict[str, Any]:
    """The names that the page's Python leaves, with the value of each line that stands alone under `shown`."""
    names: dict[str, Any] = {"shown": []}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for statement in re.split(r"\n(?=\S)", block.strip()):
            try:
                names["shown"].append(eval(statement.partition("  #")[0], names))
            except SyntaxError:
                exec(statement, names)
    return names


def test_metrics_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "eval/loss": 3.0},
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": 4.0},
        {"step": 2, "eval/loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manifest.json").write_text(json.dumps({"metrics": {"eval/loss": 1.0, "eval/loss_before": 3.0}}))
    smoothed, held_out, both = run("metrics.md")["shown"]
    assert smoothed.to_dict() == {1: 2.0, 2: 3.0} and held_out.to_dict() == {0: 3.0, 2: 1.0} and both == (1.0, 3.0)
    assert run("metrics.md")["table"].loc["mine", "eval/loss"] == 1.0


def test_rows_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "ranks").mkdir(parents=True)
    rows = [
        {"overrides": {"peft.r": r, "peft.alpha": "16"}, "dir": r, "status": "done", "metrics": {"eval/loss": loss}}
        for r, loss in (("4", 2.0), ("8", 1.0))
    ]
    (tmp_path / "runs" / "ranks" / "sweep.json").write_text(json.dumps(rows))
    assert list(run("sweeps.md")["shown"][-1]["overrides.peft.r"]) == ["8", "4"]
