"""Whole runs of a small random model on this device: their memory beside the plan's, a kill and a resume, two processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.commands.checks.check import Check, Figures, NotHere, Wrong
from posttrain.commands.compare_runs import compare_runs
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose_run
from posttrain.console import console
from posttrain.devices.device import Device
from posttrain.launch import warm_worker
from posttrain.launch.subprocess_runner import config_file, worker_command
from posttrain.launch.worker import run_config
from posttrain.models.kernels.beside import apart
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.training.signals import PARENT

SMALL = ["train.batch_size=2", "data.max_rows=24", "eval.sets=null"]
ON_CARD, ON_CPU = (8, 2048), (2, 64)  # layers and width of the model: 0.4 billion numbers on a card
EXTRA = {
    "sft": ["+peft=qlora"],
    "dpo": ["+peft=lora"],
    "ppo": ["+peft=lora", "reward.function=length", "rollout.max_new_tokens=8"],
}
MUCH = 256 * 2**20  # bytes that a run may take beside what a plan counts: the libraries' own workspaces
PATIENCE = 240.0  # seconds until a first checkpoint
LOOK = 0.01  # seconds between two looks for it


def memory(device: torch.device, stage: str) -> Figures:
    """Two steps, and the most memory that they took beside the plan's. On a CPU the process's memory has all
    libraries in it, and is no figure to compare."""
    with tempfile.TemporaryDirectory() as folder, console.capture():
        model = _random_model(Path(folder) / "model", *(ON_CARD if device.type == "cuda" else ON_CPU))
        words = [f"model.name={model}", *SMALL, *EXTRA[stage], "train.grad_accum=2", "train.max_steps=2"]
        planned = float(make_plan(stage, words, None, Device.at(device))["total_bytes"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        done = run_config(compose_run(stage, [*words, f"run.dir={folder}/run"]))
    figures = {"planned GB": planned / 1e9, "steps": done["steps"], "seconds": done["seconds"]}
    if device.type != "cuda":
        return figures
    took = float(done["peak_memory_bytes"])
    if took > 1.1 * planned + MUCH:
        raise Wrong(f"took {took / 1e9:.2f} GB, and the plan says {planned / 1e9:.2f} GB")
    return {"peak GB": took / 1e9, **figures}


def _random_model(folder: Path, layers: int, width: int) -> Path:
    """A Llama with random weights, and the tokenizer of model=tiny."""
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    heads = width // min(128, width // 4)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def kill_and_resume(device: torch.device) -> Figures:
    """`kill -9` after the first checkpoint; the same command again ends in the same bits as a run that nobody has killed."""
    words = ["model=tiny", *SMALL, "+peft=qlora", "train.max_steps=6", "train.save_steps=1"]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("straight", "killed")]
        configs = [compose_run("sft", [*words, f"run.dir={place}"]) for place in places]
        _worker(configs[0])
        killed = _worker(configs[1], kill_at=places[1] / "checkpoints")
        _worker(configs[1])
        if wrong := [f"{each.part}: {each.text}" for each in compare_runs(*places) if not each.same]:
            raise Wrong("; ".join(wrong))
    return {"killed after step": killed}


def two_processes(device: torch.device) -> Figures:
    """Two processes, a card each, learn what one learns with twice the micro-batches."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("needs 2 CUDA cards")
    words = ["model=tiny", *SMALL, "+peft=lora", "train.max_steps=3"]
    with tempfile.TemporaryDirectory() as folder:
        found: list[dict[str, torch.Tensor]] = []
        for count in (1, 2):
            place = Path(folder) / str(count)
            each = [f"train.processes={count}", f"train.grad_accum={4 // count}", f"run.dir={place}"]
            _worker(compose_run("sft", [*words, *each]))
            found.append(load_file(place / "adapter" / "adapter_model.safetensors"))
    one, two = (torch.cat([value.float().flatten() for _, value in sorted(each.items())]) for each in found)
    if (error := apart(two, one)) > 1e-2:
        raise Wrong(f"two processes learn something else than one (relative difference {error:.1e})")
    return {"relative difference": error}


def _worker(config: dict[str, Any], kill_at: Path | None = None) -> int:
    """A run in a process of its own, to its end, or killed at its first checkpoint, whose step is returned. Raises Wrong."""
    with config_file(config) as file:
        try:
            code, step, said = _followed(_forked(file), kill_at)
        except warm_worker.Gone:
            command, environment = worker_command(str(file)), os.environ | {PARENT: str(os.getpid())}
            new = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
            code, step, said = _followed(new, kill_at)
    if code and not step:
        raise Wrong(f"a run ended with exit code {code}: {' '.join(said.split())[-300:]}")
    if kill_at and not step:
        raise Wrong("a run that was to be killed came to its end before")
    return step


def _forked(file: Path) -> warm_worker.WarmJob:
    """Of a process that has the libraries in memory, which a new one takes most of its time for. Raises Gone."""
    environment = dict(os.environ)
    if worker := warm_worker.for_jobs_in(environment):
        return worker.start(file, environment)
    raise warm_worker.Gone


def _followed(child: Any, kill_at: Path | None) -> tuple[int, int, str]:
    """Its exit code, the step of the checkpoint at which it was killed, or 0, and what it said. Raises Gone."""
    said, step, ends = b"", 0, time.monotonic() + PATIENCE
    while True:
        if select.select([child.stdout], [], [], LOOK)[0]:
            if not (more := os.read(child.stdout.fileno(), 1 << 16)):
                return child.wait(), step, said.decode(errors="replace")
            said += more
        if kill_at and not step:
            step = max((int(path.name[5:]) for path in kill_at.glob("step-*")), default=0)
            if step or time.monotonic() > ends:
                child.send_signal(signal.SIGKILL)


KILL_CHECK = Check("kill -9 and resume", kill_and_resume, slow=True)
RUN_CHECKS = (
    *(Check(f"a short {stage}, memory and plan", partial(memory, stage=stage), slow=True) for stage in EXTRA),
    Check("two processes", two_processes, slow=True),
)
