"""Two processes that were stopped, asked to stop or killed go on to the same bits as two that were not."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from posttrain.config.compose import compose_run
from posttrain.runs.files import sha256
from posttrain.training.checkpoint import FILES, RECORD, _sha256_of
from ranks import Kill, Nursery

pytestmark = pytest.mark.slow
COMMON = ("model=tiny", "train.max_steps=4", "train.batch_size=1", "train.save_steps=2", "train.log_steps=3")
TEXT = ("data.max_rows=20", "data.eval_rows=2", "eval.sets=null", "train.max_length=256", "+peft=lora", "peft.dropout=0.1")
PICTURES = ("+peft=lora", "data.instance_prompt=a sks dog", "sample.images=0", "eval.images=1", "eval.levels=2", "prior.weight=0")
LAST = Path("checkpoints") / "step-000004"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def config(stage: str, home: Path, *words: str) -> dict[str, Any]:
    if stage != "dreambooth":
        return compose_run(stage, [*COMMON, *TEXT, *words])
    (home / "photographs").mkdir(exist_ok=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "photographs" / f"{i}.png")
    return compose_run(stage, [*COMMON, *PICTURES, f"data.instance_dir={home}/photographs", *words])


def stopping(config: dict[str, Any], after: int) -> dict[str, Any]:
    return config | {"run": config["run"] | {"stop_after": after}}


def left(run: Path, steps: int = 4) -> dict[str, Any]:
    """All that may not depend on a stop: result, last checkpoint, figures."""
    last = run / "checkpoints" / f"step-{steps:06d}"
    files = [*sorted((run / "adapter").glob("*.safetensors")), *sorted(last.glob("*.safetensors"))]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]
    return {p.name: sha256(p) for p in files} | {"figures": figures}


@pytest.mark.parametrize(
    ("stage", "words"),
    [("cpt", []), ("sft", []), ("sft", ["train.fsdp=true"]), ("rm", []), ("dpo", []), ("dreambooth", [])],
    ids=["cpt", "sft", "sft-sharded", "rm", "dpo", "dreambooth"],
)
def test_stopped_and_started_again(nursery: Nursery, stage: str, words: list[str], tmp_path: Path) -> None:
    asked, straight, stopped = config(stage, tmp_path, *words), tmp_path / "straight", tmp_path / "stopped"
    assert nursery.run(asked, straight, 2).codes == [0, 0]
    assert nursery.run(stopping(asked, 1), stopped, 2).codes == [75, 75]
    ended = nursery.run(asked, stopped, 2)
    assert ended.codes == [0, 0], ended.said
    assert "going on from step 1" in ended.said[0]
    assert left(stopped) == left(straight)


def test_killed_and_asked_to_stop(nursery: Nursery, tmp_path: Path) -> None:
    """One of two processes is killed; of the next start both are asked to stop, as a launcher does."""
    asked = config("sft", tmp_path, "train.max_steps=30", "train.save_steps=3")
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    assert nursery.run(asked, straight, 2).codes == [0, 0]
    killed = nursery.run(asked, hurt, 2, Kill(1, signal.SIGKILL, "checkpoints/step-000003"))
    assert killed.codes == [1, -signal.SIGKILL] and "another process of the run has ended" in killed.said[0]
    stopped = nursery.run(asked, hurt, 2, Kill(None, signal.SIGTERM, "checkpoints/step-000012"))
    assert stopped.codes == [75, 75] and "stopped by a signal after step" in stopped.said[0] and stopped.said[1] == ""
    ended = nursery.run(asked, hurt, 2)
    assert ended.codes == [0, 0], ended.said
    assert "going on from step" in ended.said[0]
    assert left(hurt, 30) == left(straight, 30)


def test_another_number_of_processes(nursery: Nursery, tmp_path: Path) -> None:
    """With the same micro-batches, which have the same dropout whoever computes them."""
    two, one = config("sft", tmp_path, "train.grad_accum=1"), config("sft", tmp_path, "train.grad_accum=2")
    assert nursery.run(one, tmp_path / "one").codes == [0]
    assert nursery.run(stopping(two, 2), tmp_path / "run", 2).codes == [75, 75]
    refused = nursery.run(one, tmp_path / "run")
    assert refused.codes == [2] and "train.processes was 2, is now 1" in refused.said[0]
    allowed = one | {"resume": {"allow": ["train.processes", "train.grad_accum"]}}
    ended = nursery.run(allowed, tmp_path / "run")
    assert ended.codes == [0], ended.said
    assert "from step 2 train.processes was 2, is now 1" in ended.said[0]
    mine, its = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "one"))
    assert max(float((mine[name] - its[name]).abs().max()) for name in its) < 1e-6
    drawn = [json.loads((tmp_path / name / LAST / "checkpoint.json").read_text())["state"]["drawn"] for name in ("run", "one")]
    assert drawn[0] == drawn[1]


def test_a_checkpoint_that_names_the_wrapper(nursery: Nursery, tmp_path: Path) -> None:
    """As version 0.2 wrote those of several processes."""
    asked = config("sft", tmp_path)
    assert nursery.run(asked, tmp_path / "straight", 2).codes == [0, 0]
    assert nursery.run(stopping(asked, 2), tmp_path / "run", 2).codes == [75, 75]
    earlier_names(tmp_path / "run" / "checkpoints" / "step-000002")
    ended = nursery.run(asked, tmp_path / "run", 2)
    assert ended.codes == [0, 0], ended.said
    assert left(tmp_path / "run") == left(tmp_path / "straight")


def earlier_names(checkpoint: Path) -> None:
    """Rewrite a checkpoint with the names of DistributedDataParallel's parameters."""
    record = json.loads((checkpoint / RECORD).read_text())
    del record["sha256"]
    for name in FILES[:2]:
        file = checkpoint / name
        save_file({f"module.{key}": value for key, value in load_file(file).items()}, file)
        record["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    text = json.dumps(record, indent=2, sort_keys=True)
    (checkpoint / RECORD).write_text(json.dumps({"sha256": _sha256_of(text), **record}, indent=2))
