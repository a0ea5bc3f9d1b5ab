"""posttrain: take a pretrained model through continued pre-training, fine-tuning and preference training.

    import posttrain

    manifest = posttrain.run("sft", "+peft=lora", "data.path=chat.jsonl", callbacks=[print])
    model = posttrain.load("runs/sft/RUN")
    model.generate("What is a decorator?")

Torch is imported when one of these is called, not before. All raise posttrain.errors.UserError for what the user can mend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.commands.loaded import Loaded

__version__ = "0.2.0"
__all__ = ["evaluate", "load", "run", "sweep"]

Callback = Callable[[int, dict[str, float]], None]


def run(stage: str, *overrides: str, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    """Run one stage as the command line would and return its manifest: `run("sft", "+peft=qlora", "model=tiny")`.

    callbacks: each is told the step and the metrics of every line that goes to metrics.jsonl; an error in one ends the run. They
    are of this process, so several processes or a launcher are refused with them.

    In a notebook, beside a loop that is at work and in a thread as in a script; signals are the main thread's, so that a run in
    another does not hear of them. One run a process at a time.

    Raises posttrain.errors.UserError, RunError or Stopped.
    """
    from posttrain.config.compose import compose_run
    from posttrain.launch.called import one_at_a_time, require_here, texts
    from posttrain.launch.worker import run_config
    from posttrain.training.listeners import listening

    name, *words = texts("run", [stage, *overrides])
    with one_at_a_time(), listening(callbacks):
        config = compose_run(name, words)
        require_here(callbacks, config)
        return run_config(config)


def load(run: str | PathLike[str], *words: str, device: str | None = None) -> Loaded:
    """A finished run's result, or a bare model (a directory, a hub id, a built-in name), to write and to score with.

    words: `data.KEY=VALUE` in place of how the run read its rows, such as data.template=none. device: None: a GPU where there is
    one. The files are checked against the manifest first.
    """
    from posttrain.commands.loaded import open_loaded
    from posttrain.launch.called import texts

    name, *rest = texts("load", [run, *words])
    return open_loaded(name, rest, device)


def evaluate(*words: str | PathLike[str]) -> dict[str, dict[str, float]]:
    """As `posttrain eval`: figures by run and name, of `evaluate("runs/sft/RUN", "smollm2", "data.path=held_out.jsonl")`."""
    from posttrain.commands.evaluate import evaluate_runs
    from posttrain.launch.called import texts

    return evaluate_runs(texts("evaluate", words))


def sweep(stage: str, *overrides: str) -> list[dict[str, Any]]:
    """As `posttrain STAGE -m`: every combination of `sweep("sft", "model=tiny", "optim.lr=1e-4,1e-3")` is a run; a row for each,
    with its settings, directory, status and metrics.

    Raises RunError after the last job where some failed.
    """
    from posttrain.launch.called import one_at_a_time, texts
    from posttrain.launch.sweep import run_sweep

    name, *words = texts("sweep", [stage, *overrides])
    with one_at_a_time():
        return run_sweep(name, words, None)
