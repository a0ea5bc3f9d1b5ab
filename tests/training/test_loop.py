"""The loop's invariants on a small random model: how a step is split, and where it stops, must not change a weight."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import BatchSampler, pack
from posttrain.data.examples import Examples, build
from posttrain.errors import RunError, Stopped
from posttrain.losses.tokens import token_loss
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.training.checkpoint import gather_weights, newest_checkpoint, restore
from posttrain.training.loop import Loop, LoopConfig
from posttrain.training.objective import Update
from posttrain.training.optimizer import make_optimizer
from posttrain.training.signals import StopSignal
from posttrain.training.state import TrainState
from posttrain.training.tracking import Tracker

STEPS = 6


def make_examples() -> Examples:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(48):
        length = int(torch.randint(4, 20, (1,), generator=generator))
        tokens = torch.randint(0, 64, (length,), generator=generator).tolist()
        weights = [float(i >= length // 3) for i in range(length)]
        rows.append((tokens, weights, number))
    return build(rows)


def make_loop(folder: Path, batch_size: int, grad_accum: int, dropout: float = 0.0, save_steps: int | None = None) -> Loop:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    lora = Lora(method="lora", r=4, alpha=8, dropout=dropout, targets="all-linear", dtype="float32", lr_factor=1)
    model = add_method(LlamaForCausalLM(config), lora)
    module = PackedLM(model, "documents")
    accelerator = Accelerator(cpu=True)
    optimizer, _ = make_optimizer("adamw", module, lambda name: 1.0, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01)
    module, optimizer = accelerator.prepare(module, optimizer)
    examples = make_examples()
    order = BatchSampler.shuffled(len(examples), batch_size, grad_accum, 1, seed=5, total_units=STEPS * batch_size * grad_accum)
    loop_config = LoopConfig(STEPS, 2, 1, None, save_steps, 2, 1e-3, "linear", 1.0, seed=5)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder / "metrics.jsonl", accelerator, "none", {})
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
        evaluate=lambda step: {},
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
