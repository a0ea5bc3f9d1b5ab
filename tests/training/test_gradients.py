"""Gradients of several processes are one, whatever came before in a process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.training import gradients
from posttrain.training.gradients import average_gradients


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Parameter(torch.zeros(size)) for size in (3, 2, 4))
        self.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)


@pytest.fixture
def collected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was added up, as it was before; the other process has the same gradients."""
    found: list[Tensor] = []

    def all_reduce(value: Tensor) -> None:
        found.append(value.clone())
        value *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    return found


def test_the_places_in_a_bucket_are_the_same_at_every_step(collected: list[Tensor]) -> None:
    """In the order of the parameters, and not of the backward: else a run of four that is resumed has other bits."""
    model = Model()
    for p, value in ((model.third, 3.0), (model.first, 1.0), (model.second, 2.0)):
        p.grad = torch.full_like(p, value)
    average_gradients(model)
    assert collected[0].tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert model.first.grad is not None and model.first.grad.tolist() == [1, 1, 1] and model.frozen.grad is None


def test_buckets_hold_one_data_type_and_so_many_bytes(collected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 20)
    model = Model()
    model.third = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    for p in (model.first, model.second, model.third):
        p.grad = torch.ones_like(p)
    average_gradients(model)
    assert [(len(each), each.dtype) for each in collected[:-1]] == [(5, torch.float32), (4, torch.bfloat16)]


def test_a_parameter_without_a_gradient_counts_as_zero(collected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process has one it has none, and the optimizer leaves it alone."""
    model = Model()
    model.first.grad = torch.ones(3)
    average_gradients(model)
    assert collected[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0] and collected[1].tolist() == [1, 0, 0]
    assert model.second.grad is None and model.third.grad is None
    monkeypatch.setattr(dist, "all_reduce", lambda value: value.add_(1))
    average_gradients(model)
    assert model.second.grad is not None and model.second.grad.tolist() == [0.5, 0.5]
