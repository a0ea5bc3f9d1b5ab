"""Out of memory by all its words, and what is done about it: the same work in parts."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.errors import UserError, is_out_of_memory
from posttrain.training.metrics import evaluate

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
