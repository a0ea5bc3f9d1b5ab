"""What a GPU would be waited for is seen on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.devices.host_waits import HostWaits

X = torch.arange(6.0).view(2, 3)
WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: X.sum().item(),
    "if": lambda: bool(X.any()),
    "nonzero": lambda: X.nonzero(),
    "by a mask": lambda: X[X > 2],
    "put by a mask": lambda: X.clone().index_put_((X > 2,), torch.tensor(1.0)),
    "equal": lambda: torch.equal(X, X),
    "unique": lambda: X.unique(),
    "to another device": lambda: X.to("meta"),
    "a number to another device": lambda: torch.tensor(2.0).to("meta"),
}
FREE: dict[str, Callable[[], Tensor]] = {
    "product": lambda: X @ X.T,
    "by numbers": lambda: X[torch.tensor([1, 0])],
    "written by numbers": lambda: X.clone().index_copy_(1, torch.tensor([1]), X[:, :1]),
    "where": lambda: X.masked_fill(X > 2, 0.0),
    "search": lambda: torch.searchsorted(X, torch.ones(2, 1)),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_would_wait(name: str) -> None:
    with HostWaits() as waits:
        WAITS[name]()
    assert waits.found


@pytest.mark.parametrize("name", FREE)
def test_the_host_would_go_on(name: str) -> None:
    with HostWaits() as waits:
        FREE[name]()
    assert waits.found == []


def test_a_number_of_the_cpu_may_stand_in_a_product() -> None:
    elsewhere, number = X.to("meta"), torch.tensor(2.0)
    with HostWaits() as waits:
        product = elsewhere * number
    assert product.is_meta and waits.found == []
