"""What Slurm is asked for, and what is refused before anything is written. sbatch is a stand-in here; test_real_slurm.py has the
real one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.compose import compose_run
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.launchers.slurm import script_of
from posttrain.launch.subprocess_runner import PYTHON
from posttrain.launch.worker import run_config
from posttrain.runs.directory import write_config
from posttrain.runs.identity import digest

SLURM = ("model=tiny", "train.launcher=slurm")
OPTIONS = """#!/bin/bash
#SBATCH --job-name=posttrain-sft-{digest}
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --time=90
#SBATCH --partition=gpu
#SBATCH --gpus-per-node=4
#SBATCH --signal=USR1@120
#SBATCH --output="/runs/my run/job.log"
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --mem=64G
#SBATCH --signal=TERM@60

cd '/home/me/my work' || exit 1
"""


def config(directory: Path, *words: str) -> dict[str, Any]:
    return compose_run("sft", [*SLURM, f"run.dir='{directory}'", *words])


def put_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """An sbatch that keeps what it is called with, and then `does`."""
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/bash\necho "$@" > {folder}/asked\n{does}\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_script() -> None:
    words = ["train.processes=8", "launch.nodes=2", "launch.time=90", "launch.partition=gpu", "launch.gpus_per_node=4"]
    asked = config(Path("/runs/my run"), *words, "launch.sbatch=--mem=64G --signal=TERM@60")
    script = script_of(asked, Path("/home/me/my work"))
    assert script.startswith(OPTIONS.format(digest=digest(asked)[:8]))
    assert "export LOCAL_WORLD_SIZE=4 WORLD_SIZE=8\n" in script
    worker = f"{' '.join(PYTHON)} -m posttrain.launch.worker '/runs/my run/job.yaml'\n"
    assert f"""srun --wait=120 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' run {worker}""" in script


@pytest.mark.parametrize(("code", "state", "again"), [(75, "RUNNING", True), (75, "COMPLETING", False), (1, "RUNNING", False)])
def test_which_end_queues_the_job_again(
    code: int, state: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script itself, with programs of Slurm that say what they are told to."""
    put_sbatch(tmp_path / "bin", monkeypatch, "")
    for name, does in {"srun": f"exit {code}", "squeue": f"echo {state}", "scontrol": f'echo "$@" >> {tmp_path}/told'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    ended = subprocess.run(["bash", "-c", script_of(config(tmp_path / "run"), tmp_path)], env=environment)
    assert ended.returncode == code
    assert ("requeue 7\n" in (tmp_path / "told").read_text()) == again


def test_without_sbatch_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train.launcher: sbatch is not installed on this machine"):
        run_config(config(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_submitted_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_sbatch(tmp_path / "bin", monkeypatch, "echo '7;cluster'")
    place = tmp_path / "run"
    assert run_config(config(place, "launch.account=me"), waits=False) == {}
    assert (tmp_path / "bin" / "asked").read_text() == f"--parsable {place}/job.sh\n"
    script = (place / "job.sh").read_text()
    said = capsys.readouterr().out
    assert "#SBATCH --account=me\n" in script and all(f"  {line}\n" in said for line in script.splitlines())
    assert "job 7: squeue --jobs=7" in said
    # a second start, with other words that are no part of a run: the job has those
    assert run_config(config(place, "run.stop_after=3"), waits=False) == {}
    assert "stop_after: 3" in (place / "job.yaml").read_text() and "--account" not in (place / "job.sh").read_text()


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [(75, Stopped, "stopped by a signal"), (2, UserError, "the message is above"), (1, RunError, r"failed \(exit 1\)")],
)
def test_a_step_of_a_recipe_waits_for_its_job(
    code: int, error: type[BaseException], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sbatch(tmp_path / "bin", monkeypatch, f"echo 7\nexit {code}")
    with pytest.raises(error, match=says):
        run_config(config(tmp_path / "run"))
    assert (tmp_path / "bin" / "asked").read_text().startswith("--parsable --wait ")


def test_a_refusal_is_sbatchs_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "sbatch: error: invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid partition name"
    put_sbatch(tmp_path / "bin", monkeypatch, f"echo '{why}' >&2\nexit 1")
    with pytest.raises(UserError, match="launch: sbatch refuses the job: Batch job submission failed: Invalid partition name"):
        run_config(config(tmp_path / "run"), waits=False)


def test_a_finished_run_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_sbatch(tmp_path / "bin", monkeypatch, "echo 7")
    from posttrain.launch.launchers import opened as module
    from posttrain.runs.directory import Run

    asked = config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    write_config(Run(tmp_path / "run", asked))
    monkeypatch.setattr(Run, "finished", property(lambda run: True))
    monkeypatch.setattr(module, "read_manifest", lambda directory: type("M", (), {"to_dict": lambda self: {"stage": "sft"}})())
    assert run_config(asked, waits=False) == {"stage": "sft"}
    assert not (tmp_path / "bin" / "asked").exists() and "finished already" in capsys.readouterr().out
