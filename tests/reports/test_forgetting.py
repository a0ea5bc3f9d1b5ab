"""Alpha* by hand, and forgetting by step and domain."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.reports.forgetting import choices, describe, forgetting_matrix
from posttrain.reports.run_records import ChainRow
from posttrain.reports.sweep_page import alpha_star, sweep_page


def metrics(domain: float, general: float) -> dict[str, float]:
    return {"eval/loss": domain, "eval/loss_before": 3.0, "general/loss": general, "general/loss_before": 2.0}


JOBS = [("0.3", metrics(2.5, 2.0)), ("0.6", metrics(2.2, 2.1)), ("1.0", metrics(2.0, 2.6))]


def test_alpha_star_weighs_gain_against_forgetting() -> None:
    found = choices([(alpha, found, 1.0) for alpha, found in JOBS])
    assert [(c.alpha, round(c.score, 6)) for c in found] == [(0.6, 2.3), (0.3, 2.5), (1.0, 2.6)]
    assert found[0].gain == pytest.approx(0.8) and found[0].forgotten == pytest.approx(0.1)
    assert "alpha* = 0.6" in describe(found)
    assert choices([(alpha, found, 0.1) for alpha, found in JOBS])[0].alpha == 1.0  # who minds little takes all of the domain
    assert choices([(alpha, found, 10.0) for alpha, found in JOBS])[0].alpha == 0.3
    assert choices([("auto", JOBS[0][1], 1.0), ("0.5", {"eval/loss": 1.0}, 1.0)]) == [] and describe([]) == ""


def test_a_sweep_over_alpha_ends_with_its_choice(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"overrides": {"data.alpha": alpha}, "status": "done", "dir": str(i), "metrics": found}
        for i, (alpha, found) in enumerate(JOBS)
    ]
    path = tmp_path / "report.html"
    assert alpha_star(json.loads(json.dumps(rows)), path).startswith("alpha* = 0.6")
    page = sweep_page(rows, path).read_text()
    assert "Domain gain against forgetting" in page and "alpha 0.6 ★" in page and "alpha* = 0.6" in page
    other = [{**row, "overrides": {"optim.lr": str(i)}} for i, row in enumerate(rows)]
    assert alpha_star(other, path) == "" and "What to mix" not in sweep_page(other, path).read_text()


def test_matrix_is_since_the_start_of_the_chain() -> None:
    rows = [
        ChainRow("base", {"general/loss": 2.0, "chat/loss": 4.0, "chat/perplexity": 9.0, "eval/loss": 1.0}),
        ChainRow("after cpt", {"general/loss": 2.2, "chat/loss": 5.0}, {}),
        ChainRow("after sft", {"general/loss": 2.1}, {}),
    ]
    domains, matrix = forgetting_matrix(rows)
    assert domains == ["general", "chat"]
    assert matrix == [("after cpt", [pytest.approx(10.0), pytest.approx(25.0)]), ("after sft", [pytest.approx(5.0), None])]
