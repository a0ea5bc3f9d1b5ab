"""docs/commands.md, docs/losses.md and docs/formats.md, from the command line, the losses and the formats themselves.

python scripts/reference_pages.py            # writes the three
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from posttrain.cli import app
from posttrain.config.choices import POLICY_LOSSES, PREFERENCE_LOSSES, TOKEN_LOSSES
from posttrain.data.formats import by_precedence
from posttrain.losses.diffusion import denoising_loss
from posttrain.losses.ewc import ewc_penalty
from posttrain.losses.reward import reward_loss
from posttrain.losses.router import router_balance
from posttrain.stages.help import settings
from posttrain.stages.spec import row_uses, stages

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- made by `make docs` (scripts/reference_pages.py); do not edit by hand -->"
PANELS = ["Stages", "Before a run", "Chains and results"]
MEANS = {"token": "all tokens alike", "answer": "answers, each the mean of its tokens",
         "longest": "answers, each the sum of its tokens over `rollout.max_new_tokens`"}  # fmt: skip
OTHERS = {"rm": reward_loss, "dreambooth": denoising_loss, "ewc.lambda": ewc_penalty, "train.router_aux_loss": router_balance}
OF_LOSSES = """Every loss is a sum and a count ([why](why.md#why-sums-and-counts)). h is a difference of the chosen and the
rejected answer, sigma the logistic function, log-probs are in nats. What they have in common, sums of several, figures:
[preference.md](preference.md), [rl.md](rl.md). Their code: [api/losses.md](api/losses.md). One of your own:
[extending.md](extending.md)."""
OF_FORMATS = """A run recognises the format by the first row's columns, the first of this list that fits, and says which one it
found; `data.shape=` sets it. Other columns are kept for reward functions; `data.columns.prompt=question` gives a column another
name. What else is read, and what is a mistake: [data.md](data.md)."""
OF_COMMANDS = "`posttrain COMMAND --help` says the same. Exit codes: [configuration.md](configuration.md#exit-codes)."


def cell(text: str) -> str:
    """In a table, with no marks of Markdown's but code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p.replace("|", "\\|") if i % 2 else re.sub(r"([|*<])", r"\\\1", p) for i, p in enumerate(parts))


def table(head: str, rows: Iterator[tuple[str, ...]]) -> str:
    names = head.split(", ")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def first_paragraph(thing: Any) -> str:
    """Of its docstring."""
    return cell((inspect.getdoc(thing) or "").split("\n\n")[0])


# commands


def commands() -> dict[str, Any]:
    """Every command of `posttrain` by its name, with those of the stages first."""
    group: Any = typer.main.get_command(app)
    # packages that happen to be installed here may bring stages of their own
    ours = {name: each for name, each in group.commands.items() if name not in stages() or _is_ours(name)}
    return dict(sorted(ours.items(), key=lambda item: PANELS.index(item[1].rich_help_panel)))


def _is_ours(stage: str) -> bool:
    return stages()[stage].steps.startswith("posttrain.")


def usage(command: Any) -> str:
    words = [each.metavar or each.name.upper() for each in command.params if each.param_type_name == "argument"]
    return " ".join(["posttrain", command.name, *words, "[OPTIONS]"])


def parameters(command: Any) -> Iterator[tuple[str, ...]]:
    for each in command.params:
        if each.param_type_name == "argument":
            yield f"`{(each.metavar or each.name.upper()).strip('[]')}`", "", cell(each.help or "")
            continue
        names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
        shown = each.default is not None and not each.is_flag and not each.required
        yield names, f"`{each.default}`" if shown else "required" if each.required else "", cell(each.help or "")


def settings_of(stage: str) -> str:
    spec = stages()[stage]
    rows = ((f"`{key}`", cell(meaning)) for key, meaning in settings(spec))
    examples = "\n".join(f"    posttrain {stage} {words}" for words in spec.examples)
    return f"{table('main settings, meaning', rows)}\n\n{examples}"


def commands_page() -> str:
    blocks = [
        "# Commands",
        MADE,
        "`posttrain COMMAND --help` says the same. Exit codes: [configuration.md](configuration.md#exit-codes).",
    ]
    panel = ""
    for name, command in commands().items():
        if command.rich_help_panel != panel:
            panel = command.rich_help_panel
            blocks.append(f"## {panel}")
        blocks += [f"### posttrain {name}", f"```text\n{usage(command)}\n```", cell(command.help)]
        if name in stages():
            blocks.append(settings_of(name))
        blocks.append(table("word, default, meaning", parameters(command)))
    return "\n\n".join(blocks) + "\n"


# losses


def _comment(module: Any) -> str:
    """The comment over a module's LOSS."""
    found = re.search(r"((?:^#.*\n)+)LOSS\b", inspect.getsource(module), re.MULTILINE)
    return cell(re.sub(r"^#", "", found[1], flags=re.MULTILINE)) if found else ""


def _modules(registry: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, module and loss of those that are shipped."""
    for name, loss in registry.all().items():
        if find_spec(f"{registry.package}.{name}"):  # others are of packages that happen to be installed
            yield name, import_module(f"{registry.package}.{name}"), loss


def preference_rows() -> Iterator[tuple[str, ...]]:
    for name, module, loss in _modules(PREFERENCE_LOSSES):
        beta = "" if loss.beta is None else f"{loss.beta:g}"
        options = ", ".join(f"`{key}` {_short(value)}" for key, value in loss.options.items())
        reads = "labelled answers" if loss.unpaired else "pairs", "yes" if loss.needs_reference else "no"
        yield f"`{name}`", first_paragraph(module), first_paragraph(loss.per_pair), *reads, beta, options


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def losses_page() -> str:
    tokens = (
        (f"`{name}`", first_paragraph(module), first_paragraph(loss.per_token)) for name, module, loss in _modules(TOKEN_LOSSES)
    )
    policies = (
        (f"`{name}`", first_paragraph(module), _comment(module) or first_paragraph(loss.per_token), MEANS[loss.mean])
        for name, module, loss in _modules(POLICY_LOSSES)
    )
    others = ((f"`{key}`", first_paragraph(function)) for key, function in OTHERS.items())
    blocks = [
        "# Losses",
        MADE,
        OF_LOSSES,
        "## `sft.loss`",
        "`cpt` trains by `nll`. `sft.label_smoothing` and `sft.z_loss` are added to `nll`.",
        table("name, what, of a token", tokens),
        "## `dpo.loss`",
        table("name, what, of a pair or answer, rows, reference, usual beta, options", preference_rows()),
        "## `ppo.loss`",
        table("name, what, of a token, mean over", policies),
        "## Of other stages, and added to a loss",
        table("of, formula", others),
    ]
    return "\n\n".join(blocks) + "\n"


# formats


def formats_page() -> str:
    blocks = ["# Data formats", MADE, OF_FORMATS]
    for name, each in by_precedence().items():
        if not str(each.to_canonical.__module__).startswith("posttrain."):
            continue  # of an installed package
        takers = ", ".join(f"`{stage}`" for stage, use in row_uses().items() if each.kind in use.takes and _is_ours(stage))
        row, becomes = (
            f"```json\n{json.dumps(value, ensure_ascii=False)}\n```" for value in (each.example, each.example_becomes)
        )
        blocks += [f"## {name}", f"{cell(each.columns)}. For {takers}.", row, f"is read as {each.kind}:", becomes]
    return "\n\n".join(blocks) + "\n"


def made() -> dict[str, str]:
    """File -> text."""
    return {"commands.md": commands_page(), "losses.md": losses_page(), "formats.md": formats_page()}


def main() -> None:
    for name, text in made().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote {DOCS / name}")


if __name__ == "__main__":
    main()
