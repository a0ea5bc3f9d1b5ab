"""Out of memory by all its words, and what is done about it: the same work in parts."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import LossOutput
from posttrain.data.collate import pack, pack_pairs
from posttrain.data.examples import Examples, build
from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.errors import UserError, is_out_of_memory
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.objectives import TOKENS
from posttrain.models.language.packed_lm import PackedLM
from posttrain.stages.dpo.reference import reference_logps
from posttrain.stages.language.curriculum import perplexities
from posttrain.stages.ppo.rollout import Roller
from posttrain.training.metrics import evaluate

CPU = torch.device("cpu")

# as libraries really say it
SAID = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.00 GiB is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "HIP out of memory. Tried to allocate 512.00 MiB (GPU 0; 191.98 GiB total capacity)",
    "HIP error: out of memory",
    "MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB, max allowed: 18.13 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
    "Triton Error [HIP]: Code: 2, Messsage: out of memory",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    "NCCL error: unhandled cuda error: Failed to CUDA calloc 4194304 bytes",
]


@pytest.mark.parametrize("said", SAID)
def test_it_is_known_by_its_words(said: str) -> None:
    assert is_out_of_memory(RuntimeError(said))


def test_it_is_known_by_its_class_its_number_and_its_cause() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    outer = ValueError("a kernel failed")
    outer.__cause__ = RuntimeError(SAID[0])
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError(
            "out of resource: shared memory, Required: 131072, Hardware limit: 101376"
        ),  # of a kernel, whatever the batch
        UserError("the run is out of memory"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_parts_are_as_small_as_they_must_be_and_in_order() -> None:
    asked: list[int] = []

    def work(items: list[int]) -> int:
        asked.append(len(items))
        if len(items) > 2:
            raise RuntimeError(SAID[1])
        return sum(items)

    assert in_parts(work, list(range(8)), in_two, "adding") == [1, 5, 9, 13]
    assert asked == [8, 4, 2, 2, 4, 2, 2]


def test_what_cannot_be_split_and_other_errors_are_raised() -> None:
    def fails(items: list[int]) -> int:
        raise RuntimeError(SAID[5] if len(items) == 1 else "another thing")

    for items in ([1], [1, 2]):
        with pytest.raises(RuntimeError):
            in_parts(fails, items, in_two, "nothing")


def test_what_is_measured_in_parts_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """As for a batch of six documents of which three are too many."""
    rows = [([1, 2, 3, 4][: 2 + i % 3], [1.0] * (2 + i % 3), i) for i in range(6)]
    batches = [pack(build(rows), range(6))]
    most = 6

    def loss(module: nn.Module, batch: object) -> LossOutput:
        assert isinstance(batch, type(batches[0]))
        if len(batch.rows) > most:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        each: Tensor = batch.target.float()
        return LossOutput(each.sum(), {"loss": (each.sum(), float(len(each)))}, {"each": each})

    asked = (nn.Linear(1, 1), batches, loss, torch.device("cpu"), lambda: None)
    whole, rows_whole = evaluate(*asked)
    most = 2
    parts, rows_parts = evaluate(*asked)
    assert parts == whole and torch.equal(rows_parts["each"], rows_whole["each"])
    assert capsys.readouterr().out.count("out of memory") == 1


@pytest.fixture(scope="module")
def lm() -> PackedLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return PackedLM(LlamaForCausalLM(config), "documents")


def pairs() -> Examples:
    """Six of a prompt of 3 tokens with answers of 2 to 4."""
    drawn = torch.Generator().manual_seed(1)
    rows = [(torch.randint(3, 64, (9,), generator=drawn).tolist(), [0.0] * 3 + [1.0] * 6, i) for i in range(6)]
    return build(rows, splits=[(3, 5 + i % 3) for i in range(6)])


def references(lm: PackedLM) -> Tensor:
    return reference_logps(lm, pack_pairs(pairs(), range(6)), CPU)


def read_by_a_role(lm: PackedLM) -> Tensor:
    """Of a rollout."""
    roller: Any = SimpleNamespace(roles=lambda pack, role, **options: lm(pack), sampling=Sampling(4, 1.0, 1.0, 0, 4))
    return torch.cat(Roller._said(roller, [pack_pairs(pairs(), range(6))], "policy"))


def difficulty(lm: PackedLM) -> Tensor:
    return perplexities(lm, pairs(), TOKENS, CPU, lambda: None)


def evaluation(lm: PackedLM) -> Tensor:
    found, _ = evaluate(lm, [pack(pairs(), range(6))], TOKENS.loss, CPU, lambda: None)
    return torch.tensor(list(found.values()))


def answers(lm: PackedLM) -> Tensor:
    """Each prompt has random numbers of its own, as in a run."""
    prompts = [pairs().sequence(i)[0][:4].tolist() for i in range(6)]
    written = sample(lm, prompts, 2, Sampling(5, 1.0, 1.0, 0, 12), [0], seeds=list(range(6)))
    return torch.tensor([[float(token) for token in answer.tokens[:1]] + answer.logps[:1] for each in written for answer in each])


@pytest.mark.parametrize("place", [references, read_by_a_role, difficulty, evaluation, answers])
def test_where_a_model_reads_it_is_the_same_in_parts(
    place: Callable[[PackedLM], Tensor], lm: PackedLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has room for 12 tokens at a time, of an example in 9; and with room again nothing is split."""
    whole, read, sizes, most = place(lm), PackedLM.hidden, list[int](), 12

    def short(self: PackedLM, positions: Tensor, *given: Any, **inputs: Any) -> Tensor:
        sizes.append(positions.numel())
        if positions.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return read(self, positions, *given, **inputs)

    monkeypatch.setattr(PackedLM, "hidden", short)
    parts, largest = place(lm), max(sizes)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert largest > most and sizes.count(largest) == 1
    most = largest
    sizes.clear()
    assert torch.equal(place(lm), whole) and sizes == [largest]
