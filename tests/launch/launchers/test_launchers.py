"""Which keys go with which launcher, and that none of them is a part of the run."""

import importlib.util
import socket
from pathlib import Path

import pytest

from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.launch.launchers.ray_cluster import _knock
from posttrain.launch.worker import run_config
from posttrain.runs.identity import digest, identity_of


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.launcher=slrum"], "train.launcher: input should be 'local', 'torchrun', 'slurm' or 'ray'"),
        (["launch.nodes=2"], "launch.nodes: train.launcher=local does not read it; leave it out, or use one of torchrun, slurm"),
        (["launch.node_rank=0"], "launch.node_rank: train.launcher=local does not read it"),
        (["train.launcher=ray", "launch.partition=gpu"], "launch.partition: train.launcher=ray does not read it"),
        (["train.launcher=slurm", "launch.restarts=1"], "launch.restarts: train.launcher=slurm does not read it"),
        (["train.launcher=slurm", "launch.nodes=2"], "train.processes: 1 are not the same number on each of launch.nodes=2"),
        (
            ["train.launcher=torchrun", "launch.nodes=2", "train.processes=2", "launch.node_rank=1"],
            "launch.master: of several machines each is told; say launch.master=HOST:PORT",
        ),
        (
            ["train.launcher=torchrun", "launch.nodes=2", "train.processes=2", "launch.master=a:1"],
            "launch.node_rank: of several machines each is told; say launch.node_rank=0 on the first",
        ),
        (
            ["train.launcher=torchrun", "launch.nodes=2", "train.processes=2", "launch.master=a:1", "launch.node_rank=2"],
            "launch.node_rank: 2 is none of launch.nodes=2, which count from 0",
        ),
        (["train.launcher=slurm", "launch.sbatch=mem=4G"], "launch.sbatch: string should match pattern"),
        (["train.launcher=slurm", 'launch.partition="a\\nb"'], "launch.partition: string should match pattern"),
    ],
)
def test_what_does_not_go_together(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as told:
        compose_run("sft", ["model=tiny", *words])
    assert str(told.value).startswith(says)


def test_where_a_run_is_started_is_no_part_of_it() -> None:
    here = compose_run("sft", ["model=tiny", "train.processes=2"])
    there = compose_run("sft", ["model=tiny", "train.processes=2", "train.launcher=slurm", "launch.nodes=2", "launch.time=60"])
    assert here["launch"] != there["launch"]
    assert digest(here) == digest(there) and identity_of(here) == identity_of(there)
    assert "train.processes" in identity_of(here) and "train.launcher" not in identity_of(here)


def test_options_of_sbatch_are_the_users_own_words(tmp_path: Path) -> None:
    """A file that somebody else has written may not say where a job's output goes."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\ntrain:\n  launcher: slurm\nlaunch:\n  partition: gpu\n  sbatch: --output=/home/me/.profile\n"
    )
    words = ["model=tiny", "experiment=theirs"]
    with pytest.raises(UserError, match=r"launch.sbatch: .* has code run, which only you can ask for"):
        compose_run("sft", words, tmp_path)
    assert compose_run("sft", [*words, "launch.sbatch=null"], tmp_path)["launch"]["partition"] == "gpu"


def test_without_ray_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "posttrain.launch.launchers.ray_cluster.find_spec", lambda name: None if name.startswith("ray") else real(name)
    )
    asked = compose_run("sft", ["model=tiny", "train.launcher=ray", f"run.dir={tmp_path}/run"])
    with pytest.raises(UserError, match=r"train.launcher: ray is not installed; pip install 'posttrain\[ray\]'"):
        run_config(asked)
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nobody_listens_is_known_at_once() -> None:
    """Ray itself would try it again for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(OSError, match="refused"):
            _knock(f"127.0.0.1:{port}")
        free.listen()
        _knock(f"ray://127.0.0.1:{port}")
    _knock("auto")
