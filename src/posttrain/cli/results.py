"""Chains of runs, and what is done with results: shown, measured, talked to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.words import app, end


def _recipes(incomplete: str) -> list[str]:
    from posttrain.launch.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


@app.command("run", rich_help_panel="Chains and results")
def recipe(
    name: Annotated[str, typer.Argument(help="A recipe's name or file.", autocompletion=_recipes)] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[STEP.]KEY=VALUE...", help="For one step, or for all.")
    ] = None,
    from_step: Annotated[str | None, typer.Option("--from", help="Do this step and all after it again.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do every step again.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Show the recipes there are, or a recipe's steps and their state.")
    ] = False,
) -> None:
    """Run a recipe: stages in a chain, each from the one before; what is done already is skipped."""
    from posttrain.launch.recipe_runner import run_recipe

    end(lambda: run_recipe(name, overrides or [], from_step=from_step, fresh=fresh, list_only=listing))


@app.command(rich_help_panel="Chains and results")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Put runs side by side on one page."""

    def command() -> None:
        from posttrain.reports.compare_page import compare_page

        print(compare_page(runs, out))

    end(command)


@app.command("watch", rich_help_panel="Chains and results")
def watch_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that the runs are in.")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of this machine; 0: any that is free.")] = 8421,
) -> None:
    """All runs of a folder in the browser, live: a table to sort, pages, comparisons. For this machine only."""

    def command() -> None:
        from posttrain.commands.watch.watch import watch

        watch(folder, port)

    end(command)


@app.command("eval", rich_help_panel="Chains and results")
def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN... [KEY=VALUE]...", help="Runs or models; data.KEY, rows, tasks, reward.function, ..."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure results on held-out rows, by lm-eval (tasks=A,B), or by what their answers are worth (reward.function=A)."""

    def command() -> None:
        import json

        from posttrain.commands.evaluate import evaluate_runs, show_evaluation
        from posttrain.console import console

        console.stderr = as_json  # progress, apart from the JSON
        found = evaluate_runs(words)
        print(json.dumps(found, indent=2)) if as_json else show_evaluation(found)

    end(command)


@app.command("chat", rich_help_panel="Chains and results")
def talk(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN... [KEY=VALUE]...", help="Runs of one base, or a model; data.template and the like."),
    ],
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus of the distribution.")] = 0.95,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
) -> None:
    """Talk with a run's result."""

    def command() -> None:
        from posttrain.commands.chat import chat

        chat(words, system, prompt, temperature, top_p, max_new_tokens, seed)

    end(command)


@app.command("generate", rich_help_panel="Chains and results")
def answer_prompts(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RUN PROMPTS [KEY=VALUE]...", help="A run or model, a file of prompts; reward.KEY, data.KEY."),
    ],
    to: Annotated[Path, typer.Option("--to", help="The answers, JSONL; what is there already is not made again.")],
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Answers to each prompt.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Nucleus of the distribution.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers that are written at a time.")] = 32,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends an answer; may be given again.")] = None,
    best_of: Annotated[Path | None, typer.Option("--best-of", help="Each prompt's best answer, as rows for sft.")] = None,
    at_least: Annotated[float | None, typer.Option("--at-least", help="--best-of: the score that it needs.")] = None,
    pairs: Annotated[Path | None, typer.Option("--pairs", help="Best and worst answer, as rows for dpo and rm.")] = None,
    part: Annotated[str, typer.Option("--part", metavar="K/N", help="The k-th of n parts of the prompts.")] = "1/1",
) -> None:
    """Answer a file of prompts, with log-probs and, where a reward is named, scores; best-of-n and pairs are made of them."""

    def command() -> None:
        from posttrain.commands.generate import Wanted, generate
        from posttrain.config.words import part_of
        from posttrain.training.signals import leave_with_parent

        leave_with_parent()
        how = (samples, temperature, top_p, max_new_tokens, seed, batch_size)
        generate(words, Wanted(to, *how, tuple(stop or ()), best_of, pairs, at_least, part_of(part, "--part")))

    end(command)


@app.command("sample", rich_help_panel="Chains and results")
def draw_samples(
    runs: Annotated[list[str], typer.Argument(help="DreamBooth runs, or pipelines; each draws every prompt.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", help="Where the pictures go.")] = Path("samples"),
    images: Annotated[int, typer.Option("--images", min=1, help="Of each prompt.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first picture; the others follow.")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the sampler.")] = 25,
    guidance: Annotated[float | None, typer.Option("--guidance", min=0.0, help="Default: as is usual for the model.")] = None,
    size: Annotated[int | None, typer.Option("--size", min=8, help="Pixels a side; default: as it was trained.")] = None,
) -> None:
    """Draw pictures with DreamBooth runs: adapters of one base take turns, by their runs' names."""

    def command() -> None:
        from posttrain.commands.sample import sample

        sample(runs, prompt, out, images, seed, steps, guidance, size)

    end(command)
