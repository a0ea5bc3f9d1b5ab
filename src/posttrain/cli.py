"""The command line. Typer only: Hydra and torch are imported where they are needed, so that help is there at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from posttrain import __version__
from posttrain.config import completion
from posttrain.launch.exit_codes import guarded
from posttrain.stages.help import epilog
from posttrain.stages.spec import StageSpec, spec_of, stages

app = typer.Typer(
    name="posttrain",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train a language model: CPT, SFT, RM, PPO, DPO, in full, with LoRA or QLoRA, each stage from the one before.",
    epilog="[bold]Try[/]  posttrain sft model=tiny train.max_steps=5   "
    "[bold]then[/]  posttrain sft +peft=qlora data.path=my.jsonl   [bold]or[/]  posttrain run python_expert",
)


completion.install()


def _overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    return completion.overrides(str(ctx.info_name), incomplete)


def _recipes(incomplete: str) -> list[str]:
    from posttrain.launch.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, in any order.", autocompletion=_overrides)
]
ConfigFile = Annotated[
    list[Path] | None,
    typer.Option("--config", help="A YAML file of settings, or a run's config.yaml; words beat it, and a later file an earlier."),
]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="Your own config groups; they can shadow the shipped ones.")]


def _end(command: Callable[[], Any]) -> None:
    raise typer.Exit(guarded(command))


def _words(overrides: list[str] | None, config: list[Path] | None) -> list[str]:
    return [*(f"--config={file}" for file in config or []), *(overrides or [])]


class _StageCommand(TyperCommand):
    """An option that there is not may be a word of another tool."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base's, after a look at what the options are called."""
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        for word, after in pairwise([*args, ""]):
            if word.startswith("--") and word.partition("=")[0] not in known and not ctx.resilient_parsing:
                _refuse_option(word, None if after.startswith("-") else after)
        return super().parse_args(ctx, args)


def _refuse_option(word: str, value: str | None) -> None:
    from posttrain.config.other_tools import option_meaning

    if said := option_meaning(word, value):
        raise typer.Exit(guarded(partial(_complain, said)))


def _complain(line: str) -> None:
    from posttrain.errors import UserError

    raise UserError(line)


def _add_stage(spec: StageSpec) -> None:
    name = spec.name

    @app.command(name, cls=_StageCommand, help=spec.about, epilog=epilog(spec), rich_help_panel="Stages")
    def stage(
        overrides: Overrides = None,
        multirun: Annotated[bool, typer.Option("--multirun", "-m", help="A sweep: a=1,2 b=3,4 runs all combinations.")] = False,
        cfg: Annotated[str | None, typer.Option("--cfg", "-c", help="Print the composed config (job) and stop.")] = None,
        info: Annotated[str | None, typer.Option("--info", "-i", help="How the config came about (defaults) and stop.")] = None,
        config: ConfigFile = None,
        config_dir: ConfigDir = None,
    ) -> None:
        def command() -> None:
            from posttrain.config import compose as composing
            from posttrain.console import output_alone

            words = _words(overrides, config)
            if cfg or info:
                with output_alone():
                    print(composing.show(name, words, config_dir, cfg, info))
            elif multirun:
                from posttrain.launch.sweep import run_sweep

                run_sweep(name, words, config_dir)
            else:
                from posttrain.launch.worker import run_config

                run_config(composing.compose_run(name, words, config_dir), waits=False)

        _end(command)


for _spec in stages().values():
    _add_stage(_spec)


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

    _end(lambda: run_recipe(name, overrides or [], from_step=from_step, fresh=fresh, list_only=listing))


@app.command(rich_help_panel="Chains and results")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """Put runs side by side on one page."""

    def command() -> None:
        from posttrain.reports.compare_page import compare_page

        print(compare_page(runs, out))

    _end(command)


@app.command("watch", rich_help_panel="Chains and results")
def watch_runs(
    folder: Annotated[Path, typer.Argument(help="The folder that the runs are in.")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Of this machine; 0: any that is free.")] = 8421,
) -> None:
    """All runs of a folder in the browser, live: a table to sort, pages, comparisons. For this machine only."""

    def command() -> None:
        from posttrain.commands.watch.watch import watch

        watch(folder, port)

    _end(command)


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

    _end(command)


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

    _end(command)


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

    _end(command)


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

    _end(command)


OUT = Annotated[Path, typer.Option("--out", help="A new directory for the result, or an address (s3://...).")]


@app.command(rich_help_panel="Chains and results")
def merge(
    run: Annotated[Path, typer.Argument(help="A run directory with an adapter.")],
    out: OUT,
    max_kl: Annotated[float, typer.Option("--max-kl", help="Refuse above so many nats a token from the live model.")] = 0.05,
    onto: Annotated[str, typer.Option("--onto", help="auto, or on a quantized base full or dequantized weights.")] = "auto",
    form: Annotated[
        str, typer.Option("--as", help="plain: as the base, dequantized; same: in its checkpoint's format; bf16, fp16, fp32.")
    ] = "plain",
) -> None:
    """Put a run's adapter into the weights of its full-precision base, and check the result against the live model."""

    def command() -> None:
        from posttrain.commands.merge import merge_run
        from posttrain.console import say
        from posttrain.runs.remote import result_at

        with result_at(out) as place:
            merge_run(run, place, max_kl, onto, form)
            say(f"merged {place}")

    _end(command)


@app.command("export", rich_help_panel="Chains and results")
def export(
    run: Annotated[Path, typer.Argument(help="A finished run: its directory, or its address (s3://...).")],
    to: Annotated[str, typer.Option("--to", help="hf (a merged model), gguf, ollama, vllm, mlx; of DreamBooth comfyui.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new directory, or an address; default: beside the run, as RUN-TO.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="hf: bf16, f16, f32, nf4, int8, gptq; gguf, ollama: f16, q8_0, q4_k_m, ...; mlx: bf16, q4, q8, ..."
        ),
    ] = None,
    max_kl: Annotated[float, typer.Option("--max-kl", help="Refuse above so many nats a token from the live model.")] = 0.05,
) -> None:
    """Write a run's result as others take it, read it back and hold it against the live model."""

    def command() -> None:
        from posttrain.commands.export.export import export_run

        export_run(run, to, out, dtype, max_kl)

    _end(command)


@app.command("push", rich_help_panel="Chains and results")
def push(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    repository: Annotated[str, typer.Argument(help="On the hub, as ORG/NAME.")],
    update: Annotated[bool, typer.Option("--update", help="Write over the files of a repository that exists.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Put a run's adapter or model, with its card, on the hub: in a private repository."""

    def command() -> None:
        from posttrain.commands.push import push_run

        push_run(run, repository, update, public)

    _end(command)


@app.command("compose", rich_help_panel="Chains and results")
def compose_adapters(
    runs: Annotated[list[str], typer.Argument(help='Run directories, or one sum: "A + B - C", "0.5*A + B".')],
    out: OUT,
    weights: Annotated[str | None, typer.Option("--weights", help="One a run, such as 0.5,0.5; without it all are 1.")] = None,
    learn: Annotated[Path | None, typer.Option("--learn", help="Learn the weights on the rows of this file.")] = None,
) -> None:
    """Make one adapter of several: their weighted sum, exactly."""

    def command() -> None:
        from posttrain.commands.compose import compose_runs
        from posttrain.errors import UserError
        from posttrain.runs.remote import result_at

        try:
            numbers = [float(part) for part in weights.split(",")] if weights else None
        except ValueError:
            raise UserError(f"--weights: '{weights}' is no list of numbers; write 0.5,0.5") from None
        with result_at(out) as place:
            compose_runs(runs, place, numbers, learn)

    _end(command)


@app.command("reproduce", rich_help_panel="Chains and results")
def rebuild(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the new run goes; default: beside it, as NAME-again.")] = None,
) -> None:
    """Rebuild a run from what it says of itself, and see whether the result agrees."""

    def command() -> None:
        from posttrain.commands.reproduce import reproduce

        reproduce(run, out)

    _end(command)


@app.command("import", rich_help_panel="Before a run")
def bring(
    file: Annotated[Path, typer.Argument(help="axolotl.yml, llamafactory.yaml, trl.yaml or args.json.")],
    to: Annotated[Path | None, typer.Option("--to", help="Write it here; default: print it.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Which of ours it is; default: as the file says.")] = None,
) -> None:
    """The config of Axolotl, LLaMA-Factory, TRL or transformers as a file for --config."""

    def command() -> None:
        from posttrain.commands.bring.bring import import_config
        from posttrain.console import output_alone

        with output_alone(to is None):
            text = import_config(file, to, stage)
        if to is None:
            print(text, end="")

    _end(command)


@app.command("new", rich_help_panel="Before a run")
def new_file(
    stage: Annotated[str, typer.Argument(help=", ".join(stages()))],
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings that go into the file too.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A name such as smollm2, a hub id or a directory.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="A file of rows, or a hub id.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="lora, qlora, full, ...")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Fit in so much, such as 24GB; auto: this machine's; skip.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="The file.")] = Path("my.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: defaults for what is not given.")] = False,
) -> None:
    """A few questions, and a commented YAML of the answers for --config."""

    def command() -> None:
        from posttrain.commands.new import new_config, question_on_terminal

        given = {"model": model, "data.path": data, "peft": method, "memory": memory}
        new_config(stage, given, words or [], to, None if yes else question_on_terminal())

    _end(command)


@app.command("verify-resume", cls=_StageCommand, rich_help_panel="Before a run")
def verify(
    stage: Annotated[str, typer.Argument(help=", ".join(stages()))],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="As for the stage itself.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="How many, with a stop half-way.")] = 6,
    config: ConfigFile = None,
    config_dir: ConfigDir = None,
) -> None:
    """Does a stop change anything? A few steps of your own config, straight through and stopped half-way."""

    def command() -> None:
        from posttrain.commands.verify_resume import verify_resume

        spec_of(stage)  # refuses a name that is none
        verify_resume(stage, _words(overrides, config), steps, config_dir)

    _end(command)


@app.command("tune", cls=_StageCommand, rich_help_panel="Before a run")
def tune_stage(
    stage: Annotated[str, typer.Argument(help=", ".join(stages()))],
    over: Annotated[list[str], typer.Option("--over", help="KEY=LOW..HIGH, in the logarithm, or KEY=a,b; may be given again.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="As for the stage itself.")] = None,
    trials: Annotated[int, typer.Option("--trials", min=2, help="Settings to try, where a range says no number.")] = 9,
    factor: Annotated[int, typer.Option("--factor", help="One in so many goes on, to so many times the steps.")] = 3,
    metric: Annotated[str, typer.Option("--metric", help="By which trials are judged.")] = "eval/loss",
    highest: Annotated[bool, typer.Option("--highest", help="A higher metric is better.")] = False,
    sampler: Annotated[str, typer.Option("--sampler", help="auto, grid, random; with Optuna tpe, qmc.")] = "auto",
    config: ConfigFile = None,
    config_dir: ConfigDir = None,
) -> None:
    """The best learning rate, and what else is named: trials of which the best go on, in a quarter of a grid's steps."""

    def command() -> None:
        from posttrain.launch.tune import tune

        spec_of(stage)  # refuses a name that is none
        tune(stage, _words(overrides, config), over, trials, factor, metric, highest, config_dir, sampler)

    _end(command)


@app.command("plan", cls=_StageCommand, rich_help_panel="Before a run")
def plan_run(
    stage: Annotated[str, typer.Argument(help="A stage, such as sft or dreambooth.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="As for the stage itself.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    memory: Annotated[str | None, typer.Option("--memory", help="Fit in so much, such as 48GB; default: the device's.")] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="Plan for this card, such as h100 or 4090; default: this machine.")
    ] = None,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="For so many of them: train.processes.")] = None,
    config: ConfigFile = None,
) -> None:
    """What a run will cost in memory and time, on this machine or a card, without loading a weight."""

    def command() -> None:
        import json

        from posttrain.commands.plan.plan import make_plan, on_devices, parse_memory
        from posttrain.commands.plan.show import show_plan
        from posttrain.console import console
        from posttrain.devices.device import Device

        spec_of(stage)  # refuses a name that is none
        console.stderr = as_json
        plan = make_plan(
            stage, on_devices(_words(overrides, config), devices), parse_memory(memory), Device.named(device) if device else None
        )
        print(json.dumps(plan, indent=2)) if as_json else show_plan(plan)

    _end(command)


@app.command("preview", cls=_StageCommand, rich_help_panel="Before a run")
def preview_run(
    stage: Annotated[str, typer.Argument(help=", ".join(name for name, spec in stages().items() if spec.rows))],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="As for the stage itself.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of each source that are looked at.")] = 1000,
    everything: Annotated[bool, typer.Option("--all", help="Look at every row.")] = False,
    units: Annotated[int, typer.Option("--units", min=1, help="Packs, conversations or pairs of the first step to show.")] = 3,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 2 where something is wrong.")] = False,
    page: Annotated[Path | None, typer.Option("--page", help="Where the page goes; default runs/preview-STAGE.html.")] = None,
    config: ConfigFile = None,
) -> None:
    """What the model will see: tokens by their weight, packs, lengths, and rows that are wrong. Loads no weights."""

    def command() -> None:
        from posttrain.commands.preview.page import preview_page, show_preview
        from posttrain.commands.preview.preview import make_preview
        from posttrain.errors import UserError

        spec_of(stage)  # refuses a name that is none
        preview = make_preview(stage, _words(overrides, config), None if everything else rows, units)
        show_preview(preview, preview_page(preview, page or Path("runs") / f"preview-{stage}.html"))
        if strict and preview.mistakes:
            raise UserError(f"--strict: {'; '.join(preview.mistakes)}"[:500])

    _end(command)


def _doc_pages(incomplete: str) -> list[str]:
    from posttrain.commands.docs.pages import pages

    return [name for name in pages() if name.startswith(incomplete)]


def _cache_words(incomplete: str) -> list[str]:
    from posttrain.runs.cache_place import KINDS

    return [word for word in ("clean", *KINDS) if word.startswith(incomplete)]


@app.command("cache", rich_help_panel="Before a run")
def cache(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[clean] [KIND...]", help="Which kinds of entries; none: all.", autocompletion=_cache_words),
    ] = None,
    older: Annotated[float | None, typer.Option("--older-than", metavar="DAYS", help="clean: what was not used so long.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="clean: all that the next run makes again by itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is kept for the next run, and how much room it takes; clean takes away what nobody is using."""

    def command() -> None:
        import json

        from posttrain.commands.cache import CLEAN, clean_cache, list_cache, show_cache, show_cleaned
        from posttrain.errors import UserError

        given = words or []
        if cleans := given[:1] == [CLEAN]:
            found = clean_cache(given[1:], older, everything)
        elif older is not None or everything:
            raise UserError("--older-than and --all say what to clean: posttrain cache clean --older-than 30")
        else:
            found = list_cache(given)
        if as_json:
            print(json.dumps(found, indent=2))
        elif cleans:
            show_cleaned(found)
        else:
            show_cache(found, each=bool(given))

    _end(command)


@app.command("docs", rich_help_panel="Before a run")
def documentation(
    page: Annotated[str | None, typer.Argument(help="A page's name, such as first-hour.", autocompletion=_doc_pages)] = None,
    find: Annotated[str | None, typer.Option("--find", metavar="WORDS", help="Where these words stand.")] = None,
    serving: Annotated[bool, typer.Option("--serve", help="All pages in a browser, from this machine alone.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="With --serve; 0: any that is free.")] = 8017,
) -> None:
    """The documentation that came with this version: a list of its pages, or one of them."""

    def command() -> None:
        from posttrain.commands.docs import pages

        if serving:
            from posttrain.commands.docs.server import serve

            serve(port)
        elif find is not None:
            pages.show_found(find)
        elif page is not None:
            pages.show_page(page)
        else:
            pages.show_list()

    _end(command)


@app.command(rich_help_panel="Before a run")
def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Try everything that a run uses of the card; on a CPU what it can.")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="With --gpu: a file for the report.")] = None,
) -> None:
    """What this machine has: libraries, device, memory, disk, and whether the hub can be reached."""

    def command() -> None:
        from posttrain.errors import UserError

        if report and not gpu:
            raise UserError("--json: it is the report of --gpu; say posttrain doctor --gpu --json FILE")
        if gpu:
            from posttrain.commands.checks.every import check_device

            check_device(report)
            return
        from posttrain.commands.doctor import examine

        examine()

    _end(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
