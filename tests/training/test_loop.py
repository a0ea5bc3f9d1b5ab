"""The loop's invariants on a small random model: how a step is split, and where it stops, must not change a weight."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tests.models.peft.plain import plain_lora
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import BatchSampler, pack, zero_weight
from posttrain.data.examples import Examples, build
from posttrain.errors import RunError, Stopped
from posttrain.losses.tokens import token_loss
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.training.at_rest import made_once
from posttrain.training.checkpoint import newest_checkpoint, restore, trainable
from posttrain.training.loop import Loop
from posttrain.training.loop_parts import LoopConfig
from posttrain.training.objective import Update
from posttrain.training.optimizer import make_optimizer
from posttrain.training.signals import StopSignal
from posttrain.training.state import TrainState
from posttrain.training.tracking import Tracker

STEPS = 6


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """As they are now."""
    return {name: p.detach().clone() for name, p in trainable(module).items()}


def make_examples() -> Examples:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(48):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        tokens = torch.randint(0, 64, (length,), generator=generator).tolist()
        weights = [float(i >= length // 3) for i in range(length)]
        rows.append((tokens, weights, number))
    return build(rows)


def make_loop(
    folder: Path, batch_size: int, grad_accum: int, dropout: float = 0.0, save_steps: int | None = None, b_ratio: float = 1.0
) -> Loop:
    """b_ratio: how much faster B learns than A."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    lora = plain_lora(dropout=dropout)
    model = add_method(LlamaForCausalLM(config), lora)
    module = PackedLM(model, "documents")
    accelerator = Accelerator(cpu=True)
    optimizer, _ = make_optimizer(
        "adamw", module, lambda name: b_ratio if ".lora_B." in name else 1.0,
        lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
    )  # fmt: skip
    module, optimizer = accelerator.prepare(module, optimizer)
    examples = make_examples()
    order = BatchSampler.shuffled(len(examples), batch_size, grad_accum, 1, seed=5, total_units=STEPS * batch_size * grad_accum)
    loop_config = LoopConfig(STEPS, 2, 1, None, save_steps, 2, 1e-3, "linear", 1.0, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder / "metrics.jsonl", accelerator)
    return Loop(
        name="test",
        accelerator=accelerator,
        module=module,
        optimizer=optimizer,
        loss=lambda lm, batch: token_loss(lm(batch), batch.weight),
        source=lambda step: [Update([pack(examples, units) for units in order.micro(step, 0)])],
        config=loop_config,
        tracker=tracker,
        checkpoints=folder / "checkpoints",
        stop=StopSignal(),
        evaluate=lambda done: {},
    )


def trained(loop: Loop, start: int = 0) -> dict[str, torch.Tensor]:
    loop.fit(start)
    return gather_weights(loop.module)


def test_how_a_step_is_split_does_not_matter(tmp_path: Path) -> None:
    """8x1, 2x4 and 1x8 end in the same weights, though rows differ in length and in trained tokens."""
    whole = trained(make_loop(tmp_path / "a", 8, 1))
    for batch_size, grad_accum in ((2, 4), (1, 8)):
        split = trained(make_loop(tmp_path / f"b{batch_size}", batch_size, grad_accum))
        for name, value in whole.items():
            torch.testing.assert_close(split[name], value, atol=1e-6, rtol=0)


def test_stopped_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    """Also with dropout, whose masks depend on the step's number alone."""
    straight = trained(make_loop(tmp_path / "straight", 4, 2, dropout=0.2))
    first = make_loop(tmp_path / "stopped", 4, 2, dropout=0.2)
    drawn, learnt, seen = first.source, first.loss, list[int]()

    def objective(lm: torch.nn.Module, batch: PackedBatch) -> LossOutput:
        seen.append(len(batch.rows))
        first.stop.requested |= len(seen) == 5  # the first half of step 3
        return learnt(lm, batch)

    first.loss = objective
    with pytest.raises(Stopped, match="after step 3 of 6"):
        first.fit(0)
    again = make_loop(tmp_path / "stopped", 4, 2, dropout=0.2)
    checkpoint, damaged = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 3 and not damaged
    restore(checkpoint, again.module, again.optimizer.optimizer)  # type: ignore[attr-defined]
    again.state = TrainState.from_dict(checkpoint.state)
    resumed = trained(again, checkpoint.step)
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    assert again.state.seen == sum(batch.size for step in range(STEPS) for update in drawn(step) for batch in update.batches)


def test_the_step_divides_by_its_tokens(tmp_path: Path) -> None:
    """One step of plain SGD, by hand: the mean over all trained tokens of the step, not a mean of means."""
    loop = make_loop(tmp_path, 1, 4)
    seen: list[float] = []
    loop.optimizer.optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(_norm(loop.module)))  # type: ignore[attr-defined]
    batches = [batch for update in loop.source(0) for batch in update.batches]
    loop.module.eval()
    total = sum((token_loss(loop.module(b), b.weight).total for b in batches), torch.zeros(()))
    grads = torch.autograd.grad(
        total / sum(b.loss_denominator for b in batches), [p for p in loop.module.parameters() if p.requires_grad]
    )
    expected = torch.stack([g.norm() for g in grads]).norm()
    loop.config = LoopConfig(1, 0, 1, None, None, 2, 1e-3, "constant", None, seed=5)
    loop.fit(0)
    assert seen[0] == pytest.approx(float(expected), rel=1e-5)


def _norm(module: torch.nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())


def test_a_loss_that_is_not_finite_never_steps(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 4, 1)
    before = gather_weights(loop.module)
    fine = loop.loss
    loop.loss = lambda lm, batch: type(out := fine(lm, batch))(out.total * float("nan"), out.metrics)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"step 1: .* not finite.*Rows"):
        loop.fit(0)
    assert all(torch.equal(before[name], value) for name, value in gather_weights(loop.module).items())
    assert not (tmp_path / "checkpoints").exists()


def before_each_step(loop: Loop, look: Any) -> list[Any]:
    """A growing list of what `look()` gives before every step of the optimizer, when its gradients are complete."""
    seen: list[Any] = []
    loop.optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(look()))  # type: ignore[attr-defined]
    return seen


def test_every_micro_batch_of_every_step_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    """The same ones in another run; torch's, numpy's and Python's."""

    def drawn(name: str) -> list[tuple[float, float, float]]:
        loop, seen = make_loop(tmp_path / name, 4, 3), list[tuple[float, float, float]]()
        learnt = loop.loss

        def loss(lm: torch.nn.Module, batch: PackedBatch) -> LossOutput:
            seen.append((float(torch.rand(())), float(np.random.rand()), random.random()))
            return learnt(lm, batch)

        loop.loss = loss
        loop.fit(0)
        return seen

    first = drawn("a")
    assert len(first) == 3 * STEPS and all(len(set(numbers)) == len(first) for numbers in zip(*first, strict=True))
    assert drawn("b") == first


def test_the_rate_of_each_step_and_of_b(tmp_path: Path) -> None:
    """1e-3 after two steps of warm-up, then linear to zero; LoRA+ has B learn at 16 times that."""
    loop = make_loop(tmp_path, 4, 1, b_ratio=16.0)
    names = {id(p): name for name, p in loop.module.named_parameters()}
    rates = before_each_step(
        loop,
        lambda: {
            names[id(p)].split(".lora_")[1][0]: group["lr"] for group in loop.optimizer.param_groups for p in group["params"]
        },
    )
    loop.fit(0)
    expected = [0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [rate["A"] for rate in rates] == pytest.approx(expected)
    assert [rate["B"] for rate in rates] == pytest.approx([16 * rate for rate in expected])
    logged = [json.loads(line)["train/lr"] for line in (tmp_path / "metrics.jsonl").open()]
    assert logged == pytest.approx(expected)


def test_b_moves_as_its_ratio_says(tmp_path: Path) -> None:
    """AdamW's first step is the rate itself, whatever the gradient: B moves 16 times as far as A."""
    loop = make_loop(tmp_path, 8, 1, b_ratio=16.0)
    loop.config = replace(loop.config, num_steps=1, warmup_steps=0, schedule="constant")
    for group in loop.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = gather_weights(loop.module)
    after = trained(loop)
    moved = {half: max(float((after[n] - before[n]).abs().max()) for n in after if f".lora_{half}." in n) for half in "AB"}
    assert moved["A"] < 1e-9, "B is zero, so A has no gradient yet"
    assert moved["B"] == pytest.approx(16e-3, rel=1e-2)


def test_gradients_are_clipped_to_their_norm_and_logged_as_they_were(tmp_path: Path) -> None:
    norms = {}
    for limit in (0.01, None):
        loop = make_loop(tmp_path / str(limit), 4, 2)
        loop.config = replace(loop.config, num_steps=1, max_grad_norm=limit)
        seen = before_each_step(loop, lambda loop=loop: _norm(loop.module))
        loop.fit(0)
        (line,) = [json.loads(line) for line in (tmp_path / str(limit) / "metrics.jsonl").open()]
        norms[limit] = seen[0], line["train/grad_norm"]
    assert norms[0.01][0] == pytest.approx(0.01, rel=1e-3)
    assert norms[None][0] > 0.1 and norms[0.01][1] == norms[None][1] == pytest.approx(norms[None][0], rel=1e-5)


class Pull:
    """A method whose penalty is half the square of all that is trained, and which notes when it is called."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.done, self.had_gradients = list[int](), list[bool]()

    def penalty(self) -> torch.Tensor:
        return 0.5 * torch.stack([(p**2).sum() for p in self.params]).sum()

    def after_step(self, done: int) -> None:
        self.done.append(done)
        self.had_gradients.append(all(p.grad is not None for p in self.params))

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        pass


def test_a_methods_penalty_is_a_part_of_the_gradient(tmp_path: Path) -> None:
    """Its gradient is the weights themselves."""
    gradients = {}
    for name in ("without", "with"):
        loop = make_loop(tmp_path / name, 4, 2)
        loop.config = replace(loop.config, max_grad_norm=None)
        loop.callback = Pull(loop.module) if name == "with" else None
        seen = before_each_step(
            loop, lambda loop=loop: {n: p.grad.clone() for n, p in loop.module.named_parameters() if p.grad is not None}
        )
        before = gather_weights(loop.module)
        loop.fit(0)
        gradients[name] = seen[0]
    for name, weight in before.items():
        torch.testing.assert_close(gradients["with"][name] - gradients["without"][name], weight, atol=1e-6, rtol=0)
    assert isinstance(loop.callback, Pull) and loop.callback.done == [1, 2, 3, 4, 5, 6] and all(loop.callback.had_gradients)
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").open()]
    half = 0.5 * sum(float((weight**2).sum()) for weight in before.values())
    assert lines[0]["train/penalty"] == pytest.approx(half, rel=1e-5) and "train/penalty" not in _lines(tmp_path / "without")[0]


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_a_batch_that_counts_for_nothing_changes_nothing(tmp_path: Path) -> None:
    """As one process has it that ran out of rows before the others."""
    plain, padded = make_loop(tmp_path / "plain", 4, 1), make_loop(tmp_path / "padded", 4, 1)
    source, other = padded.source, pack(make_examples(), [7, 9])

    def with_silence(step: int) -> list[Update[PackedBatch]]:
        return [Update([*update.batches, zero_weight(other)]) for update in source(step)]

    padded.source = with_silence
    first, second = trained(plain), trained(padded)
    assert all(torch.equal(first[name], value) for name, value in second.items())
    timeless = [{k: v for k, v in line.items() if "per_second" not in k} for line in _lines(tmp_path / "plain")]
    assert timeless == [{k: v for k, v in line.items() if "per_second" not in k} for line in _lines(tmp_path / "padded")]


def test_dropout_is_on_in_training_whatever_an_evaluation_has_left(tmp_path: Path) -> None:
    loop, modes = make_loop(tmp_path, 4, 2), list[bool]()
    learnt = loop.loss

    def loss(lm: torch.nn.Module, batch: PackedBatch) -> LossOutput:
        modes.append(lm.training)
        return learnt(lm, batch)

    def measured(done: int) -> dict[str, float]:
        loop.module.eval()
        return {"eval/loss": 1.0}

    loop.loss, loop.evaluate = loss, measured
    loop.config = replace(loop.config, num_steps=3, eval_steps=1)
    loop.fit(0)
    assert modes == [True] * 6


def test_a_step_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which Python asks for a number of a tensor is counted, in a step that is not logged (simulated: on a CPU)."""
    loop, asked = make_loop(tmp_path / "run", 4, 2), list[str]()
    loop._step(0)  # what is made once
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
        own = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *given, _own=own, _name=name: asked.append(_name) or _own(self, *given))
    to = Tensor.to

    def counted(self: Tensor, *given: Any, **options: Any) -> Tensor:
        if "cpu" in [each for each in given if isinstance(each, str)]:  # by name: the device of this run is a CPU too
            asked.append("to")
        return to(self, *given, **options)

    monkeypatch.setattr(Tensor, "to", counted)
    loop._step(1)
    assert asked == ["tolist"]


def test_out_of_memory_in_the_optimizer_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be half changed: the run ends, with the checkpoint before; its moments were there before the first step."""
    loop = make_loop(tmp_path, 4, 1, save_steps=1)
    own, steps = loop.optimizer.step, []

    def step() -> None:
        steps.append(len(loop.optimizer.state))
        if len(steps) == 3:
            raise RuntimeError("CUDA error: out of memory")
        own()

    monkeypatch.setattr(loop.optimizer, "step", step)
    with pytest.raises(RunError, match=r"^step 3: out of memory while weights were changed.*goes on from the last checkpoint$"):
        loop.fit(0)
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 2
    assert steps == [len(trainable(loop.module))] * 3 and steps[0] > 0


def test_what_is_made_of_weights_is_made_once_a_step(tmp_path: Path) -> None:
    """Of its micro-batches all, and anew after every change of weights."""
    loop = make_loop(tmp_path, 2, 4)
    weight = next(p for p in loop.module.parameters() if p.requires_grad)
    made, learnt = list[float](), loop.loss

    def sums(weights: Sequence[Tensor]) -> float:
        made.append(float(weights[0].detach().double().sum()))
        return made[-1]

    def objective(lm: nn.Module, batch: PackedBatch) -> LossOutput:
        assert made_once(sums, [weight]) == float(weight.detach().double().sum())
        return learnt(lm, batch)

    loop.loss = objective
    trained(loop)
    assert len(made) == STEPS and len(set(made)) == STEPS
