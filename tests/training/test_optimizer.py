"""Schedules at the places where they differ, and which parameter decays and learns how."""

import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.errors import UserError
from posttrain.training.checkpoint import newest_checkpoint, restore, save_checkpoint
from posttrain.training.optimizer import (
    going_on,
    in_place_of,
    lr_factor,
    make_moments,
    make_optimizer,
    optimizer_used,
)
from posttrain.training.optimizers._bitsandbytes import LARGE_MOMENTS


def factors(schedule: str, num_steps: int, warmup_steps: int) -> list[float]:
    return [lr_factor(schedule, step, num_steps, warmup_steps) for step in range(num_steps)]  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_begins_above_zero_and_ends_at_the_whole_rate(schedule: str) -> None:
    assert factors(schedule, 24, 4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_schedules_at_the_quarters() -> None:
    """Of 20 steps after 4 of warm-up: at 4, 9, 14 and 19 none, a quarter, half and three quarters are done."""
    quarters = [4, 9, 14, 19]
    found = {name: [factors(name, 24, 4)[step] for step in quarters] for name in ("constant", "linear", "cosine")}
    assert found["constant"] == [1.0, 1.0, 1.0, 1.0]
    assert found["linear"] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    # (1 + cos(pi / 4)) / 2, and the same from below
    assert found["cosine"] == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_is_zero_one_step_after_the_last(schedule: str) -> None:
    assert lr_factor(schedule, 24, 24, 4) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]
    assert factors(schedule, 24, 4)[-1] > 1e-3


def test_a_run_that_is_all_warm_up_divides_by_nothing() -> None:
    assert factors("cosine", 3, 3) == pytest.approx([1 / 3, 2 / 3, 1.0]) and factors("linear", 1, 0) == [1.0]


class Small(nn.Module):
    """A matrix, a bias and a norm; a frozen matrix; and a LoRA's two halves by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.frozen = nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2, bias=False)
        self.lora_A, self.lora_B = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
        self.frozen.requires_grad_(False)


def groups_of(module: nn.Module, weight_decay: float = 0.1) -> dict[str, tuple[float, float]]:
    """Name -> (weight decay, lr_ratio) of the group that a parameter is in."""
    optimizer, note = make_optimizer(
        "adamw", module, lambda name: 16.0 if "lora_B" in name else 1.0, lr=1e-3, betas=(0.9, 0.99), eps=1e-7,
        weight_decay=weight_decay,
    )  # fmt: skip
    assert note is None and all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-7 for group in optimizer.param_groups)
    names = {id(p): name for name, p in module.named_parameters()}
    found = [(names[id(p)], (g["weight_decay"], g["lr_ratio"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in one group"
    return dict(found)


def test_vectors_do_not_decay_and_what_is_frozen_is_in_no_group() -> None:
    assert groups_of(Small()) == {
        "linear.weight": (0.1, 1.0), "linear.bias": (0.0, 1.0), "norm.weight": (0.0, 1.0), "norm.bias": (0.0, 1.0),
        "lora_A.weight": (0.1, 1.0), "lora_B.weight": (0.1, 16.0),
    }  # fmt: skip


def test_decay_shrinks_a_matrix_and_leaves_a_norm() -> None:
    """AdamW's decay is apart from the gradient: with gradients of zero a weight is multiplied by 1 - lr * decay."""
    module = Small()
    optimizer, _ = make_optimizer(
        "adamw", module, lambda name: 1.0, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    torch.testing.assert_close(module.linear.weight, before["linear.weight"] * (1 - 0.1 * 0.5))
    for name in ("linear.bias", "norm.weight", "frozen.weight"):
        assert torch.equal(module.get_parameter(name), before[name])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what takes the place of a CUDA optimizer without CUDA")
def test_an_optimizer_that_needs_cuda_says_what_takes_its_place() -> None:
    optimizer, note = make_optimizer(
        "paged_adamw_8bit", Small(), lambda name: 1.0, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    assert type(optimizer) is torch.optim.AdamW and note is not None and "paged_adamw_8bit needs CUDA" in note


WAITS = "waits for the device at every weight, to page moments that would take {:.2f} GiB"


@pytest.mark.parametrize(
    ("name", "numbers", "on_cuda", "why"),
    [
        ("adamw", 10, True, ""),
        ("adamw_8bit", 10, True, ""),
        ("adamw_8bit", 10, False, "needs CUDA"),
        # LoRA of rank 16 and of rank 64 on 8 billion weights
        ("paged_adamw_8bit", 41_943_040, True, WAITS.format(0.31)),
        ("paged_adamw_8bit", 167_772_160, True, ""),
        ("paged_adamw_32bit", LARGE_MOMENTS // 8, True, ""),
        (
            "paged_adamw_32bit",
            LARGE_MOMENTS // 16,
            True,
            WAITS.format(0.50),
        ),
    ],
)
def test_moments_are_paged_where_they_are_large(name: str, numbers: int, on_cuda: bool, why: str) -> None:
    found = in_place_of(name, numbers, on_cuda)
    assert (found.why if found else "") == why


def optimizer_of(name: str, module: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """As a run has it on CUDA, on whatever device."""
    if name == "adamw":
        found = torch.optim.AdamW(module.parameters(), lr=0.1)
        found.param_groups[0]["fused"] = fused
        return found
    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
    return getattr(bitsandbytes.optim, kinds[name])(module.parameters(), lr=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_comes_back_and_lies_where_the_optimizer_wants_it(name: str, tmp_path: Path) -> None:
    """Restored on the CPU it is what was saved; onto another device nothing stays on the CPU, but the counter that AdamW keeps
    there unless it is fused (simulated: the other device has shapes alone)."""
    module = nn.Linear(96, 64)  # more than the 4,096 numbers from which on moments are in 8 bits
    optimizer = optimizer_of(name, module, fused=False)
    for step in range(2):
        for p in module.parameters():
            p.grad = torch.full_like(p, 0.5 + step)
        optimizer.step()
    save_checkpoint(tmp_path, 2, module, optimizer, {}, {}, keep=1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    again = nn.Linear(96, 64)
    restored = optimizer_of(name, again, fused=False)
    restore(checkpoint, again, restored)
    for old, new in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
        for slot, value in optimizer.state[old].items():
            assert torch.equal(torch.as_tensor(restored.state[new][slot]), torch.as_tensor(value)), slot
    for fused in (True, False):
        elsewhere = nn.Linear(96, 64, device="meta")
        moved = optimizer_of(name, elsewhere, fused)
        restore(checkpoint, elsewhere, moved)
        left = {s for state in moved.state.values() for s, v in state.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
        assert left == ({"step"} if name == "adamw" and not fused else set())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_moments_that_are_made_first_change_no_bit(name: str) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for first in (True, False):
        torch.manual_seed(0)
        module = nn.Linear(96, 64)
        optimizer = optimizer_of(name, module, fused=name == "adamw")
        if first:
            make_moments(optimizer)
        for step in range(3):
            for p in module.parameters():
                p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
        slots = {slot: torch.as_tensor(value) for slot, value in optimizer.state[module.weight].items()}
        found.append((module.weight.detach().clone(), slots))
    (weight, slots), (expected, others) = found
    assert torch.equal(weight, expected) and set(slots) == set(others)
    assert all(torch.equal(slots[slot].float(), others[slot].float()) for slot in slots)


class Made(TorchDispatchMode):
    """Bytes of the largest tensor that is not one of those given."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in pytree.tree_leaves(out):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return out


def test_a_step_makes_nothing_as_large_as_a_weight_once_the_moments_are_there() -> None:
    """What a run has on CUDA, AdamW in one kernel, on the CPU; without the moments it makes two such tensors."""
    for first, most in ((False, 96 * 64 * 4), (True, 0)):
        module = nn.Linear(96, 64, bias=False)
        optimizer, _ = make_optimizer(
            "adamw", module, lambda name: 1.0, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
        )  # fmt: skip
        if first:
            make_moments(optimizer)
        module.weight.grad = torch.ones_like(module.weight)
        known = [module.weight, module.weight.grad, *(v for state in optimizer.state.values() for v in state.values())]
        with Made(known) as seen:
            optimizer.step()
        assert seen.largest <= most + 64 and seen.largest >= most


def test_a_run_goes_on_with_the_moments_that_it_has() -> None:
    """Begun with paged moments of 0.31 GiB, by an earlier version; begun on a CPU; and where it cannot go on."""
    paged, numbers = "paged_adamw_8bit", 41_943_040
    small, large = in_place_of(paged, numbers, True), in_place_of(paged, 10 * numbers, True)
    assert small and small.runs and large is None
    assert going_on(paged, small, "bitsandbytes") == going_on(paged, large, "bitsandbytes") == (paged, None)
    used, line = going_on(paged, large, "adamw")
    assert used == "adamw" and line and "began with plain AdamW" in line
    assert going_on(paged, small, "adamw") == optimizer_used(paged, numbers, "cuda", False)
    assert going_on("adamw", None, "adamw") == ("adamw", None)
    for instead in (in_place_of(paged, numbers, on_cuda=False), in_place_of(paged, numbers, on_cuda=True, sharded=True)):
        with pytest.raises(
            UserError, match=r"^run.dir: the checkpoint has the moments of bitsandbytes' .* plain AdamW takes its"
        ):
            going_on(paged, instead, "bitsandbytes")
    with pytest.raises(UserError, match="optim=adamw is asked for"):
        going_on("adamw", None, "bitsandbytes")


@pytest.mark.parametrize(("name", "kept"), [("adamw", "adamw"), ("paged_adamw_8bit", "bitsandbytes")])
def test_a_checkpoint_says_whose_moments_it_has(name: str, kept: str, tmp_path: Path) -> None:
    module = nn.Linear(96, 64)
    optimizer = optimizer_of(name, module, fused=False)
    save_checkpoint(tmp_path, 1, module, optimizer, {}, {}, keep=1)
    first, _ = newest_checkpoint(tmp_path)
    assert first and first.moments is None
    make_moments(optimizer)
    save_checkpoint(tmp_path, 2, module, optimizer, {}, {}, keep=1)
    second, _ = newest_checkpoint(tmp_path)
    assert second and second.moments == kept


def test_wsd_and_the_least_rate_are_those_of_transformers() -> None:
    """Equal to transformers' schedules at every step; by hand the last but one of 3 falling steps is at 2/3 of the way."""
    from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

    def theirs(make: Any, **options: Any) -> list[float]:
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        schedule = make(optimizer, **options)
        return [schedule.lr_lambdas[0](step) for step in range(20)]

    ours = [lr_factor("wsd", step, 20, 0, 0.1, 3) for step in range(20)]
    assert ours[17:] == pytest.approx([1.0, 0.1 + 0.9 * 2 / 3, 0.1 + 0.9 / 3]) and set(ours[:18]) == {1.0}
    options = {"num_warmup_steps": 0, "num_training_steps": 20}
    wsd = theirs(get_wsd_schedule, num_decay_steps=3, min_lr_ratio=0.1, decay_type="linear", **options)
    assert ours == pytest.approx(wsd)
    cosine = theirs(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1, **options)
    assert [lr_factor("cosine", step, 20, 0, 0.1) for step in range(20)] == pytest.approx(cosine)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_least_rate_is_reached_one_step_after_the_last(schedule: Any) -> None:
    assert lr_factor(schedule, 20, 20, 4, 0.25, 2) == pytest.approx(0.25)
    assert lr_factor(schedule, 5, 4, 4, 0.25, 2) <= 1.0  # a run that is all warm-up divides by nothing


def test_going_back_to_the_start_forgets_the_moments(tmp_path: Path) -> None:
    """A step after it is the first step of a new optimizer, with its bits."""

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, gradient: float) -> None:
        for p in module.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()

    module = nn.Linear(3, 2)
    optimizer = optimizer_of("adamw", module, fused=False)
    save_checkpoint(tmp_path, 0, module, optimizer, {}, {}, keep=1)
    start, _ = newest_checkpoint(tmp_path)
    assert start is not None
    for gradient in (5.0, -2.0):
        step(module, optimizer, gradient)
    restore(start, module, optimizer)
    assert not any(optimizer.state.values())
    step(module, optimizer, 0.5)
    fresh = nn.Linear(3, 2)
    new = optimizer_of("adamw", fresh, fused=False)
    restore(start, fresh, new)
    step(fresh, new, 0.5)
    for mine, its in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, its) and optimizer.state[mine]["step"] == new.state[its]["step"] == 1
