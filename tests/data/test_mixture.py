"""Shares of tokens, exact to a batch at every moment; passes, ends and the report of a mixture."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.config.compose import compose_run, validate
from posttrain.data.chat.encoder import Encoder
from posttrain.data.collate import BatchSampler
from posttrain.data.mixture import auto_alpha, draw_units, make_sampler, read_mixture, seen, shares_of
from posttrain.data.queues import Curriculum
from posttrain.stages.spec import row_uses

RNG = np.random.default_rng(0)
SIZES = [RNG.integers(1, 900, 300), RNG.integers(1, 400, 500), RNG.integers(300, 1000, 40)]
SHARES = [0.3, 0.5, 0.2]
STARTS = np.cumsum([0, *map(len, SIZES)])


def by_source(drawn: np.ndarray) -> list[np.ndarray]:
    return [drawn[(drawn >= a) & (drawn < b)] - a for a, b in itertools.pairwise(STARTS)]


def test_shares_of_tokens_hold_to_a_unit_at_every_moment() -> None:
    drawn = draw_units(SIZES, SHARES, 7, 2000, None, "repeat")
    assert len(drawn) == 2000
    tokens = np.concatenate(SIZES)[drawn]
    source = np.searchsorted(STARTS, drawn, side="right") - 1
    for s, share in enumerate(SHARES):
        off = np.cumsum(np.where(source == s, tokens, 0)) - share * np.cumsum(tokens)
        assert np.abs(off).max() <= 1000  # the largest unit; a batch holds several
    # rows are not shares: the sources' units differ in length
    assert abs((source == 0).mean() - 0.3) > 0.03


def test_the_same_seed_gives_the_same_draws_and_a_longer_run_begins_as_a_shorter_one() -> None:
    long, short = (draw_units(SIZES, SHARES, 7, n, None, "repeat") for n in (900, 400))
    assert np.array_equal(long[:400], short)
    assert not np.array_equal(draw_units(SIZES, SHARES, 8, 400, None, "repeat"), short)


def test_every_pass_of_every_source_draws_every_unit_once() -> None:
    for s, units in enumerate(by_source(draw_units(SIZES, SHARES, 7, 3000, None, "repeat"))):
        for start in range(0, len(units) - len(SIZES[s]) + 1, len(SIZES[s])):
            assert sorted(units[start : start + len(SIZES[s])]) == list(range(len(SIZES[s])))


def test_epochs_are_passes_over_the_first_source() -> None:
    drawn = draw_units(SIZES, SHARES, 7, None, 600, "repeat")
    assert len(by_source(drawn)[0]) == 600
    found = seen(drawn, SIZES)
    assert found[0]["passes"] == 2.0 and len(found[0]["share_by_epoch"]) == 2
    for figures, share in zip(found, SHARES, strict=True):
        assert figures["share_seen"] == pytest.approx(share, abs=0.005)
        assert figures["share_by_epoch"] == pytest.approx([share, share], abs=0.01)
    assert sum(figures["tokens_seen"] for figures in found) == np.concatenate(SIZES)[drawn].sum()


@pytest.mark.parametrize(
    ("alpha", "names"),
    [("0.5", {"code.jsonl": "domain: ", "web/a.jsonl": "general: ", "web/b.jsonl": "general: "}), ("null", {"code.jsonl": ""})],
)
def test_every_sequence_has_the_name_of_its_row(alpha: str, names: dict[str, str], tmp_path: Path, make_tokenizer: Any) -> None:
    """Its source, its file, and its number there; documents lie in another order than they were read in."""
    (tmp_path / "web").mkdir()
    expected = {}
    for file in ("code.jsonl", "web/a.jsonl", "web/b.jsonl"):
        texts = [f"{file} {k} " + "word " * (k * 7 % 5) for k in range(9)]
        (tmp_path / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if file in names:
            expected |= {f"{names[file]}{tmp_path / file}, row {k}": text for k, text in enumerate(texts, 1)}
    words = [f"data.path={tmp_path}/code.jsonl", f"data.general.path={tmp_path}/web", "data.eval_share=0", f"data.alpha={alpha}"]
    tokenizer = make_tokenizer(None)
    mixture = read_mixture(
        validate(compose_run("cpt", words)).data, row_uses()["cpt"], Encoder(tokenizer), 64, tmp_path / "cache"
    )
    sequences = range(len(mixture.train.rows))
    assert {mixture.where(i): tokenizer.decode(mixture.train.sequence(i)[0][:-1]) for i in sequences} == expected


def test_alpha_is_the_domains_share(tmp_path: Path, make_tokenizer: Any) -> None:
    """Said, drawn, and written down; the domain comes first."""
    for name in ("code", "web"):
        rows = [{"text": f"{name} {k} " + "word " * (k % 7)} for k in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={tmp_path}/code.jsonl", f"data.general.path={tmp_path}/web.jsonl", "data.eval_share=0", "data.alpha=0.2"]
    cfg = validate(compose_run("cpt", [*words, "train.max_steps=60", "train.batch_size=2", "train.grad_accum=1"]))
    assert shares_of(cfg.data, []) == pytest.approx([0.2, 0.8])
    mixture = read_mixture(cfg.data, row_uses()["cpt"], Encoder(make_tokenizer(None)), 32, tmp_path / "cache")
    domain, general = mixture.record(make_sampler(mixture, cfg.data, cfg.train, 1))
    assert (domain["source"], general["source"]) == (f"{tmp_path}/code.jsonl", f"{tmp_path}/web.jsonl")
    assert (domain["share"], general["share"]) == pytest.approx((0.2, 0.8))
    assert domain["share_seen"] == pytest.approx(0.2, abs=0.02) and general["share_seen"] == pytest.approx(0.8, abs=0.02)


def test_a_source_that_ends_can_end_the_run() -> None:
    drawn = draw_units(SIZES, SHARES, 7, 3000, None, "stop")
    assert [len(units) for units in by_source(drawn)][2] == 40  # the third is short of tokens first
    assert all(len(set(units)) == len(units) for units in by_source(drawn))
    assert len(draw_units(SIZES[:1], [1.0], 7, 1000, None, "stop")) == 300
    assert (
        draw_units(SIZES[:1], [1.0], 7, 650, None, "repeat").tolist()
        == BatchSampler.shuffled(300, 4, 1, 1, 7, 650).drawn.tolist()
    )


def test_processes_share_the_draws_of_a_step() -> None:
    drawn = draw_units(SIZES, SHARES, 7, 500, None, "repeat")
    one, two = BatchSampler(drawn, 8, 2, 1), BatchSampler(drawn, 4, 2, 2)
    for step in range(one.num_steps):
        both = [unit for m in zip(*(two.micro(step, rank) for rank in (0, 1)), strict=True) for units in m for unit in units]
        assert both == [unit for units in one.micro(step, 0) for unit in units] == drawn[step * 16 : step * 16 + 16].tolist()


def test_steps_that_draw_something_new() -> None:
    assert BatchSampler(np.array([0, 1, 1, 0, 2, 0]), 2, 1, 1).first_seen() == [0, 2]


@pytest.mark.parametrize(("size", "alpha"), [(1e3, 0.1), (1e9, 0.3), (10**9.5, 0.4), (1e10, 0.5), (1e11, 0.8), (1e13, 0.8)])
def test_auto_alpha(size: float, alpha: float) -> None:
    assert auto_alpha(size) == pytest.approx(alpha, abs=1e-3)


def test_a_curriculum_within_a_mixture_keeps_the_shares() -> None:
    difficulty = np.concatenate(SIZES).astype(float)
    drawn = draw_units(SIZES, SHARES, 7, 1500, None, "repeat", Curriculum(difficulty, 2.0, 0.0))
    assert [f["share_seen"] for f in seen(drawn, SIZES)] == pytest.approx(SHARES, abs=0.005)
    assert np.array_equal(drawn, draw_units(SIZES, SHARES, 7, 1500, None, "repeat", Curriculum(difficulty, 2.0, 0.0)))
    every = draw_units(SIZES, SHARES, 7, 1500, None, "repeat", Curriculum(difficulty, 2.0, 0.0, every_row=True))
    assert [f["share_seen"] for f in seen(every, SIZES)] == pytest.approx(SHARES, abs=0.005)
    assert len(set(by_source(every)[1][:500])) == 500  # a pass leaves nothing out
