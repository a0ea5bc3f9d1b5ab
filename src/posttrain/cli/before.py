"""Before a run: its settings, what it will cost, what it will see."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.words import ConfigDir, ConfigFile, StageCommand, app, end, words_of
from posttrain.stages.spec import spec_of, stages


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

    end(command)


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

    end(command)


@app.command("verify-resume", cls=StageCommand, rich_help_panel="Before a run")
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
        verify_resume(stage, words_of(overrides, config), steps, config_dir)

    end(command)


@app.command("tune", cls=StageCommand, rich_help_panel="Before a run")
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
        tune(stage, words_of(overrides, config), over, trials, factor, metric, highest, config_dir, sampler)

    end(command)


@app.command("plan", cls=StageCommand, rich_help_panel="Before a run")
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
        card, settings = Device.named(device) if device else None, on_devices(words_of(overrides, config), devices)
        plan = make_plan(stage, settings, parse_memory(memory), card)
        print(json.dumps(plan, indent=2)) if as_json else show_plan(plan)

    end(command)


@app.command("preview", cls=StageCommand, rich_help_panel="Before a run")
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
        preview = make_preview(stage, words_of(overrides, config), None if everything else rows, units)
        show_preview(preview, preview_page(preview, page or Path("runs") / f"preview-{stage}.html"))
        if strict and preview.mistakes:
            raise UserError(f"--strict: {'; '.join(preview.mistakes)}"[:500])

    end(command)
