"""What `posttrain STAGE --help` says of a stage's settings. No torch, no Hydra."""

from __future__ import annotations

import re

from posttrain.stages.spec import StageSpec, usual_rates

GROUPS = {"Model": ("model", "init"), "Method": ("peft", "quant"), "Data": ("data",), "Training": ("train", "optim"),
          "Evaluation": ("eval",), "Run": ("run",)}  # fmt: skip
OWN = "This stage"


def settings(spec: StageSpec) -> list[tuple[str, str]]:
    """Those that help names, with the stage's own learning rates."""
    rates = [f"{rate:.6g}".replace("e-0", "e-") for rate in usual_rates(spec.name) or ()]
    full = f"with LoRA, {rates[1]} in full; " if rates else ""
    return [
        (key.replace("RATE", rates[0]), full + meaning) if rates and key == "optim.lr=RATE" else (key, meaning)
        for key, meaning in spec.settings
    ]


def epilog(spec: StageSpec) -> str:
    """What stands below a stage's options, for Rich: its settings with their defaults, by group, and examples."""
    groups = "\n\n".join(
        "\n".join([f"[bold]{group}[/]", *(f"  [cyan]{plain(key):<26}[/]{plain(meaning)}" for key, meaning in found)])
        for group, found in _grouped(settings(spec)).items()
    )
    examples = "\n".join(f"  posttrain {spec.name} {plain(words)}" for words in spec.examples)
    return (
        f"Main settings and their defaults (all of them: an example with --cfg job)\n\n{groups}\n\n[bold]Examples[/]\n{examples}"
    )


def plain(text: str) -> str:
    """With brackets that Rich shows and does not obey."""
    return text.replace("[", "\\[")


def _grouped(named: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """By what they are about; a stage's own come after its data."""
    group_of = {section: group for group, sections in GROUPS.items() for section in sections}
    order = [*list(GROUPS)[:3], OWN, *list(GROUPS)[3:]]
    found: dict[str, list[tuple[str, str]]] = {group: [] for group in order}
    for key, meaning in named:
        found[group_of.get(re.split(r"[.=]", key.lstrip("+"))[0], OWN)].append((key, meaning))
    return {group: rows for group, rows in found.items() if rows}
