"""With the newest libraries nothing of ours is called as they will not have it much longer: every warning of small runs."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import posttrain
from posttrain.commands.merge import merge_run

pytestmark = pytest.mark.slow
SMALL = (
    "model=tiny",
    "train.max_steps=1",
    "train.batch_size=2",
    "train.grad_accum=1",
    "data.max_rows=12",
    "data.eval_rows=2",
    "eval.rows=2",
)


class Heard(logging.Handler):
    """What libraries log as a warning: transformers says so of much that is to go."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard()
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "accelerate", "peft", "datasets")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)


def test_no_run_uses_what_is_to_go(tmp_path: Path, heard: Heard) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", DeprecationWarning)
        warnings.simplefilter("always", FutureWarning)
        posttrain.run(
            "sft", *SMALL, "+peft=qlora", "eval.generate.prompts=2", "eval.generate.max_new_tokens=4", f"run.dir={tmp_path}/sft"
        )
        words = ["ppo.advantage=grpo", "ppo.samples=2", "rollout.max_new_tokens=4", "reward.function=length"]
        posttrain.run("ppo", *SMALL, "+peft=lora", f"init={tmp_path}/sft", *words, f"run.dir={tmp_path}/ppo")
        posttrain.run("dpo", *SMALL, f"run.dir={tmp_path}/dpo")
        merge_run(tmp_path / "sft", tmp_path / "merged", 1.0)
    said = {f"{each.category.__name__}: {each.message}"[:300] for each in found}
    said -= {each for each in said if "is_gradient_checkpointing" in each}  # peft's own, which a run keeps to itself
    said |= {line for line in heard.lines if "deprecat" in line.lower() or "will be removed" in line.lower()}
    assert said == set()
