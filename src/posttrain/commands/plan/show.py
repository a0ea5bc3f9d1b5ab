"""A plan as people read it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from posttrain.console import console, say

GB = 1e9


def show_plan(plan: dict[str, Any]) -> None:
    """The plan as a table and some lines."""
    table = Table("memory of one device", "GB")
    for part, size in plan["memory"].items():
        table.add_row(part, f"{size / GB:.3f}")
    table.add_row("total", f"{plan['total_bytes'] / GB:.3f}", style="bold")
    say(f"{plan['stage']} of {plan['model']}, peft={plan['method']} quant={plan['quant']}")
    for line in plan.get("checkpoint", []):
        say(line)
    trained, total = plan["trained_parameters"], plan["total_parameters"]
    say(f"training {trained:,} of {total:,} parameters ({trained / total:.2%})")
    console.print(table)
    verdict = "fits in" if plan["fits"] else "does not fit in"
    say(f"{verdict} {plan['capacity_bytes'] / GB:.1f} GB ({plan['device']})")
    if "layers" in plan:
        _say_how(plan)
    say(f"with all layers recomputed (train.gradient_checkpointing=true): {plan['memory_with_recomputation'] / GB:.3f} GB")
    for change in plan["changes"]:
        outcome = "fits" if change["fits"] else "still too much"
        say(f"  {change['override']}: {change['total_bytes'] / GB:.3f} GB, {outcome}")
    clock = f", about {_in_words(plan['seconds'])}" if plan["seconds"] else ""
    if "images" in plan:
        work = f"{plan['images']:,} pictures of {plan['image_side']}x{plan['image_side']}"
    else:
        work = f"{plan['tokens_are']} {plan['tokens']:,} tokens"
        clock += f": {plan['tokens_per_second']:,.0f} tokens/s" if plan["tokens_per_second"] else ""
    say(f"{plan['steps']:,} steps, {work}{clock}")
    for line in plan["assumptions"]:
        say(f"- {line}")


def _say_how(plan: dict[str, Any]) -> None:
    """In which way it would run, and how large it could be."""
    autocast = ", products in bfloat16" if plan["autocast"] == "bf16" else ""
    devices = f"{plan['devices']} devices, " if plan["devices"] > 1 else ""
    layers = f"{plan['layers_recomputed']} of {plan['layers']} layers recomputed"
    attention = " or ".join(plan["attention"])
    say(f"{devices}weights in {plan['dtype']}{autocast}, attention by {attention}, optim={plan['optimizer']}, {layers}")
    largest, unit = plan["largest_batch_size"], plan["longest_unit"]
    if largest:
        longer = f"{plan['largest_unit']:,} tokens each with the batch size as it is"
        say(f"the largest that fits: train.batch_size={largest} of {unit:,} tokens each, or {longer}")
    else:
        say(f"no micro-batch of {unit:,} tokens fits, whatever train.batch_size")


def _in_words(seconds: float) -> str:
    """A time that is no more exact than it can be."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
