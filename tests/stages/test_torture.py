"""A few rounds of `make torture`: a kill at any moment, within a save too, does not change what a run leaves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.config.compose import compose_run, validate
from posttrain.stages.language.prepare import prepare_language
from posttrain.stages.steps import Context
from torture import COMMON, STAGES

SCRIPT = Path(__file__).parents[2] / "scripts" / "torture.py"


@pytest.mark.slow
def test_runs_that_were_killed_are_bit_identical() -> None:
    words = [sys.executable, str(SCRIPT), "--count", "10", "--seed", "3", "--stages", "sft,ppo"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    kills = re.search(r"seed 3: (\d+) kills, (\d+) of them within a save", found.stdout)
    assert kills and int(kills[1]) >= 10 and int(kills[2]) >= 1
    assert "each ended bit-identical" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "dreambooth"])
def test_what_is_tortured_is_taken_as_input(stage: str, tmp_path: Path) -> None:
    """All words of all stages, up to their rows: the test above runs two of the stages."""
    for number, words in enumerate(STAGES[stage]):
        cfg = validate(compose_run(stage, [*COMMON, *words, f"run.dir={tmp_path / str(number)}"]))
        prepare_language(Context(cfg, tmp_path, 1, True, torch.device("cpu"), lambda: None))
