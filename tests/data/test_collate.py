"""Batches laid out by hand, and the order of a run."""

import numpy as np
import pytest

from posttrain.batch import Segment
from posttrain.data.collate import BatchSampler, other_prompt, pack, pack_labelled, pack_mismatched, pack_pairs, zero_weight
from posttrain.data.example_store import Store, load
from posttrain.data.examples import build, by_row, group, join
from posttrain.data.overlaps import rows_of

CONVERSATIONS = build([([5, 6, 7, 8], [0, 0, 1, 1], 1), ([9, 10], [0, 1], 2), ([11, 12, 13], [1, 0, 0.5], 3)])


def test_pack_documents() -> None:
    batch = pack(CONVERSATIONS, [0, 2])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 11, 12, 13]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.segments == (Segment(0, 4), Segment(4, 7))
    # token 11 opens its document: nothing predicts it, whatever its weight
    assert batch.logit_index.tolist() == [1, 2, 5]
    assert batch.target.tolist() == [7, 8, 13]
    assert batch.weight.tolist() == [1, 1, 0.5]
    assert batch.sequence_id.tolist() == [0, 0, 1]
    assert batch.eos_index.tolist() == [3, 6]
    assert (batch.rows, batch.loss_denominator, batch.num_answers) == ((0, 2), 2.5, 2)


def test_examples_of_a_row_share_what_they_begin_with() -> None:
    """Turns of one row, thoughts (9) of earlier ones gone in later ones: the last example whole, of the others what differs."""
    rows: list[tuple[list[int], list[float], int]] = [
        ([1, 2, 9, 3], [0, 0, 1, 1], 5),
        ([1, 2, 3, 4, 9, 5], [0, 0, 0, 0, 1, 1], 5),
        ([1, 2, 3, 4, 5, 6, 9, 7], [0, 0, 0, 0, 0, 0, 1, 1], 5),
        ([1, 2, 3], [0, 0, 1], 6),
    ]
    found = by_row(build(rows), 100)
    assert found.units.tolist() == [0, 3, 4] and found.shared.tolist() == [2, 4, 0, 0] and found.unit_tokens().tolist() == [12, 3]
    batch = pack(found, [1, 0])
    assert batch.tokens.tolist() == [[1, 2, 3, 1, 2, 3, 4, 5, 6, 9, 7, 9, 3, 9, 5]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5]]
    assert batch.segments == (Segment(0, 3), Segment(3, 11), Segment(11, 13, 3, 5), Segment(13, 15, 3, 7))
    assert batch.logit_index.tolist() == [1, 8, 9, 4, 11, 6, 13] and batch.target.tolist() == [3, 9, 7, 9, 3, 9, 5]
    assert batch.eos_index.tolist() == [2, 10, 12, 14] and batch.sequence_id.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert (batch.rows, batch.loss_denominator, batch.num_answers) == ((3, 2), 7, 4)
    first, second = batch.split()
    assert (first.size, second.size) == (3, 12) and second.segments[1] == Segment(8, 10, 0, 2)
    # tokens that all begin with, but that count in one of them, are not shared
    learnt = by_row(build([([1, 2, 3], [0, 1, 1], 5), ([1, 2, 3, 4], [0, 0, 0, 1], 5)]), 100)
    assert learnt.shared.tolist() == [1, 0]


def test_no_more_examples_of_a_row_make_a_unit_than_fit() -> None:
    rows = [([1, *range(2, n), 9], [0.0] * (n - 1) + [1.0], 5) for n in (4, 6, 8)]
    for most, units, tokens in ((10, [0, 3], [10]), (9, [0, 1, 3], [4, 9]), (8, [0, 2, 3], [7, 8]), (7, [0, 2, 3], [7, 8])):
        found = by_row(build(rows), most)
        assert (found.units.tolist(), found.unit_tokens().tolist()) == (units, tokens)
    whole = join([by_row(build(rows), 100), CONVERSATIONS])
    assert whole.unit_tokens().tolist() == [10, 4, 2, 3] and whole.shared.tolist() == [3, 5, 0, 0, 0, 0]
    assert by_row(build([]), 10).units.tolist() == [0]


def test_an_answer_ends_with_its_last_token_that_counts() -> None:
    """What a template puts after the end of turn does not."""
    documents = pack(build([([5, 6, 7, 8], [0, 1, 1, 0], 1), ([9, 10, 11], [0, 1, 1], 2)]), [0, 1])
    assert documents.eos_index.tolist() == [2, 6]
    pairs = pack_pairs(build([([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 1, 0], 8)], [(2, 5)]), [0])
    assert pairs.eos_index.tolist() == [3, 5]


def test_an_empty_micro_batch_is_a_batch_that_counts_for_nothing() -> None:
    batch = pack(CONVERSATIONS, [0, 2])
    silent = zero_weight(batch)
    assert silent.loss_denominator == 0.0 and silent.tokens.tolist() == batch.tokens.tolist()


def test_packing_leaves_the_examples_as_they_were() -> None:
    before = np.array(CONVERSATIONS.weights)
    pack(CONVERSATIONS, [2])
    assert np.array_equal(before, np.array(CONVERSATIONS.weights))


def test_pack_pairs_shares_the_prompt() -> None:
    # prompt 1 2, chosen 3 4, rejected 5 6 7 (6 untrained)
    pairs = build([([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 1, 0, 1], 8)], [(2, 4)])
    batch = pack_pairs(pairs, [0])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.segments == (Segment(0, 2), Segment(2, 4, 0, 2), Segment(4, 7, 0, 2))
    # both answers' first tokens are predicted by the prompt's last
    assert batch.logit_index.tolist() == [1, 2, 1, 5]
    assert batch.target.tolist() == [3, 4, 5, 7]
    assert batch.sequence_id.tolist() == [0, 0, 1, 1]
    assert (batch.num_answers, batch.loss_denominator) == (2, 1.0)


def test_pairs_count_by_their_weights() -> None:
    rows = [([1, 2, 3, 4], [0.0, 0.0, 1.0, 1.0], number) for number in range(3)]
    pairs = join([build(rows[:2], 2 * [(2, 3)], None, [0.25, 3.0]), build(rows[2:], [(2, 3)])])
    batch = pack_pairs(pairs, [2, 0, 1])
    assert batch.extra["pair_weight"].tolist() == [1.0, 0.25, 3.0] and batch.loss_denominator == 4.25
    assert batch.weight.tolist() == 6 * [1.0]  # the tokens' own are left alone


def test_group_fills_units_without_cutting() -> None:
    lengths = [5, 3, 7, 2, 4, 6]
    pieces = build([([i] * n, [1.0] * n, i) for i, n in enumerate(lengths)])
    packed = group(pieces, 9)
    assert sum(packed.unit_tokens()) == sum(lengths) and max(packed.unit_tokens()) <= 9
    assert len(packed) == 3  # 27 tokens fill three units of nine
    seen = sorted(int(packed.sequence(i)[0][0]) for u in range(len(packed)) for i in packed.sequences(u))
    assert seen == list(range(6))


def test_examples_survive_the_disk(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pairs = build([([1, 2, 3, 4], [0, 0, 1, 1], 8)], [(1, 3)], [0.5], [2.0])
    store = Store(tmp_path / "x")
    for piece in (CONVERSATIONS, CONVERSATIONS):
        store.add("train", piece, rows_of([(1, -5), (2, 7)]))
    store.add("held_out", pairs, rows_of([]))
    store.close({"rows": 3})
    parts, read, report, _ = load(tmp_path / "x")
    assert read["train"].tolist() == 2 * [[1, -5], [2, 7]] and read["held_out"].tolist() == []
    assert report == {"rows": 3} and [p.name for p in tmp_path.iterdir()] == ["x"]
    for name in vars(pairs):
        assert np.array_equal(getattr(parts["held_out"], name), getattr(pairs, name)), name
    # piece after piece is as all at once, and as joined without a copy
    for twice in (parts["train"], join([CONVERSATIONS, CONVERSATIONS])):
        assert twice.num_tokens == 18 and len(twice) == 6
        assert [twice.sequence(i)[0].tolist() for i in range(6)] == 2 * [CONVERSATIONS.sequence(i)[0].tolist() for i in range(3)]
        assert [list(twice.sequences(u)) for u in range(6)] == [[i] for i in range(6)]
        assert pack(twice, [3, 5]).tokens.tolist() == [[5, 6, 7, 8, 11, 12, 13]]


def order(batch_size: int, grad_accum: int, world_size: int = 1, total: int = 20) -> BatchSampler:
    return BatchSampler.shuffled(10, batch_size, grad_accum, world_size, seed=3, total_units=total)


def test_every_epoch_draws_every_unit_once() -> None:
    drawn = [unit for step in range(order(4, 1).num_steps) for unit in order(4, 1).step(step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_step_is_the_same_units_however_it_is_split() -> None:
    whole = order(8, 1).step(1)
    assert [u for micro in order(1, 8).micro(1, 0) for u in micro] == whole
    by_rank = [order(2, 2, 2).micro(1, rank) for rank in (0, 1)]
    assert [u for m in range(2) for rank in (0, 1) for u in by_rank[rank][m]] == whole


def test_the_last_step_takes_what_is_left() -> None:
    assert order(8, 1).num_steps == 3
    assert len(order(8, 1).step(2)) == 4
    # 4 units over two processes with batches of 3: one has three, the other one
    assert [len(m) for r in (0, 1) for m in order(3, 2, 2, total=16).micro(1, r)] == [3, 1]
    # 1 unit left: the second process has an empty micro-batch, not a missing one
    assert order(3, 2, 2, total=13).micro(1, 1) == [[]]


# prompts 1 2, 1 2 and 3; the last answer is the longest
LABELLED = build(
    [([1, 2, 7], [0, 0, 1], 1), ([1, 2, 8, 9], [0, 0, 1, 1], 1), ([3, 4, 5, 6, 7, 8], [0, 1, 1, 1, 1, 1], 2)],
    splits=[(2, 3), (2, 4), (1, 6)],
    margins=[1.0, -1.0, 1.0],
    pair_weights=[1.0, 2.0, 0.5],
)


def test_labelled_answers_and_their_prompts_with_the_answers_of_others() -> None:
    own = pack_labelled(LABELLED, [2, 0])
    assert own.tokens.tolist() == [[3, 4, 5, 6, 7, 8, 1, 2, 7]] and own.target.tolist() == [4, 5, 6, 7, 8, 7]
    assert own.extra["margin"].tolist() == [1.0, 1.0] and (own.num_answers, own.loss_denominator) == (2, 1.5)
    other = pack_mismatched(LABELLED, [0, 1, 2])
    # neighbours with the same prompt are no others; an answer is cut where it would be longer than the longest unit
    assert [other_prompt(LABELLED, unit) for unit in range(3)] == [2, 2, 0]
    assert other.tokens.tolist() == [[1, 2, 4, 5, 6, 7, 1, 2, 4, 5, 6, 7, 3, 7]]
    assert other.sequence_id.tolist() == [0] * 4 + [1] * 4 + [2] and other.rows == (0, 1, 2)
    assert other.extra["pair_weight"].tolist() == [1.0, 2.0, 0.5]


def test_one_prompt_alone_has_no_other() -> None:
    with pytest.raises(LookupError):
        other_prompt(build([([1, 2, 7], [0, 0, 1], 1), ([1, 2, 8], [0, 0, 1], 1)], splits=[(2, 3), (2, 3)]), 0)
