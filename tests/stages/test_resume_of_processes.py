"""Two processes that were stopped, asked to stop or killed go on to the same bits as two that were not."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from posttrain.runs.files import sha256
from posttrain.runs.remote import LISTING
from posttrain.training.checkpoint import FILES, RECORD, _sha256_of
from ranks import Kill, Nursery
from resume_matrix import STAGES, config, left, stopping, tried

pytestmark = pytest.mark.slow
LAST = Path("checkpoints") / "step-000004"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        *((stage, STAGES[stage]) for stage in ("cpt", "sft", "rm", "dpo", "dreambooth")),
        ("sft", (*STAGES["sft"], "train.fsdp=true")),
        ("sft", ("+peft=adalora",)),
    ],
    ids=["cpt", "sft", "rm", "dpo", "dreambooth", "sft-sharded", "sft-adalora"],
)
def test_stopped_and_started_again(nursery: Nursery, stage: str, words: tuple[str, ...], tmp_path: Path) -> None:
    assert tried(nursery, config(stage, tmp_path, *words), tmp_path, 2, "stop") == "same"


def test_four_processes_one_of_them_killed(nursery: Nursery, tmp_path: Path) -> None:
    asked = config("sft", tmp_path, *STAGES["sft"], "train.fsdp=true")
    assert tried(nursery, asked, tmp_path, 4, "kill") == "same"


def test_killed_and_asked_to_stop(nursery: Nursery, tmp_path: Path) -> None:
    """One of two processes is killed; of the next start both are asked to stop, as a launcher does."""
    asked = config("sft", tmp_path, *STAGES["sft"], "train.max_steps=30", "train.save_steps=3")
    straight, hurt = tmp_path / "straight", tmp_path / "hurt"
    assert nursery.run(asked, straight, 2).codes == [0, 0]
    killed = nursery.run(asked, hurt, 2, Kill(1, signal.SIGKILL, "checkpoints/step-000003"))
    assert (
        killed.codes == [1, -signal.SIGKILL] and "another process of the run has ended or cannot be reached ([" in killed.said[0]
    )
    stopped = nursery.run(asked, hurt, 2, Kill(None, signal.SIGTERM, "checkpoints/step-000012"))
    assert stopped.codes == [75, 75] and "stopped by a signal after step" in stopped.said[0] and stopped.said[1] == ""
    ended = nursery.run(asked, hurt, 2)
    assert ended.codes == [0, 0], ended.said
    assert "going on from step" in ended.said[0]
    assert left(hurt, 30) == left(straight, 30)


def test_another_number_of_processes(nursery: Nursery, tmp_path: Path) -> None:
    """With the same micro-batches, which have the same dropout whoever computes them."""
    two, one = (
        config("sft", tmp_path, *STAGES["sft"], "train.grad_accum=1"),
        config("sft", tmp_path, *STAGES["sft"], "train.grad_accum=2"),
    )
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
    asked = config("sft", tmp_path, *STAGES["sft"])
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


def test_two_processes_go_on_from_a_mirror_where_their_directory_is_lost(nursery: Nursery, tmp_path: Path) -> None:
    """One of them writes it and fetches from it, the other waits: on a machine that has nothing, to the same bits."""
    plain = config("sft", tmp_path, *STAGES["sft"])
    asked = config("sft", tmp_path, *STAGES["sft"], f"run.mirror=file://{tmp_path}/mirror")
    assert nursery.run(plain, tmp_path / "straight", 2).codes == [0, 0]
    assert nursery.run(stopping(asked, 2), tmp_path / "lost", 2).codes == [75, 75]
    shutil.rmtree(tmp_path / "lost")
    ended = nursery.run(asked, tmp_path / "found", 2)
    assert ended.codes == [0, 0], ended.said
    assert ended.said[0].count("the checkpoint of step 2 was fetched from file://") == 1 and "fetched" not in ended.said[1]
    assert "going on from step 2 of 4" in ended.said[0]
    assert left(tmp_path / "found", 4) == left(tmp_path / "straight", 4)
    listing = json.loads((tmp_path / "mirror" / LISTING).read_text())
    assert listing["whole"] and listing["files"]["manifest.json"]["sha256"] == sha256(tmp_path / "found" / "manifest.json")
