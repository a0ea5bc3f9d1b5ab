"""A real Slurm of two machines, which are two of its daemons on this one: submitted, preempted, queued again, the same bits.

It is there where its daemons are (Debian's slurmctld and slurmd) and root may start them; LD_LIBRARY_PATH may name their plugins.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.config.compose import compose_run
from ranks import Nursery, result

pytestmark = pytest.mark.slow
DAEMONS = {name: shutil.which(name) or shutil.which(f"{name}-wlm") for name in ("slurmctld", "slurmd", "slurmstepd")}
WORDS = (
    *("model=tiny", "train.max_steps=200", "train.batch_size=1", "train.save_steps=20", "+peft=lora", "peft.dropout=0.1"),
    *("data.max_rows=20", "data.eval_rows=2", "eval.sets=null", "train.max_length=128", "train.processes=2"),
)
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
{plugins}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=zz NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes={host},zz Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes={host},zz PriorityTier=10 PreemptMode=OFF State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def plugins() -> str:
    """Where they are, if Slurm is not where it was built for."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    found = [folder for folder in folders if folder and (Path(folder) / "auth_none.so").exists()]
    return f"PluginDir={found[0]}" if found else ""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if missing := [name for name, path in DAEMONS.items() if not path]:
        pytest.skip(f"no real Slurm here: {missing[0]} is not installed")
    if os.getuid():
        pytest.skip("Slurm's daemons are started by root")
    place, host = tmp_path / "slurm", socket.gethostname()
    for name in ("state", f"spool-{host}", "spool-zz"):
        (place / name).mkdir(parents=True)
    (place / "slurm.conf").write_text(CONF.format(host=host, place=place, ports=free_ports(3), plugins=plugins()))
    monkeypatch.setenv("SLURM_CONF", str(place / "slurm.conf"))
    daemons = [subprocess.Popen([str(DAEMONS["slurmctld"]), "-D"], stderr=subprocess.DEVNULL)]
    for node in (host, "zz"):
        command = [str(DAEMONS["slurmd"]), "-D", "-N", node, "-d", str(DAEMONS["slurmstepd"])]
        daemons.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    try:
        until(lambda: "2" in asked("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").split(), 60, "two idle machines")
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=30)


def asked(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def until(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def state(job: str) -> str:
    return asked("squeue", "-h", "-j", job, "-o", "%T").strip()


def test_preempted_queued_again_and_the_same(slurm: None, tmp_path: Path) -> None:
    """Another job takes the machines (TERM), then Slurm's own warning before the end of the time (USR1)."""
    with Nursery() as nursery:
        assert nursery.run(compose_run("sft", list(WORDS)), tmp_path / "straight", 2).codes == [0, 0]
    run = tmp_path / "run"
    launch = ["train.launcher=slurm", "launch.nodes=2", "launch.partition=low", f"run.dir={run}"]
    submitted = subprocess.run([sys.executable, "-m", "posttrain", "sft", *WORDS, *launch], capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    assert f'--output="{run}/job.log"' in submitted.stdout
    job = submitted.stdout.rpartition("job ")[2].split(":")[0]
    log = run / "job.log"
    until((run / "checkpoints" / "step-000020").exists, 120, "a checkpoint")
    asked("sbatch", "-p", "high", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: "stopped by a signal after step" in log.read_text(), 60, "a stop")
    until(lambda: state(job) == "PENDING", 60, "a place in the queue")
    steps = len(list((run / "checkpoints").glob("step-*")))
    asked("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm would let it wait for two minutes
    until(lambda: "going on from step" in log.read_text(), 180, "the second start")
    time.sleep(1)
    asked("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does
    until(lambda: log.read_text().count("stopped by a signal after step") == 2 or not state(job), 60, "a second stop")
    until(lambda: state(job) in ("PENDING", ""), 60, "a place in the queue")
    asked("scontrol", "update", f"jobid={job}", "starttime=now")
    until((run / "manifest.json").exists, 180, "the end")
    assert steps and log.read_text().count("going on from step") == 2
    assert result(run) == result(tmp_path / "straight")
    until(lambda: state(job) in ("", "COMPLETED"), 60, "the job's end")
