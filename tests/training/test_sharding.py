"""What is called sharded is: every parameter in parts, and a part of it in each process."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.config.compose import compose_run
from posttrain.devices.device import Device
from posttrain.errors import RunError, UserError
from posttrain.stages.accelerator import make_accelerator
from posttrain.training.checkpoint import trainable
from posttrain.training.optimizer import make_optimizer
from posttrain.training.sharding import shard

CPU = torch.device("cpu")


@pytest.fixture
def two() -> Iterator[None]:
    """The first of two processes, of which the other is not there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(10, 4), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), nn.Linear(4, 10, bias=False))


def test_every_parameter_is_in_parts(two: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = model()
    shard(found, list(found[1].children()), CPU, bf16=False)
    assert len(list(found.parameters())) == 6
    for p in found.parameters():
        assert isinstance(p, DTensor) and p.placements == (Shard(0),) and p.to_local().numel() == p.numel() // 2
    assert "sharded over 2 processes: 69 of 138 parameters in each" in capsys.readouterr().out  # 40 + 30 + 28 + 40
    assert set(trainable(found)) == set(trainable(model()))


def test_parts_are_float32_where_files_have_fewer_bits(two: None) -> None:
    """The same numbers; without it they keep their format."""
    found = model().bfloat16()
    kept = copy.deepcopy(found)
    shard(found, list(found[1].children()), CPU, bf16=False, wide=True)
    for p, before in zip(found.parameters(), kept.parameters(), strict=True):
        assert isinstance(p, DTensor) and p.dtype == p.to_local().dtype == torch.float32
        part = p.to_local()
        assert torch.equal(part, before.float()[: len(part)])
    narrow = shard(model().bfloat16(), [], CPU, bf16=False)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_what_stays_whole_is_refused(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.training.sharding.fully_shard", lambda module, **_: module)
    with pytest.raises(RunError, match=r"train.fsdp: 0.weight \(and 5 more\) is not sharded"):
        shard(model(), [], CPU, bf16=False)


def test_an_optimizer_that_does_not_shard_is_said(two: None) -> None:
    found = shard(model(), [], CPU, bf16=False)
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer, note = make_optimizer("paged_adamw_8bit", found, lambda name: 1.0, **options)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert note == "optim=paged_adamw_8bit does not shard (train.fsdp); plain AdamW takes its place here"


def test_one_process_has_nothing_to_shard_over() -> None:
    train = SimpleNamespace(fsdp=True, precision="none")
    cfg: Any = SimpleNamespace(tracker="none", train=train)
    with pytest.raises(UserError, match=r"train.fsdp: there is one process"):
        make_accelerator(cfg, Device.here())  # pyright: ignore[reportArgumentType]


def test_what_does_not_shard_is_refused_before_anything_is_read() -> None:
    with pytest.raises(UserError, match=r"train.fsdp does not shard a base in nf4"):
        compose_run("sft", ["model=tiny", "+peft=qlora", "train.fsdp=true"])


MEMORY = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.training.sharding import shard

def own():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
found = [own()]
model = load_causal(sys.argv[1], None, sys.argv[2], "cpu", None, None, "say", None, sys.argv[2] == "float32")
found.append(own())
lm = PackedLM(model)
shard(lm, lm.units, torch.device("cpu"), False, sys.argv[2] == "float32")
print(*found, own(), {p.dtype for p in lm.parameters()} == {getattr(torch, sys.argv[2])})
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much of a process's memory is its own")
@pytest.mark.parametrize(("dtype", "whole"), [("bfloat16", 1), ("float32", 2)])
def test_no_process_holds_the_whole_model(dtype: str, whole: int, tmp_path: Path) -> None:
    """Weights that are loaded as they are stored are pages of their file, which the processes of a machine share; float32 ones
    are made of them a layer at a time. whole: of the bytes of the files."""
    sizes: dict[str, Any] = {
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path)
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    ended = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), dtype], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    *sizes_there, cast = ended.stdout.split()[-4:]
    before, loaded, sharded = map(float, sizes_there)
    assert weights > 250 and cast == "True" and loaded - before < 0.2 * weights
    # a quarter of them, and what the first pass, or the cast of the last layer, has left in the allocator
    assert sharded - before < 0.75 * whole * weights
