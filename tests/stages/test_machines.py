"""Two machines that share no file: each has its own cache and its own place for runs, and rank 0's directory is the run's."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from posttrain.config.compose import compose_run
from posttrain.models.builtin import builtin_directory
from ranks import Nursery, Ranks

pytestmark = pytest.mark.slow
COMMON = ("model=tiny", "train.max_steps=4", "+peft=lora", "eval.rows=1", "data.eval_rows=2", "train.max_length=128")
ROWS = ("data.max_rows=12",)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def machines(home: Path) -> list[dict[str, Any]]:
    """Rank 1 is the first process of another machine. A model that is made on the spot is made once a machine."""
    found = []
    for rank in range(2):
        cache = home / f"cache-{rank}"
        shutil.copytree(builtin_directory("tiny")[0], cache / "models" / "tiny-v1", dirs_exist_ok=True)
        found.append(
            {
                "dir": str(home / f"machine-{rank}" / "run"),
                "env": {"POSTTRAIN_CACHE": str(cache), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            }
        )
    return found


def run(nursery: Nursery, home: Path, asked: dict[str, Any], stop_after: int | None = None) -> Ranks:
    asked = {**asked, "run": {**asked["run"], "stop_after": stop_after}}
    return nursery.run(asked, home, 2, places=machines(home))


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same(one: Path, two: Path) -> None:
    mine, its = weights(one), weights(two)
    assert mine.keys() == its.keys() and max(float((mine[name] - its[name]).abs().max()) for name in mine) < 1e-6


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("cpt", ["data.alpha=0.6", "data.replay.tokens=200", "data.replay.max_new_tokens=16"]),
        ("dpo", ["train.max_length=256"]),
    ],
    ids=["cpt with replay", "dpo"],
)
def test_without_a_shared_file_system(nursery: Nursery, stage: str, words: list[str], tmp_path: Path) -> None:
    """Stopped in between, so that rank 1 has to be told of the checkpoint as well."""
    asked = [*COMMON, *ROWS, *words]
    assert nursery.run(compose_run(stage, [*asked, "train.batch_size=2"]), tmp_path / "one").codes == [0]
    two = compose_run(stage, [*asked, "train.batch_size=1"])
    assert run(nursery, tmp_path, two, stop_after=2).codes == [75, 75]
    ended = run(nursery, tmp_path, two)
    assert ended.codes == [0, 0], ended.said
    assert "going on from step 2" in ended.said[0] and ended.said[1] == ""
    assert not (tmp_path / "machine-1" / "run").exists(), "rank 0 alone touches the run's directory"
    assert_same(tmp_path / "one", tmp_path / "machine-0" / "run")
    again = run(nursery, tmp_path, two)
    assert again.codes == [0, 0] and "finished already" in again.said[0]


def test_machines_with_other_rows_are_found_out(nursery: Nursery, tmp_path: Path) -> None:
    """The second machine's file is not the first's: both would go on, each with its own."""
    places = machines(tmp_path)
    for rank, place in enumerate(places):
        rows = [{"prompt": f"{k}", "completion": f"{k + rank}"} for k in range(9)]
        Path(place["dir"]).parent.mkdir(parents=True)
        (Path(place["dir"]).parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        place["env"]["RANKS_FOLDER"] = str(Path(place["dir"]).parent)
    asked = compose_run("sft", [*COMMON, "data.path=rows.jsonl", "train.batch_size=1"])
    found = nursery.run(asked, tmp_path, 2, places=places)
    assert found.codes == [2, 2]
    assert "data.content is sha256:" in found.said[0] and "give every machine the same files" in found.said[0]
    assert found.said[1] == ""


def test_what_is_missing_on_one_machine_is_told_with_its_number(nursery: Nursery, tmp_path: Path) -> None:
    places = machines(tmp_path)
    for place in places:
        Path(place["dir"]).parent.mkdir(parents=True)
        place["env"]["RANKS_FOLDER"] = str(Path(place["dir"]).parent)
    rows = [{"prompt": f"{k}", "completion": "yes"} for k in range(9)]
    (tmp_path / "machine-0" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = nursery.run(compose_run("sft", [*COMMON, "data.path=rows.jsonl"]), tmp_path, 2, places=places)
    assert found.codes == [2, 2]
    assert "rank 1: error: rows.jsonl: no such file" in found.said[1] and "error" not in found.said[0]


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    """The command of docs/scale.md, once a machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank, place in enumerate(machines(tmp_path)):
        launch = f"--nnodes 2 --nproc-per-node 1 --node-rank {rank} --master-addr localhost --master-port {port}"
        words = ["sft", *COMMON, *ROWS, "train.batch_size=1", f"run.dir={place['dir']}"]
        command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), "-m", "posttrain", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "POSTTRAIN_CACHE": place["env"]["POSTTRAIN_CACHE"]}
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    said = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert json.loads((tmp_path / "machine-0" / "run" / "manifest.json").read_text())["processes"] == 2
    assert not (tmp_path / "machine-1").exists()


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: two machines, to the network."""
    names = [f"posttrain-{os.getpid()}-{i}" for i in range(2)]
    made = [f"ip netns add {name}" for name in names]
    made.append(f"ip link add wire netns {names[0]} type veth peer name wire netns {names[1]}")
    for i, name in enumerate(names):
        made += [f"ip -n {name} addr add 10.213.7.{i + 1}/24 dev wire", f"ip -n {name} link set wire up"]
        made += [f"ip -n {name} link set lo up"]
    try:
        if not shutil.which("ip"):
            pytest.skip("there is no ip command (iproute2)")
        for line in made:
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_machines_of_a_network(nursery: Nursery, namespaces: list[str], tmp_path: Path) -> None:
    """train.launcher=torchrun on each, as docs/scale.md has it: other addresses, caches and directories; one result."""
    asked = [*COMMON, *ROWS]
    assert nursery.run(compose_run("sft", [*asked, "train.batch_size=2"]), tmp_path / "one").codes == [0]
    children = []
    for rank, (place, name) in enumerate(zip(machines(tmp_path), namespaces, strict=True)):
        launch = [f"launch.node_rank={rank}", "launch.nodes=2", "launch.master=10.213.7.1:29500", "train.launcher=torchrun"]
        words = ["sft", *asked, *launch, "train.processes=2", "train.batch_size=1", f"run.dir={place['dir']}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
        environment["POSTTRAIN_CACHE"] = place["env"]["POSTTRAIN_CACHE"]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "posttrain", *words]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment))
    said = [child.communicate(timeout=200) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    assert "machine 1 of 2, 1 processes; waits for the others at 10.213.7.1:29500" in said[1][0]
    assert not (tmp_path / "machine-1").exists()
    assert_same(tmp_path / "one", tmp_path / "machine-0" / "run")
