"""`posttrain sft`, ...: a command for each stage there is."""

from __future__ import annotations

from typing import Annotated

import typer

from posttrain.cli.words import ConfigDir, ConfigFile, Overrides, StageCommand, app, end, words_of
from posttrain.stages.help import epilog
from posttrain.stages.spec import StageSpec, stages


def _add_stage(spec: StageSpec) -> None:
    name = spec.name

    @app.command(name, cls=StageCommand, help=spec.about, epilog=epilog(spec), rich_help_panel="Stages")
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

            words = words_of(overrides, config)
            if cfg or info:
                with output_alone():
                    print(composing.show(name, words, config_dir, cfg, info))
            elif multirun:
                from posttrain.launch.sweep import run_sweep

                run_sweep(name, words, config_dir)
            else:
                from posttrain.launch.worker import run_config

                run_config(composing.compose_run(name, words, config_dir), waits=False)

        end(command)


for _spec in stages().values():
    _add_stage(_spec)
