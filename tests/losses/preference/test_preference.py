"""Any preference loss through its one function: weights, figures, what is refused, and one that an installed package adds."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import posttrain
from posttrain.commands.plan.plan import make_plan
from posttrain.config.choices import PREFERENCE_LOSSES
from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.losses.pairs import Pairs, PreferenceLoss, implicit_rewards, right
from posttrain.losses.preference import chosen_loss

POLICY = torch.tensor([-10.0, -12.0, -5.0, -4.0])  # two pairs: chosen, rejected, chosen, rejected
REFERENCE = torch.tensor([-11.0, -11.0, -5.0, -5.0])  # log-ratios +1, -1 and 0, +1: margins of 2 and -1
PAIRS = Pairs(POLICY, REFERENCE, torch.tensor([2.0, 4.0, 5.0, 2.0]))
LOSSES = """aot aot_unpaired apo_down apo_zero apo_zero_unpaired bco bco_pair cpo discopop exo_pair hinge ipo kto nca_pair
orpo robust sft sigmoid sigmoid_norm simpo sppo_hard""".split()


def means(output: posttrain.batch.LossOutput) -> dict[str, float]:  # type: ignore[name-defined]
    return {name: float(total / count) for name, (total, count) in output.metrics.items()}


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm", "hinge", "robust"])
def test_figures_are_of_implicit_rewards_whatever_the_loss(name: str) -> None:
    output = chosen_loss(name, 0.1, None, None)(PAIRS, torch.ones(2))
    assert means(output) == pytest.approx(
        {
            "loss": float(output.total) / 2,
            "accuracy": 0.5,
            "margin": 0.1 * (2 - 1) / 2,
            "reward_chosen": 0.1 * (1 + 0) / 2,
            "reward_rejected": 0.1 * (-1 + 1) / 2,
            "logp_chosen": -7.5,
            "logp_rejected": -8.0,
        }
    )


def test_before_the_first_step_every_pair_is_a_tie() -> None:
    found = means(chosen_loss("sigmoid", None, None, None)(Pairs(REFERENCE, REFERENCE, PAIRS.lengths), torch.ones(2)))
    assert found["margin"] == 0.0 and found["accuracy"] == 0.5
    assert right(torch.tensor([1.0, -2.0, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_a_pairs_weight_is_of_its_loss_alone() -> None:
    weight = torch.tensor([0.5, 3.0])
    output = chosen_loss("sigmoid", None, None, None)(PAIRS, weight)
    # softplus(-0.2) = 0.598139, softplus(0.1) = 0.744397
    assert output.total.item() == pytest.approx(0.5 * 0.598139 + 3 * 0.744397, abs=1e-5)
    assert output.metrics["loss"][1] == 3.5 and output.metrics["accuracy"][1] == 2.0
    assert float(output.metrics["accuracy"][0]) == 1.0 and float(output.metrics["margin"][0]) == pytest.approx(0.1)


def test_without_a_reference_the_reward_is_beta_log_p() -> None:
    assert implicit_rewards(Pairs(POLICY, None, PAIRS.lengths), 0.5).tolist() == [-5.0, -6.0, -2.5, -2.0]
    assert implicit_rewards(PAIRS, 0.5).tolist() == [0.5, -0.5, 0.0, 0.5]


def test_every_loss_is_named_like_its_file() -> None:
    assert PREFERENCE_LOSSES.names() == LOSSES
    for name, loss in PREFERENCE_LOSSES.all().items():
        assert isinstance(loss, PreferenceLoss) and loss.per_pair.__name__ == name


def test_the_page_has_every_loss_with_its_usual_settings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "preference.md").read_text()
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `") and "arxiv" in line
    ]
    found = {row[0].strip("|` "): (row[3] == "yes", row[4], row[5]) for row in rows}
    expected = {}
    for name, loss in PREFERENCE_LOSSES.all().items():
        beta, smoothing = (f"{loss.beta:g}" if loss.beta else "none"), f"{loss.label_smoothing:g}"
        expected[name] = (loss.needs_reference, beta, smoothing if loss.smooths_labels else "none")
    assert found == expected


def test_the_names_are_known_without_torch() -> None:
    import subprocess

    code = (
        "import sys, posttrain.config.schema; from posttrain.config.choices import PREFERENCE_LOSSES as known; "
        "print(known.names(), [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{LOSSES} []"


def test_what_a_loss_does_not_have_is_refused() -> None:
    for beta, smoothing, options, loss, said in (
        (None, 0.1, None, "ipo", "dpo.label_smoothing: dpo.loss=ipo has none; leave it out"),
        (0.1, None, None, "sft", "dpo.beta: dpo.loss=sft has none; leave it out"),
        (None, None, {"gamma": 1.0}, "sigmoid", "dpo.options.gamma: dpo.loss=sigmoid has no options of its own"),
        (None, None, {"gama": 1.0}, "simpo", "dpo.options.gama: dpo.loss=simpo has gamma - did you mean 'gamma'?"),
        (None, None, {"gamma": "much"}, "simpo", "dpo.options.gamma: 'much' is no number; the usual one is 1"),
        (None, None, None, {"kto": 1, "sft": 1}, "dpo.loss: kto is of answers with labels and sft of pairs; they do not add up"),
        (
            None,
            None,
            None,
            {"kto": 1, "bco": 1},
            "dpo.loss: kto and bco each look at the whole step, and one alone can; take one of them",
        ),
        (None, None, {"tau": 1.0}, {"simpo": 1, "cpo": 1}, "dpo.options.tau: dpo.loss={simpo, cpo} has gamma, alpha"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
            chosen_loss(loss, beta, smoothing, options)  # type: ignore[arg-type]


def test_settings_that_are_left_out_are_the_losses_own_usual_ones() -> None:
    found = {name: chosen_loss(name, None, None, None).line() for name in ("sigmoid", "sigmoid_norm", "simpo", "sft", "robust")}
    of_start = "against the model that the stage starts from"
    assert found == {
        "sigmoid": f"loss sigmoid (beta 0.1, label_smoothing 0), {of_start}",
        "sigmoid_norm": f"loss sigmoid_norm (beta 5, label_smoothing 0), {of_start}",
        "simpo": "loss simpo (beta 2, label_smoothing 0, gamma 1), without a reference",
        "sft": "loss sft, without a reference",
        "robust": f"loss robust (beta 0.1, label_smoothing 0.1), {of_start}",
    }
    both = chosen_loss({"sigmoid_norm": 0.8, "sft": 0.2}, None, None, None)
    assert both.line() == f"loss 0.8 sigmoid_norm (beta 5, label_smoothing 0) + 0.2 sft, {of_start}"


def test_a_sum_is_the_weighted_sum_of_its_losses_each_of_which_is_reported() -> None:
    weight = torch.tensor([0.5, 3.0])
    both = chosen_loss({"ipo": 0.7, "sft": 0.2}, 0.4, None, None)(PAIRS, weight)
    parts = {name: chosen_loss(name, beta, None, None)(PAIRS, weight) for name, beta in (("ipo", 0.4), ("sft", None))}
    assert float(both.total) == pytest.approx(0.7 * float(parts["ipo"].total) + 0.2 * float(parts["sft"].total), abs=1e-5)
    for name, alone in parts.items():
        assert means(both)[f"loss_{name}"] == pytest.approx(means(alone)["loss"], abs=1e-6)
    assert means(both)["reward_chosen"] == pytest.approx(0.4 * 0.5)


def test_rewards_without_a_reference_are_per_token_where_the_loss_is() -> None:
    found = means(chosen_loss("simpo", 2.0, None, None)(Pairs(POLICY, None, PAIRS.lengths), torch.ones(2)))
    assert (found["reward_chosen"], found["reward_rejected"]) == (2 * (-5 - 1) / 2, 2 * (-3 - 2) / 2)
    assert found["logp_chosen"] == -7.5


def test_a_mistyped_loss_gets_one_line_with_the_near_name() -> None:
    known = ", ".join(map(repr, LOSSES))
    for word, said in (
        ("sigmod", f"input should be one of {known} - did you mean 'sigmoid'? (got 'sigmod')"),
        ("{sigmoid: 1, stf: 1}", f"input should be one of {known} - did you mean 'sft'? (got {{'sigmoid': 1, 'stf': 1}})"),
        ("{sigmoid: -1}", "the weight of sigmoid should be a number > 0 (got {'sigmoid': -1})"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(f'dpo.loss: {said}')}$"):
            compose_run("dpo", ["model=tiny", f"dpo.loss={word}"])


TOY = """
from posttrain.losses.pairs import PreferenceLoss, margins

def toy(pairs, *, beta, scale=1.0):
    return (margins(pairs.policy / pairs.lengths) - scale) ** 2

LOSS = PreferenceLoss(toy, needs_reference=False)
"""
WORDS = ["dpo", "model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=2", "train.batch_size=2", "data.max_rows=12"]
WORDS += ["data.eval_rows=4", "eval.sets=null", "optim.lr=0.01", "dpo.loss=toy"]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package that adds a loss of its own, which needs no reference."""
    (tmp_path / "toy_preference.py").write_text(TOY)
    info = tmp_path / "toy_preference-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-preference\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.preference_losses]\ntoy = toy_preference\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("toy_preference", None)
    PREFERENCE_LOSSES.forget()


def test_an_installed_package_adds_a_loss(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stages.dpo.reference.train_reference", lambda *_: pytest.fail("it needs no reference"))
    found = posttrain.run(*WORDS, "dpo.options.scale=0.5", f"run.dir={tmp_path / 'run'}")
    assert found["steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figures = [line for line in lines if "train/loss" in line]
    assert len(figures) == 2 and all(0 < line["train/loss"] < 4 for line in figures)
    assert lines[0]["eval/reward_chosen"] < 0  # beta log p, for want of a reference
    assert "reference" not in make_plan("dpo", WORDS[1:])["memory"] and "reference" in make_plan("dpo", WORDS[1:-1])["memory"]
    with pytest.raises(UserError, match=r"^dpo.options.scal: dpo.loss=toy has scale - did you mean 'scale'\?$"):
        posttrain.run(*WORDS, "dpo.options.scal=0.5", f"run.dir={tmp_path / 'other'}")
    with pytest.raises(UserError, match="'sppo_hard', 'toy' - did you mean 'toy'"):
        compose_run("dpo", ["model=tiny", "dpo.loss=tory"])
