"""posttrain from Python: quick to import, told of its metrics, and a result that writes and scores."""

import asyncio
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.commands.loaded import Loaded
from posttrain.errors import RunError, UserError
from posttrain.training.listeners import listening, tell


def test_import_loads_nothing() -> None:
    code = "import sys, posttrain; print([m for m in ('torch', 'hydra', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_callbacks_are_told_copies_and_their_errors_end_the_run() -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    def spoils(step: int, values: dict[str, float]) -> None:
        values.clear()

    with listening([spoils, lambda step, values: seen.append((step, values))]):
        tell(3, {"train/loss": 1.5})
    tell(4, {})
    assert seen == [(3, {"train/loss": 1.5})]

    def fails(step: int, values: dict[str, float]) -> None:
        raise KeyError("x")

    with listening([fails]), pytest.raises(RunError, match=r"callback fails, told of step 1: KeyError: 'x'"):
        tell(1, {})


def test_callbacks_need_the_run_in_this_process() -> None:
    with pytest.raises(UserError, match="callbacks: they are of this process"):
        posttrain.run("sft", "model=tiny", "train.processes=2", callbacks=[print])


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return posttrain.load("tiny", device="cpu")


def test_what_it_writes_is_the_likeliest_and_its_score_is_the_models_own(tiny: Loaded) -> None:
    prompts = ["Say hello.", [{"role": "user", "content": "And then?"}]]
    answers = tiny.generate(prompts, max_new_tokens=6)
    again = tiny.generate([prompts[1]], max_new_tokens=6)
    assert [len(each) for each in answers] == [1, 1] and again[0] == answers[1]
    score = tiny.score("Say hello.", "Good day")
    asked = (
        tiny.live.encoder.encode_prompt({"messages": [{"role": "user", "content": "Say hello."}]}) if tiny.live.is_chat else []
    )
    asked = asked or tiny.live.encoder.encode_prompt({"prompt": "Say hello."})
    said = [*tiny.tokenizer("Good day", add_special_tokens=False)["input_ids"], tiny.live.ends[0]]
    with torch.no_grad():
        logits = tiny.model(torch.tensor([[*asked, *said]])).logits[0].float().log_softmax(-1)
    expected = sum(float(logits[len(asked) - 1 + i, token]) for i, token in enumerate(said))
    assert math.isclose(score[0], expected, rel_tol=1e-3)
    assert tiny.score(["Say hello.", "x"], ["Good day", "y"])[0] == pytest.approx(score[0], rel=1e-3)


def test_samples_follow_the_seed(tiny: Loaded) -> None:
    drawn = [tiny.generate("Go on", 2, max_new_tokens=5, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0][0]) == 2


def test_what_cannot_be_asked(tiny: Loaded) -> None:
    with pytest.raises(UserError, match="all answers are one"):
        tiny.generate("x", 2)
    with pytest.raises(UserError, match="2 prompts and 1 answers"):
        tiny.score(["x", "y"], "z")
    with pytest.raises(UserError, match=r"give one run; 'two' is no data.KEY=VALUE"):
        posttrain.load("one", "two")


@pytest.mark.slow
def test_a_run_a_sweep_and_their_figures(tmp_path: Path) -> None:
    seen: list[int] = []
    words = [
        "model=tiny",
        "train.max_steps=2",
        "train.batch_size=2",
        "train.max_length=128",
        "data.eval_rows=2",
        "eval.sets=null",
    ]
    manifest = posttrain.run(
        "sft", *words, "+peft=lora", f"run.dir={tmp_path}/run", callbacks=[lambda step, _: seen.append(step)]
    )
    assert seen == [0, 1, 2, 2] and manifest["steps"] == 2
    assert posttrain.load(f"{tmp_path}/run").generate("Hello", max_new_tokens=3)[0][0] is not None
    figures = posttrain.evaluate(f"{tmp_path}/run")["run"]
    assert figures["eval/loss"] == pytest.approx(manifest["metrics"]["eval/loss"], rel=1e-3)
    rows = posttrain.sweep("sft", *words, "optim.lr=1e-4,1e-3", f"run.dir={tmp_path}/sweep")
    assert [row["status"] for row in rows] == ["done", "done"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: posttrain.run("sftt", "model=tiny"), "there is no stage 'sftt' - did you mean 'sft'?"),
        (lambda: posttrain.sweep("sftt", "model=tiny"), "there is no stage 'sftt' - did you mean 'sft'?"),
        (lambda: posttrain.run("sft", ["model=tiny"]), "words are texts, each an argument: run('sft', *words), not a list"),  # type: ignore[arg-type]
        (lambda: posttrain.run("sft", {"model": "tiny"}), "words are texts"),  # type: ignore[arg-type]
        (lambda: posttrain.sweep("sft", 3), "words are texts"),  # type: ignore[arg-type]
        (lambda: posttrain.evaluate(["a"]), "words are texts"),  # type: ignore[arg-type]
        (lambda: posttrain.load("tiny", ["a=b"]), "words are texts"),  # type: ignore[arg-type]
        (lambda: posttrain.run(None), "words are texts"),  # type: ignore[arg-type]
        (lambda: posttrain.run("sft", "model=tiny", callbacks=print), "callbacks: give a list of functions"),  # type: ignore[arg-type]
        (lambda: posttrain.run("sft", "model=tiny", callbacks=["x"]), "callbacks: 'x' is no function"),  # type: ignore[list-item]
        (lambda: posttrain.load("tiny", device="foo"), "device: 'foo' is none"),
        (lambda: posttrain.load("tiny", device="cuda:99"), "device: 'cuda:99' is none"),
    ],
)  # fmt: skip
def test_what_is_no_call_is_one_line_before_anything_runs(
    call: Callable[[], Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0; give 1 or more"),
        ({"samples": 0}, "samples: 0; give 1 or more"),
        ({"temperature": -1.0}, "temperature: -1.0; give 0 or more"),
        ({"temperature": math.nan}, "temperature: nan; give 0 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0; give a share above 0, at most 1"),
        ({"stop": "x"}, "stop: give a list of texts"),
        ({"stop": [""]}, "stop: an empty text ends every answer"),
    ],
)
def test_how_to_write_has_its_bounds(tiny: Loaded, words: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny.generate("x", **words)
    assert said in str(caught.value)


def test_prompts_are_texts_or_conversations(tiny: Loaded) -> None:
    assert tiny.generate([]) == [] and tiny.score([], []) == []
    for wrong in (3, [3], [None], [[3]]):
        with pytest.raises(UserError, match="prompts: a text, a list of messages, or a list of these"):
            tiny.generate(wrong)  # type: ignore[arg-type]


SMALL = ("model=tiny", "train.max_steps=2", "train.batch_size=2", "train.max_length=128", "data.eval_rows=2", "eval.sets=null")


@pytest.mark.slow
def test_a_run_in_a_thread_beside_a_loop_that_is_at_work(tmp_path: Path) -> None:
    """As a notebook or a server calls it: signals are the main thread's, so the run does without."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    async def main() -> dict[str, Any]:
        at_once = posttrain.run("sft", *SMALL, f"run.dir={tmp_path}/loop")
        later = await asyncio.to_thread(posttrain.run, "sft", *SMALL, f"run.dir={tmp_path}/thread")
        assert at_once["metrics"]["eval/loss"] == later["metrics"]["eval/loss"]
        rows = await asyncio.to_thread(posttrain.sweep, "sft", *SMALL, "optim.lr=1e-4,1e-3", f"run.dir={tmp_path}/sweep")
        assert [row["status"] for row in rows] == ["done", "done"]
        return later

    assert asyncio.run(main())["steps"] == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_two_runs_of_one_process_are_one_after_another(tmp_path: Path) -> None:
    """They would share torch's random numbers: neither would be reproducible."""

    def again(step: int, _: dict[str, float]) -> None:
        with pytest.raises(UserError, match="another run is at work in this process"):
            posttrain.run("sft", *SMALL, f"run.dir={tmp_path}/inner")

    first = posttrain.run("sft", *SMALL, f"run.dir={tmp_path}/outer", callbacks=[again])
    assert first["steps"] == 2 and not (tmp_path / "inner").exists()
    assert posttrain.run("sft", *SMALL, f"run.dir={tmp_path}/inner")["metrics"] == first["metrics"]
