"""Reward functions and their sum against numbers worked out by hand; what is wrong with one is said in a line."""

import asyncio
import importlib
import json
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from posttrain.config.schema import RewardConfig
from posttrain.errors import BeforeStep, RunError, UserError
from posttrain.rewards import RewardFunction, brevity, code_spans, combined, load_function, overlap, unscored


def config(**settings: object) -> RewardConfig:
    plain = {"function": None, "weights": None, "clip": None, "whiten": False, "missing_eos_penalty": 0.0, "gold": None}
    plain |= {"options": None, "timeout": 600.0, "overlong": None}
    return RewardConfig.model_validate(plain | settings)


def test_built_in_functions() -> None:
    # of 3 and 2 words, "the" and "dog" are shared: F1 = 2 * 2 / (3 + 2); a word counts as often as both have it
    assert overlap(["", "", ""], ["The quick dog", "a a a", "x"], ["the dog", "a", "y"]) == [0.8, 0.5, 0.0]
    assert brevity(["", ""], ["", "one two three"]) == [1.0, 0.97]
    assert code_spans(["", ""], ["`a` and `b`", "`a"]) == [2.0, 0.0]


def test_scores_are_added_by_their_weights_then_shaped() -> None:
    scores = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 10.0, -10.0])]
    ended = torch.tensor([True, True, False])
    reward, shaped = combined(scores, ended, config(weights=[2.0, 0.5], clip=4.0, missing_eos_penalty=1.5))
    assert reward.tolist() == [2.0, 9.0, 1.0]
    assert shaped.tolist() == [2.0, 4.0, -0.5]  # 9 is clipped to 4; the last one was cut short
    assert combined(scores[:1], ended, config())[1].tolist() == [1.0, 2.0, 3.0]


def test_whitening_comes_before_the_clip_and_the_penalty_after() -> None:
    ended = torch.tensor([True, True, False])
    _, shaped = combined([torch.tensor([0.0, 0.0, 30.0])], ended, config(whiten=True, clip=1.0, missing_eos_penalty=2.0))
    # mean 10, standard deviation sqrt(200): -0.7071, -0.7071, 1.4142
    torch.testing.assert_close(shaped, torch.tensor([-0.7071, -0.7071, -1.0]), atol=1e-3, rtol=0)


def test_a_function_of_ones_own_may_ask_for_the_known_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "def right(prompts, answers, references): return [float(a == r) for a, r in zip(answers, references)]\n"
    text += "def few(prompts, answers): return [1]\ndef odd(prompts, answers): return [float('nan')] * len(answers)\n"
    Path("own_rewards.py").write_text(text)
    right = load_function("own_rewards:right", "reward.function")
    assert right(["p", "p"], ["a", "b"], ["a", "c"]).tolist() == [1.0, 0.0]
    with pytest.raises(RunError, match="own_rewards:few gave 1 scores for 2 answers"):
        load_function("own_rewards:few", "reward.function")(["p", "p"], ["a", "b"], ["", ""])
    with pytest.raises(RunError, match="own_rewards:odd gave nan for 'a'"):
        load_function("own_rewards:odd", "reward.function")(["p"], ["a"], [""])


@pytest.mark.parametrize("name", ["brevity", "no_such_module_here:f", "posttrain.rewards:absent"])
def test_a_name_that_is_no_function_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^rm\.rule: ") as caught:
        load_function(name, "rm.rule")
    assert "\n" not in str(caught.value)


def test_the_modules_earlier_name_still_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_function("posttrain.rules:brevity", "reward.function")(["p"], [""], [""]).tolist() == [1.0]
    said = capsys.readouterr()
    assert "posttrain.rewards" in said.out + said.err


FORMS = """
def by_name(completions, prompts, **kw): return [float(c == p + s) for c, p, s in zip(completions, prompts, kw["solution"])]
def column(responses, solution, tests=None): return [float(r == s) + (tests is None) for r, s in zip(responses, solution)]
def placed(xs, ys, solution): return [float(x + y == s) for x, y, s in zip(xs, ys, solution)]
def all_of_them(**kw): return [float(len(kw))] * len(kw["completions"])
def unknown(prompts, answers, soluton): return []
class Kept:
    def __init__(self): self.calls = 0
    def __call__(self, answers, references, *, solution): self.calls += 1; return [float(self.calls)] * len(answers)
kept = Kept()
"""


def test_a_function_gets_by_name_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`def f(completions, prompts, **kw)` got the prompts as answers; columns of the rows were out of reach."""
    monkeypatch.chdir(tmp_path)
    Path("named_rewards.py").write_text(FORMS)
    columns = {"solution": ["pa", "x"], "id": [1, None]}

    def called(name: str) -> list[float]:
        function = load_function(f"named_rewards:{name}", "reward.function")
        function = function.of_rows(columns, True, "reward.function")
        return function(["p", "q"], ["pa", "x"], ["r", "r"], columns).tolist()

    assert called("by_name") == [0.0, 0.0] and called("column") == [2.0, 2.0]
    assert called("placed") == [0.0, 0.0] and called("all_of_them") == [5.0, 5.0] and called("kept") == [1.0, 1.0]
    by_name = load_function("named_rewards:by_name", "reward.function")
    assert by_name(["p", "q"], ["pa", "x"], ["r", "r"], {"solution": ["a", "x"]}).tolist() == [1.0, 0.0]
    assert by_name(["p", "q"], ["pa", "qx"], ["r", "r"], {"solution": ["a", "x"]}).tolist() == [1.0, 1.0]
    with pytest.raises(UserError) as caught:
        load_function("named_rewards:unknown", "reward.function").of_rows(columns, True, "reward.function")
    assert str(caught.value) == (
        "reward.function: named_rewards:unknown asks for 'soluton', which is no column of the rows - did you mean 'solution'?; "
        "their columns are id, solution"
    )


def asked(call: object, limit: float = 60.0) -> list[float]:
    return RewardFunction("mine:f", call, limit)(["p", "p"], ["a", "b"], ["", ""]).tolist()  # type: ignore[arg-type]


def test_answers_whose_rows_lack_a_column_get_none_for_it() -> None:
    """A step may draw rows of one source alone, whose columns are not those of another."""

    def right(answers: list[str], solution: list[str | None]) -> list[float | None]:
        return [None if wanted is None else float(wanted == said) for said, wanted in zip(answers, solution, strict=True)]

    function = RewardFunction("mine:right", right).of_rows({"solution"}, False, "reward.function")
    assert function(["p", "p"], ["a", "b"], ["", ""], {}).isnan().tolist() == [True, True]
    assert function(["p", "p"], ["a", "b"], ["", ""], {"solution": ["a", "x"]}).tolist() == [1.0, 0.0]


def test_a_function_that_is_not_there_has_a_near_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("near_rewards.py").write_text("def brevity(answers): return [0.0] * len(answers)\n")
    with pytest.raises(UserError, match=r"^reward.function: there is no 'brevty' in near_rewards - did you mean 'brevity'\?$"):
        load_function("near_rewards:brevty", "reward.function")


def test_none_does_not_apply() -> None:
    found = asked(lambda answers: [None, 2.0])
    assert math.isnan(found[0]) and found[1] == 2.0
    scores, ended = [torch.tensor([math.nan, 2.0, math.nan]), torch.tensor([1.0, 3.0, math.nan])], torch.tensor([True] * 3)
    assert combined(scores, ended, config(weights=[1.0, 10.0]))[0].tolist() == [10.0, 32.0, 0.0]
    assert unscored(scores).tolist() == [False, False, True]


def test_each_reward_by_itself_can_be_scaled_before_the_weights() -> None:
    scores = [torch.tensor([0.0, 2.0, math.nan]), torch.tensor([100.0, 300.0, 200.0])]
    reward, _ = combined(scores, torch.tensor([True] * 3), config(weights=[1.0, 2.0], whiten="each"))
    assert reward.tolist() == pytest.approx([-1 - 2 * math.sqrt(1.5), 1 + 2 * math.sqrt(1.5), 0], abs=1e-5)


def test_what_a_long_answer_loses() -> None:
    """DAPO's eq. 13 with L_max 20 and L_cache 5."""
    lengths = torch.tensor([10, 15, 16, 18, 20, 40])
    _, shaped = combined([torch.zeros(6)], torch.ones(6, dtype=torch.bool), config(overlong=[15, 20]), lengths)
    assert shaped.tolist() == pytest.approx([0, 0, -0.2, -0.6, -1, -1], abs=1e-6)
    with pytest.raises(ValueError, match=r"reward\.overlong"):
        config(overlong=[20, 15])


def test_async_functions_and_objects_with_state() -> None:
    async def slow(answers: list[str]) -> list[float]:
        return list(await asyncio.gather(*(one(each) for each in answers)))

    async def one(answer: str) -> float:
        await asyncio.sleep(0.01)
        return float(answer == "b")

    class Kept:
        def __init__(self) -> None:
            self.calls = 0

        async def __call__(self, answers: list[str]) -> list[float]:
            self.calls += 1
            return [float(self.calls)] * len(answers)

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    assert asked(slow) == [0.0, 1.0]
    function = RewardFunction("mine:kept", Kept())
    function.try_out(["p"], ["a"], [""], {}, "reward.function")
    assert function(["p"], ["a"], [""]).tolist() == [1.0], "what was tried out is forgotten"
    again = RewardFunction("mine:kept", Kept())
    again.load(json.loads(json.dumps(function.state())))
    assert again(["p"], ["a"], [""]).tolist() == [2.0] and RewardFunction("mine:slow", slow).state() is None


def test_a_class_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("class_rewards.py").write_text(FORMS)
    function = load_function("class_rewards:Kept", "reward.function")
    assert [function(["p"], ["a"], [""], {"solution": ["s"]}).tolist() for _ in range(2)] == [[1.0], [2.0]]


def exec_of(text: str) -> Any:
    """The function f of this text, whose form a linter would change."""
    found: dict[str, Any] = {}
    exec(text, found)
    return found["f"]


def hangs(answers: list[str]) -> list[float]:
    with suppress(Exception):
        time.sleep(30)
    return [0.0] * len(answers)


def backtracks(answers: list[str]) -> list[float]:
    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b"))) for _ in answers]


@pytest.mark.parametrize("call", [hangs, backtracks])
def test_a_function_that_hangs_is_ended(call: object) -> None:
    began = time.monotonic()
    with pytest.raises(BeforeStep, match=r"mine:f took longer than reward.timeout=0.2 seconds"):
        asked(call, limit=0.2)
    assert time.monotonic() - began < 10


def broken(answers: list[str]) -> list[float]:
    raise KeyError("no such\nword")


def leaves(answers: list[str]) -> list[float]:
    raise SystemExit(3)


async def one_by_one(answers: list[str]) -> AsyncIterator[float]:
    for answer in answers:
        yield float(answer == "b")


async def judged(answer: str) -> float:
    await asyncio.sleep(0.01)
    return float(answer == "b")


async def promised(answers: list[str]) -> list[Any]:
    return [judged(each) for each in answers]


@pytest.mark.parametrize(
    "call",
    [
        lambda answers: (float(each == "b") for each in answers),
        lambda answers: numpy.array([each == "b" for each in answers], dtype=numpy.float16),
        lambda answers: torch.tensor([[float(each == "b")] for each in answers]),
        lambda answers: [torch.tensor(float(each == "b")) for each in answers],
        lambda answers: [judged(each) for each in answers],
        one_by_one,
        promised,
        lambda *texts: [float(each == "b") for each in texts[1]],  # prompts and answers
        exec_of("def f(prompts, completions, /): return [float(each == 'b') for each in completions]"),
        exec_of("def f(a, b, references, /): return [float(each == 'b') for each in b if len(references) == 2]"),
        exec_of("def f(*args, **more): return [float(each == 'b') for each in more['completions'] if not args]"),
    ],
)
def test_scores_come_in_many_forms(call: Any) -> None:
    assert asked(call) == [0.0, 1.0]


def test_a_file_here_comes_before_an_installed_package_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the reward alone: whoever else imports the package gets it."""
    import yaml

    (tmp_path / "yaml.py").write_text("def two(answers):\n    return [2.0] * len(answers)\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("yaml:two", "reward.function")(["p"], ["a"], [""]).tolist() == [2.0]
    assert importlib.import_module("yaml") is yaml and hasattr(yaml, "safe_load")
    with pytest.raises(UserError, match="there is no 'three' in yaml"):
        load_function("yaml:three", "reward.function")


@pytest.mark.parametrize("call", [one_by_one, promised])
def test_asynchronous_rewards_are_asked_in_a_notebook_too(call: Any) -> None:
    """Where a loop is at work in the thread already."""

    async def cell() -> Any:
        return asked(call)

    assert asyncio.run(cell()) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (broken, "mine:f raised KeyError: 'no such\\\\nword'"),
        (lambda answers: [1.0], "mine:f gave 1 scores for 2 answers"),
        (lambda answers: [1.0, math.inf], "mine:f gave inf for 'b'"),
        (lambda answers: 5, "mine:f gave 5; it must give a list: a number for each answer, or None"),
        (lambda answers: None, "mine:f gave None; it must give a list"),
        (lambda answers: "10", "mine:f gave '10'; it must give a list"),
        (lambda answers: {0: 1.0, 1: 2.0}, r"mine:f gave \{0: 1.0, 1: 2.0\}; it must give a list"),
        (lambda answers: {1.0, 2.0}, r"mine:f gave \{1.0, 2.0\}; it must give a list"),
        (leaves, "mine:f raised SystemExit: 3"),
    ],
)
def test_what_is_wrong_with_one_is_found_before_a_model_loads(call: object, said: str) -> None:
    with pytest.raises(UserError, match=f"^reward.function: tried out on the first rows, {said}") as caught:
        RewardFunction("mine:f", call).try_out(["p"] * 2, ["a", "b"], ["r"] * 2, {}, "reward.function")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
