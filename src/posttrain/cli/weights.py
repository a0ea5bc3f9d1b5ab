"""What is made of a result's weights, or of its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.words import app, end

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

    end(command)


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

    end(command)


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

    end(command)


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

    end(command)


@app.command("reproduce", rich_help_panel="Chains and results")
def rebuild(
    run: Annotated[Path, typer.Argument(help="A finished run's directory.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where the new run goes; default: beside it, as NAME-again.")] = None,
) -> None:
    """Rebuild a run from what it says of itself, and see whether the result agrees."""

    def command() -> None:
        from posttrain.commands.reproduce import reproduce

        reproduce(run, out)

    end(command)
