"""What must not reach the weights does not, and what was done about it is on record."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_loop import make_examples, make_loop, trained
from torch import Tensor, nn

from posttrain.batch import ImageBatch, ImagePart, LossOutput, PackedBatch
from posttrain.data.collate import Group, pack, pack_answers, pack_pairs
from posttrain.data.examples import build
from posttrain.errors import RunError, Stopped
from posttrain.training.checkpoint import newest_checkpoint, trainable
from posttrain.training.guard import LEFT_OUT, GuardConfig, Spike, check_update, spike_limit
from posttrain.training.loop import Loop
from posttrain.training.state import TrainState


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """As they are now."""
    return {name: p.detach().clone() for name, p in trainable(module).items()}


def spoil(loop: Loop, wrong: Callable[[int, LossOutput], LossOutput]) -> list[int]:
    """Let `wrong` change the output of every micro-batch, by its number from 0; returns a growing list of those."""
    fine, seen = loop.loss, list[int]()

    def objective(lm: nn.Module, batch: Any) -> LossOutput:
        seen.append(len(seen))
        return wrong(seen[-1], fine(lm, batch))

    loop.loss = objective
    return seen


def times(factor: float) -> Callable[[LossOutput], LossOutput]:
    return lambda out: replace(out, total=out.total * factor)


def drawn_rows(loop: Loop, step: int) -> list[str]:
    return [loop.where(row) for update in loop.source(step) for batch in update.batches for row in batch.rows]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_rows_of_a_batch_that_is_not_finite_are_written_down(bad: float, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 4, 2, save_steps=1)
    loop.where = lambda row: f"file, row {row}"
    spoil(loop, lambda i, out: times(bad)(out) if i == 5 else out)  # in step 3
    with pytest.raises(RunError, match=r"step 3: loss or gradient is not finite .*train.skip_nonfinite=1") as found:
        loop.fit(0)
    assert f"Rows of the batch: {'; '.join(drawn_rows(loop, 2)[:4])}; and 4 more (all" in str(found.value)
    (entry,) = json.loads((tmp_path / LEFT_OUT).read_text())
    assert entry["step"] == 3 and entry["rows"] == drawn_rows(loop, 2) and len(entry["rows"]) == 8
    checkpoint, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 2 and not damaged
    assert all(value.isfinite().all() for value in (*checkpoint.weights.values(), *checkpoint.optimizer.values()))


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_seen(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 4, 1)
    spoil(loop, lambda i, out: replace(out, total=out.total + torch.tensor(float("inf"))))
    with pytest.raises(RunError, match="loss inf"):
        loop.fit(0)


def test_as_many_as_allowed_are_left_out(tmp_path: Path) -> None:
    """The steps around them are as if the bad ones took no step, and one more than allowed ends the run."""
    loop = make_loop(tmp_path / "two", 4, 1)
    loop.guard = GuardConfig(skip_nonfinite=2)
    spoil(loop, lambda i, out: times(float("nan"))(out) if i in (1, 4) else out)
    loop.fit(0)
    assert [entry["step"] for entry in loop.state.left_out] == [2, 5]
    kept = gather_weights(loop.module)
    reference = make_loop(tmp_path / "none", 4, 1)
    step = reference.optimizer.optimizer.step  # type: ignore[attr-defined]
    calls = list[int]()
    reference.optimizer.optimizer.step = lambda *a, **k: calls.append(1) or (None if len(calls) in (2, 5) else step(*a, **k))  # type: ignore[attr-defined]
    reference.fit(0)
    assert all(torch.equal(kept[name], value) for name, value in gather_weights(reference.module).items())
    one_more = make_loop(tmp_path / "three", 4, 1)
    one_more.guard = GuardConfig(skip_nonfinite=2)
    spoil(one_more, lambda i, out: times(float("nan"))(out) if i in (1, 3, 4) else out)
    with pytest.raises(RunError, match=r"step 5: .*2 such updates were left out before"):
        one_more.fit(0)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 4, 1, save_steps=1)
    seen = spoil(loop, lambda i, out: out)

    def poison(*_: Any) -> None:
        if len(seen) == 3:
            next(p for p in loop.module.parameters() if p.requires_grad).data[0, 0] = float("inf")

    loop.optimizer.optimizer.register_step_post_hook(poison)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match=r"after step 3 .* is not finite; it is not saved"):
        loop.fit(0)
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 2


def test_the_limit_of_a_spike_by_hand() -> None:
    losses = [1.0, 2.0, 3.0, 4.0, 100.0]  # median 3, deviations 2 1 0 1 97: MAD 1
    assert spike_limit(losses, 5.0) == 3.0 + 5.0
    assert spike_limit([2.0] * 9, 10.0) == pytest.approx(2.0 + 10 * 0.002)
    state = TrainState(losses=losses[:4])
    limits = GuardConfig(spike_mads=5.0, spike_steps=4)
    middle = statistics.median(losses[:4])  # 2.5, deviations 1.5 .5 .5 1.5: MAD 1
    assert check_update(limits, state, 5, middle + 5.0, 1.0, []) is None
    assert state.losses == [2.0, 3.0, 4.0, middle + 5.0]
    with pytest.raises(Spike, match="is above"):
        check_update(limits, state, 6, 1000.0, 1.0, [7])


def test_a_spike_goes_back_to_the_last_checkpoint_without_the_data_since(tmp_path: Path) -> None:
    loop = make_loop(tmp_path / "spike", 4, 1, save_steps=2)
    loop.guard = GuardConfig(spike_mads=50.0, spike_steps=3)
    spoil(loop, lambda i, out: times(100.0)(out) if i == 3 else out)  # step 4; the checkpoint is of step 2
    loop.fit(0)
    (entry,) = json.loads((tmp_path / "spike" / LEFT_OUT).read_text())
    assert entry["step"] == 4 and entry["back_to"] == 2 and entry["why"] == "spike" and entry["loss"] > entry["limit"]
    # by hand: steps 1, 2, then 5 and 6 on the weights and moments of step 2
    by_hand = make_loop(tmp_path / "hand", 4, 1, save_steps=2)
    source = by_hand.source
    by_hand.source = lambda step: source(step) if step not in (2, 3) else []
    by_hand.fit(0)
    expected = gather_weights(by_hand.module)
    assert all(torch.equal(expected[name], value) for name, value in gather_weights(loop.module).items())


def out_of_memory_above(loop: Loop, rows: int) -> None:
    """As a device would that has room for so many rows."""
    fine = loop.loss

    def objective(lm: nn.Module, batch: Any) -> LossOutput:
        if len(batch.rows) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return fine(lm, batch)

    loop.loss = objective


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").open()]


def test_out_of_memory_halves_the_micro_batch_and_is_the_same_run(tmp_path: Path) -> None:
    whole = trained(make_loop(tmp_path / "whole", 8, 1))
    loop = make_loop(tmp_path / "split", 8, 1)
    out_of_memory_above(loop, 3)
    split = trained(loop)
    assert loop.state.halved == [1, 1]  # 8 -> 4 -> 2
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, atol=1e-6, rtol=0)


def test_halves_are_kept_on_resume_bit_for_bit(tmp_path: Path) -> None:
    straight = make_loop(tmp_path / "straight", 8, 1, dropout=0.2)
    out_of_memory_above(straight, 4)
    expected = trained(straight)
    first = make_loop(tmp_path / "stopped", 8, 1, dropout=0.2)
    out_of_memory_above(first, 4)
    first.stop_after = 3
    with pytest.raises(Stopped, match="after step 3 of 6"):
        first.fit(0)
    again = make_loop(tmp_path / "stopped", 8, 1, dropout=0.2)  # with all memory in the world
    checkpoint, _ = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint
    again.restore(checkpoint)
    again.state = TrainState.from_dict(checkpoint.state)
    resumed = trained(again, checkpoint.step)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_what_cannot_be_halved_is_out_of_memory(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 2, 2)
    out_of_memory_above(loop, 0)
    with pytest.raises(torch.OutOfMemoryError):
        loop.fit(0)


def test_metrics_of_a_window_survive_a_stop(tmp_path: Path) -> None:
    """The average that is logged after a resume is over all steps since the last one that was logged."""
    straight = make_loop(tmp_path / "straight", 4, 2)
    straight.config = replace(straight.config, log_steps=4)
    straight.fit(0)
    first = make_loop(tmp_path / "stopped", 4, 2)
    first.config, first.stop_after = straight.config, 3
    with pytest.raises(Stopped):
        first.fit(0)
    again = make_loop(tmp_path / "stopped", 4, 2)
    again.config = straight.config
    checkpoint, _ = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert checkpoint
    again.restore(checkpoint)
    again.state = TrainState.from_dict(checkpoint.state)
    again.fit(3)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    assert again.state.drawn == straight.state.drawn


def test_a_signal_while_measuring_leaves_at_once_and_the_measurement_is_made_up_for(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, 4, 1)
    loop.config = replace(loop.config, eval_steps=3)
    made = list[int]()

    def interrupted(done: int) -> dict[str, float]:
        loop.stop._note(15, None)
        raise AssertionError("the signal was not obeyed")

    loop.evaluate = interrupted
    with pytest.raises(Stopped, match="after step 3 of 6, saved"):
        loop.fit(0)
    again = make_loop(tmp_path, 4, 1)
    again.config = loop.config
    again.evaluate = lambda done: made.append(done) or {"eval/loss": 1.0}
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 3
    again.restore(checkpoint)
    again.state = TrainState.from_dict(checkpoint.state)
    again.fit(3)
    assert made == [3]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [3]


def test_a_signal_while_a_step_is_drawn_leaves_before_it(tmp_path: Path) -> None:
    """A rollout is made again, by the same random numbers."""
    loop = make_loop(tmp_path, 4, 1)
    source = loop.source
    loop.source = lambda step: loop.stop._note(15, None) if step == 2 else source(step)  # type: ignore[return-value]
    with pytest.raises(Stopped, match="after step 2 of 6, saved"):
        loop.fit(0)
    checkpoint, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 2


def by_example(batch: PackedBatch) -> list[list[Any]]:
    """Tokens, positions, and what is predicted where, for each example; without regard to where in a pack it lies."""
    heads = [s.start for s in batch.segments if s.prefix_start == s.prefix_stop] + [batch.size]
    found = []
    for start, stop in pairwise(heads):
        inside = (batch.logit_index >= start) & (batch.logit_index < stop)
        rows: list[Tensor] = [batch.logit_index[inside] - start, batch.target[inside], batch.weight[inside]]
        own = batch.sequence_id[inside]
        ends = batch.eos_index[(batch.eos_index >= start) & (batch.eos_index < stop)] - start
        extra = [batch.extra[name][inside] for name in ("old",) if name in batch.extra]
        tokens = [batch.tokens[0, start:stop], batch.positions[0, start:stop]]
        found.append([each.tolist() for each in [*tokens, *rows, own - own.min(), ends, *extra]])
    return found


def test_halves_hold_what_the_whole_held() -> None:
    examples = make_examples()
    whole = pack(examples, [3, 1, 4, 5, 9])
    halves = whole.split()
    assert [len(half.rows) for half in halves] == [2, 3]
    assert [part for half in halves for part in by_example(half)] == by_example(whole)
    assert sum(half.loss_denominator for half in halves) == pytest.approx(whole.loss_denominator)
    assert pack(examples, [7]).split()[0].rows == (pack(examples, [7]).rows)


def test_halves_of_pairs_keep_answers_with_their_prompts() -> None:
    rows = [([*range(10 * i, 10 * i + 7)], [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0], i) for i in range(3)]
    examples = build(rows, splits=[(2, 4), (2, 5), (2, 4)], margins=[0.1, 0.2, 0.3], pair_weights=[1, 2, 3])
    whole = pack_pairs(examples, [0, 1, 2])
    whole = replace(whole, extra={**whole.extra, "reference": torch.arange(6.0), "old": torch.arange(float(len(whole.target)))})
    first, second = whole.split()
    assert (first.num_answers, second.num_answers) == (2, 4)
    assert second.extra["pair_weight"].tolist() == [2, 3] and first.loss_denominator + second.loss_denominator == pytest.approx(6)
    assert second.extra["reference"].tolist() == [2, 3, 4, 5] and second.extra["margin"].tolist() == pytest.approx([0.2, 0.3])
    assert [part for half in (first, second) for part in by_example(half)] == by_example(whole)
    group = Group(rows[0][0][:2], [(torch.tensor([5, 6]).numpy(), torch.ones(2).numpy())], 0)  # type: ignore[arg-type]
    assert len(pack_answers([group]).split()) == 1


def test_halves_of_pictures_add_up() -> None:
    """Two shapes: three pictures of which two are of the individual, and two of the prior."""

    def part(n: int, side: int, num_instance: int, first: int) -> ImagePart:
        latents, ones = torch.randn(n, 4, side, side), torch.ones(n, 4, 1, 1)
        number = torch.arange(first, first + n)
        return ImagePart(latents, None, None, latents, latents, ones, number, number, torch.ones(n, 6), None, num_instance)

    whole = ImageBatch((part(3, 8, 2, 0), part(2, 4, 0, 3)), (7, 9), 2.0)
    first, second = whole.split()
    assert [each.level.tolist() for half in (first, second) for each in half.parts] == [[0, 1], [2], [3, 4]]
    assert [each.num_instance for half in (first, second) for each in half.parts] == [2, 0, 0]
    assert torch.equal(torch.cat([first.parts[0].noise, second.parts[0].noise]), whole.parts[0].noise)
    assert first.loss_denominator + second.loss_denominator == 2.0 and first.loss_denominator and second.loss_denominator
    assert len(replace(whole, parts=(part(1, 8, 1, 0),)).split()) == 1


def test_what_was_just_saved_is_kept_beside_a_newer_damaged_one(tmp_path: Path) -> None:
    """Retention counts from the step that was just written, whatever else lies there."""
    loop = make_loop(tmp_path, 4, 1, save_steps=1)
    loop.config = replace(loop.config, keep_checkpoints=1)
    newer = tmp_path / "checkpoints" / "step-000900"
    newer.mkdir(parents=True)
    (newer / "checkpoint.json").write_text("{}")
    loop.fit(0)
    checkpoint, damaged = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint and checkpoint.step == 6 and len(damaged) == 1 and "step-000900 is damaged" in damaged[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000900"]


def test_what_a_kill_after_the_last_save_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    """A process that was killed between its save and the deletion of older ones has one more: the run that goes on has not."""
    loop = make_loop(tmp_path, 4, 1, save_steps=1)
    loop.fit(0)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step-000004").mkdir()
    again = make_loop(tmp_path, 4, 1, save_steps=1)
    again.fit(6)
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000005", "step-000006"]
