"""Each optimizer: numbers by hand, equal to its library, a stop that leaves no trace, and the bytes that it keeps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.config.choices import OPTIMIZERS
from posttrain.errors import UserError
from posttrain.training.checkpoint import newest_checkpoint, restore, save_checkpoint
from posttrain.training.optimizer import as_left, group_rates, leave, make_optimizer, state_bytes

OURS = ("adamw", "lion", "adafactor", "muon", "schedule_free_adamw", "prodigy")
BETAS = {"lion": (0.9, 0.99), "adafactor": None}


class Model(nn.Module):
    """Words, a hidden matrix with a bias, an expert's, and a head of its own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(7, 6), nn.Linear(6, 5)
        self.experts, self.head = nn.ModuleList([nn.Linear(5, 6, bias=False)]), nn.Linear(6, 7, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def made(name: str, module: nn.Module, lr: float = 0.01, **options: Any) -> torch.optim.Optimizer:
    kind = OPTIMIZERS.get(name)
    eps = 1e-8 if "eps" in kind.takes else None
    return make_optimizer(
        name, module, lambda _: 1.0, lr=lr, betas=BETAS.get(name, (0.9, 0.999)), eps=eps, weight_decay=0.0, options=options
    )[0]


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """The same gradients in the same step of every run."""
    for number in numbers:
        drawn = torch.Generator().manual_seed(number)
        for p in module.parameters():
            p.grad = torch.rand(p.shape, generator=drawn)  # of one sign, so that Prodigy's estimate moves
        optimizer.step()


def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize("name", OURS)
def test_a_stop_leaves_no_trace(name: str, tmp_path: Path) -> None:
    whole, stopped, again = model(), model(), model()
    lr = 1.0 if name == "prodigy" else 0.01
    steps(whole, made(name, whole, lr), range(6))
    first = made(name, stopped, lr)
    steps(stopped, first, range(3))
    with as_left(first):  # as an evaluation does
        pass
    save_checkpoint(tmp_path, 3, stopped, first, {}, {}, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    second = made(name, again, lr)
    restore(checkpoint, again, second)
    steps(again, second, range(3, 6))
    for before, after in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", OURS)
def test_back_at_the_first_step_nothing_is_left_of_the_others(name: str, tmp_path: Path) -> None:
    module, fresh = model(), model()
    optimizer = made(name, module)
    save_checkpoint(tmp_path, 0, module, optimizer, {}, {}, keep=1)
    steps(module, optimizer, range(3))
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    restore(checkpoint, module, optimizer)
    steps(module, optimizer, range(2))
    steps(fresh, made(name, fresh), range(2))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("name", OURS)
def test_bytes_are_those_that_it_holds(name: str) -> None:
    module = model()
    optimizer = made(name, module)
    steps(module, optimizer, range(2))
    tensors = [value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, torch.Tensor)]
    assert state_bytes(name, module) == sum(value.nbytes for value in tensors if value.ndim)


def test_bytes_by_hand() -> None:
    """42 + 30 + 5 + 30 + 42 numbers; hidden matrices of Muon 30 + 30; Adafactor rows and columns, and the bias as it is."""
    found = {name: state_bytes(name, model()) / 4 for name in OURS}
    assert found == {
        "adamw": 298, "lion": 149, "prodigy": 596, "schedule_free_adamw": 298, "muon": 298 - 60,
        "adafactor": (7 + 6) + (6 + 5) + 5 + (5 + 6) + (6 + 7),
    }  # fmt: skip


def test_a_step_of_lion_by_hand() -> None:
    """w - lr sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g: after g = 1 and then -0.05, m is 0.01, and b1 m is above."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    optimizer = made("lion", module, lr=0.1)
    for gradient, weight in ((1.0, 0.9), (-0.05, 0.8), (-1.0, 0.9)):
        module.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        assert module.weight.item() == pytest.approx(weight)


def test_a_step_of_muon_is_orthogonal_and_has_adamws_size() -> None:
    """0.2 sqrt(max(A, B)) U V': of 16 x 4 all singular values of the step are 0.8 lr, as far as five iterations take them."""
    layer = nn.Linear(4, 16, bias=False)
    module = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    optimizer = made("muon", module, lr=1.0)
    steps(module, optimizer, range(1))
    values = torch.linalg.svdvals(before - layer.weight.detach())
    assert bool((values > 0.8 * 0.6).all()) and bool((values < 0.8 * 1.3).all())


def by_library(name: str, module: Model) -> list[torch.optim.Optimizer]:
    import prodigyopt
    import schedulefree
    from transformers.optimization import Adafactor

    params = list(module.parameters())
    if name == "muon":
        ours = [module.hidden.weight, module.experts[0].weight]
        rest = [module.words.weight, module.hidden.bias, module.head.weight]
        return [
            torch.optim.Muon(ours, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0),
        ]
    if name == "adafactor":
        return [Adafactor(params, lr=0.01, scale_parameter=False, relative_step=False)]
    if name == "prodigy":
        return [prodigyopt.Prodigy(params, lr=0.01)]
    found = schedulefree.AdamWScheduleFree(params, lr=0.01)
    found.train()
    return [found]


@pytest.mark.parametrize("name", ["muon", "adafactor", "prodigy", "schedule_free_adamw"])
def test_equal_to_its_library(name: str) -> None:
    ours, theirs = model(), model()
    steps(ours, optimizer := made(name, ours), range(5))
    others = by_library(name, theirs)
    for number in range(5):
        drawn = torch.Generator().manual_seed(number)
        for p in theirs.parameters():
            p.grad = torch.rand(p.shape, generator=drawn)
        for other in others:
            other.step()
    leave(optimizer)
    for other in others:
        leave(other)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-7)


def test_what_is_measured_is_the_average_and_training_goes_on_from_where_it_was() -> None:
    """With gradients of zero but the first, y = x = z; here x is the mean of z, weighed alike at a constant rate."""
    module = nn.Linear(1, 1, bias=False)
    optimizer = made("schedule_free_adamw", module)
    fast = []
    for number in range(4):
        module.weight.grad = torch.tensor([[1.0 + number]])
        optimizer.step()
        fast.append(optimizer.state[module.weight]["z"].item())
    trained = module.weight.item()
    with as_left(optimizer):
        assert module.weight.item() == pytest.approx(sum(fast) / 4, abs=1e-6) and module.weight.item() != trained
    assert module.weight.item() == trained and optimizer.param_groups[0]["train_mode"]


def test_rates_of_groups() -> None:
    """Absolute ones over the run's, times what the method says; the first group that a name is of counts."""
    double: Callable[[str], float] = lambda name: 2.0 if "hidden" in name else 1.0  # noqa: E731
    ratio = group_rates(Model(), double, 1e-3, {"embeddings": 1e-4, "head": 2e-3, "experts": 5e-4, "bias": 3e-3})
    found = {name: ratio(name) for name, _ in Model().named_parameters()}
    assert found == pytest.approx(
        {"words.weight": 0.1, "head.weight": 2.0, "experts.0.weight": 0.5, "hidden.bias": 6.0, "hidden.weight": 2.0}
    )


@pytest.mark.parametrize("group", ["head", "no_such"])
def test_a_group_of_nothing_is_an_error(group: str) -> None:
    with pytest.raises(UserError, match=f"nothing that is trained is of '{group}'"):
        group_rates(Model(tied=True), lambda _: 1.0, 1e-3, {group: 1e-4})


def test_muon_on_nothing_but_a_head_is_an_error() -> None:
    module = model()
    module.requires_grad_(False)
    module.head.requires_grad_(True)
    with pytest.raises(UserError, match="none is trained"):
        made("muon", module)


def test_prodigy_finds_the_rate_of_a_bowl() -> None:
    """(w - 1)^2 from 0 with optim.lr=1: it comes to 1, from a first estimate of 1e-6."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = made("prodigy", module, lr=1.0)
    for _ in range(200):
        module.weight.grad = 2 * (module.weight.detach() - 1)
        optimizer.step()
    assert module.weight.item() == pytest.approx(1.0, abs=0.02) and math.isfinite(optimizer.param_groups[0]["d"])


@pytest.mark.parametrize("name", ["muon", "prodigy", "lion"])
def test_a_run_goes_on_with_the_optimizer_that_it_has(name: str) -> None:
    """Slots of theirs are called as AdamW's are, which plain AdamW could take over."""
    betas, eps = BETAS.get(name, (0.9, 0.999)), None if name == "lion" else 1e-8
    again, _ = make_optimizer(
        name, model(), lambda _: 1.0, lr=0.1, betas=betas, eps=eps, weight_decay=0.0, kept="adamw"
    )  # fmt: skip
    assert type(again) is type(made(name, model()))
