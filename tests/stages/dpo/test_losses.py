"""`dpo.loss` through a whole run: what is said first, what is computed, and what is said at the end."""

import json
from pathlib import Path

import numpy as np
import pytest

import posttrain
from posttrain.commands.evaluate import evaluate_runs
from posttrain.commands.plan.plan import make_plan
from posttrain.commands.preview.preview import make_preview
from posttrain.config.compose import compose_run, validate
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.runs.earlier import as_of_today
from posttrain.stages.dpo.diagnostics import alarms, line_of_labels
from posttrain.stages.spec import spec_of

SMALL = ("model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=2", "train.batch_size=2", "data.max_rows=12", "eval.sets=null")
SMALL += ("data.eval_rows=4", "optim.lr=0.01")


def test_a_sum_trains_and_reports_each_part_and_plan_and_preview_know_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "dpo.loss={sigmoid_norm: 0.8, sft: 0.2}"]
    posttrain.run("dpo", *words, f"run.dir={tmp_path / 'run'}")
    line = "loss 0.8 sigmoid_norm (beta 5, label_smoothing 0) + 0.2 sft, against the model that the stage starts from"
    said = " ".join(capsys.readouterr().out.split())
    assert line in said and line in make_preview("dpo", words, 8, 1).lines
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for each in lines:
        for part in ("train", "eval"):
            if f"{part}/loss" in each:
                parts = 0.8 * each[f"{part}/loss_sigmoid_norm"] + 0.2 * each[f"{part}/loss_sft"]
                assert each[f"{part}/loss"] == pytest.approx(parts, abs=1e-5)
    assert lines[0]["eval/loss_sigmoid_norm"] == pytest.approx(0.693147, abs=1e-5)
    assert "reference" in make_plan("dpo", words)["memory"]


@pytest.mark.parametrize("name", ["orpo", "simpo", "cpo"])
def test_no_reference_is_computed_for_a_loss_that_has_none(name: str) -> None:
    """That a run without one trains, tests/losses/preference/test_preference.py shows."""
    words = [*SMALL, f"dpo.loss={name}"]
    assert spec_of("dpo").steps_of(typed_config(compose_run("dpo", words))).make_references is None  # type: ignore[attr-defined]
    assert name != "orpo" or "reference" not in make_plan("dpo", words)["memory"]


def test_a_preview_refuses_what_a_run_would() -> None:
    with pytest.raises(UserError, match=r"^dpo.options.gama: dpo.loss=simpo has gamma - did you mean 'gamma'\?$"):
        make_preview("dpo", [*SMALL, "dpo.loss=simpo", "dpo.options.gama=1"], 8, 1)


def test_a_fall_of_the_chosen_answers_is_said_in_words() -> None:
    ends = {"eval/logp_chosen_before": -50.0, "eval/logp_rejected_before": -40.0, "eval/logp_rejected": -90.0}
    assert alarms({**ends, "eval/logp_chosen": -50.4}) == [] and alarms({}) == []
    (line,) = alarms({**ends, "eval/logp_chosen": -61.25})
    assert line.startswith("the log-prob of chosen answers fell from -50 to -61.25, that of rejected ones from -40 to -90: ")


def test_a_run_of_0_2_goes_on_where_the_usual_settings_are_the_same() -> None:
    then = {"dpo.beta": 0.1, "dpo.label_smoothing": 0.0}
    now = {"dpo.beta": None, "dpo.label_smoothing": None}
    for loss in ("sigmoid", "ipo"):
        name = {"dpo.loss": loss}
        assert as_of_today(then | name, now | name)[0] == now | name
    name = {"dpo.loss": "sigmoid_norm"}  # whose usual beta is 5 now
    assert as_of_today(then | name, now | name)[0] == {"dpo.beta": 0.1, "dpo.label_smoothing": None} | name
    assert as_of_today({"dpo.beta": 0.3, "dpo.loss": "ipo"}, {"dpo.beta": None, "dpo.loss": "ipo"})[0]["dpo.beta"] == 0.3


def labelled(folder: Path, rows: int = 9) -> str:
    path = folder / "labelled.jsonl"
    told = [{"prompt": f"{k} is", "completion": f" {k * k}" * (1 + k % 3), "label": k % 3 > 0} for k in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return str(path)


def test_labelled_answers_train_and_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "+peft=lora", "peft.r=4", f"data.path={labelled(tmp_path)}", "data.eval_share=0", "dpo.loss=kto"]
    words += ["train.max_steps=3", "train.batch_size=3", "train.grad_accum=2", "optim.lr=0.05", "optim.warmup_ratio=0"]
    posttrain.run("dpo", *words, "eval.sets=null", f"run.dir={tmp_path / 'run'}")
    said = " ".join(capsys.readouterr().out.split())
    assert "loss kto (beta 0.1, desirable_weight 1, undesirable_weight 1), against the model" in said
    assert "6 good and 3 other answers; dpo.options.undesirable_weight=2 lets both count alike" in said
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "train/loss" in line]
    assert (first["train/loss"], first["train/kl"], first["train/accuracy"]) == (0.5, 0.0, 0.5)
    assert last["train/accuracy"] > 0.5 and last["train/reward_chosen"] > last["train/reward_rejected"]
    preview = make_preview("dpo", words, None, 2)
    assert preview.unit == "answer" and any(line.startswith("loss kto") for line in preview.lines)
    plan = make_plan("dpo", words)
    assert plan["memory"]["reference"] == 9 * 8 and any("once more" in line for line in plan["assumptions"])


def test_rows_that_do_not_fit_a_loss_are_refused(tmp_path: Path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"prompt": "x", "chosen": " y", "rejected": " z"}) + "\n")
    small = ["model=tiny", "+peft=lora", "data.eval_share=0", "eval.sets=null"]
    with pytest.raises(
        UserError, match=r"^data.path: the rows to train on have one prompt alone, .* to others; give more of them$"
    ):
        posttrain.run("dpo", *small, f"data.path={one}", "dpo.loss=kto", f"run.dir={tmp_path / 'a'}")
    one.write_text(json.dumps({"prompt": "x", "completion": " y", "label": True}) + "\n")
    held_out = [f"data.path={labelled(tmp_path)}", f"data.eval_path={one}", "dpo.loss=kto", f"run.dir={tmp_path / 'held'}"]
    with pytest.raises(UserError, match=r"^the held-out rows have one prompt alone, .*; hold more out by data.eval_share or"):
        posttrain.run("dpo", *small, *held_out)
    with pytest.raises(UserError, match=r"dpo does not take prompt_completion .*give data with prompt, chosen and rejected$"):
        posttrain.run("dpo", *small, f"data.path={labelled(tmp_path)}", f"run.dir={tmp_path / 'b'}")
    one.write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(UserError, match=r"dpo does not take text .*give data with prompt, completion and label, or pairs$"):
        posttrain.run("dpo", *small, f"data.path={one}", "dpo.loss=kto", f"run.dir={tmp_path / 'c'}")


@pytest.mark.slow
def test_eval_measures_what_a_run_on_labelled_answers_holds_out(tmp_path: Path) -> None:
    words = [f"data.path={labelled(tmp_path, 30)}", "data.eval_share=0.4", "dpo.loss=kto", f"run.dir={tmp_path / 'run'}"]
    posttrain.run("dpo", "model=tiny", "+peft=lora", "train.max_steps=1", "eval.sets=null", *words)
    measured = evaluate_runs([str(tmp_path / "run")])["run"]
    assert set(measured) == {"eval/logp_chosen", "eval/logp_rejected"} and all(-20 < each < 0 for each in measured.values())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["kto", "bco", "aot", "aot_unpaired"])
def test_how_a_step_is_cut_does_not_matter(loss: str, tmp_path: Path) -> None:
    """One micro-batch, four, and two processes (tests/stages/test_distributed.py) take the same steps."""
    rows = [{"prompt": f"{k} is", "chosen": f" {k * k}" * (1 + k % 3), "rejected": " no"} for k in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = {}
    for batch, accumulation in ((4, 1), (1, 4)):
        words = ["model=tiny", "+peft=lora", "peft.r=4", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_share=0"]
        words += ["eval.sets=null", "train.max_steps=4", "optim.lr=0.03", "optim.warmup_ratio=0", f"dpo.loss={loss}"]
        run = tmp_path / str(batch)
        posttrain.run("dpo", *words, f"train.batch_size={batch}", f"train.grad_accum={accumulation}", f"run.dir={run}")
        lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "grad_norm", "accuracy")
        steps[batch] = [[line[f"train/{name}"] for name in names] for line in lines if "train/loss" in line]
    assert np.array(steps[4]) == pytest.approx(np.array(steps[1]), rel=1e-4) and steps[4][0] != steps[4][-1]


@pytest.mark.parametrize("given", ["{}", "[sigmoid,sft]"])
def test_a_loss_that_is_neither_a_name_nor_weights_is_told_how_to_be(given: str) -> None:
    with pytest.raises(
        UserError, match=r"^dpo.loss: input should be one name, or several with their weights, as \{aot: 0.8, sppo_hard: 0.2\}"
    ):
        validate(compose_run("dpo", [f"dpo.loss={given}"]))


def test_labels_of_one_kind_alone_are_named() -> None:
    said = "with one kind alone a loss of labels has nothing to tell apart; give rows of both"
    assert line_of_labels(np.array([1.0, 1.0])) == f"2 good and 0 other answers: {said}"
    assert line_of_labels(np.array([-1.0])) == f"0 good and 1 other answers: {said}"
    assert line_of_labels(np.array([1.0, -1.0])) == "1 good and 1 other answers"
