"""docs/gpu.md: its tables of memory and speed, by `posttrain plan --device`, and what was measured on a card.

python scripts/gpu_page.py      makes every row (some minutes) and writes the page
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from posttrain.commands.plan.plan import make_plan, on_devices
from posttrain.devices.cards import CARDS
from posttrain.devices.device import Device
from posttrain.models.language.tokenizer import load_tokenizer

HERE = Path(__file__).resolve().parent
TEMPLATE, PAGE = HERE / "gpu_page.md", HERE.parent / "docs" / "gpu.md"
REPORT = HERE.parent / "benchmarks" / "seen" / "gpu.json"  # make bench-gpu's
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LENGTH = 2048
# rows that are not at hand are planned for at their longest
WORDS = ["data=ultrachat", f"train.max_length={LENGTH}", "train.batch_size=1", "train.grad_accum=8", "train.max_steps=100",
         "train.gradient_checkpointing=true"]  # fmt: skip
PROMPTS = ["data=gsm8k", "reward.function=length"]


class Row(NamedTuple):
    """One line of a table. devices: that share it with FSDP."""

    stage: str
    words: tuple[str, ...]
    devices: int = 1
    card: str = "h100"

    @property
    def title(self) -> str:
        """As a user would say it."""
        return f"`{' '.join([self.stage, *self.words])}`"


ROWS: dict[str, tuple[Row, ...]] = {
    "8B": (
        Row("sft", ("+peft=lora",)), Row("sft", ("+peft=qlora",)), Row("sft", ("train.fsdp=true",), 8),
        Row("dpo", ("+peft=qlora",)), Row("ppo", ("+peft=qlora",)),
    ),
    "70B": (
        Row("sft", ("+peft=lora",), 1, "b200"), Row("sft", ("+peft=qlora",)), Row("sft", ("train.fsdp=true",), 32),
        Row("dpo", ("+peft=qlora",)), Row("ppo", ("+peft=qlora",)),
    ),
}  # fmt: skip
# column -> the plan's parts that it is the sum of
COLUMNS: dict[str, tuple[str, ...]] = {
    "base": ("weights", "quantized weights", "quantization constants"),
    "adapters": ("adapters",),
    "gradients": ("gradients",),
    "moments": ("optimizer",),
    "roles, cache": ("value adapter, gradients, optimizer", "key-value cache", "reference"),
    "gathered": ("gathered layers",),
    "loss": ("logits",),
    "activations": ("activations",),
}


def model_directory(shape: str, folder: Path) -> Path:
    """A config of this shape with a tokenizer; a plan needs no weights."""
    place = folder / shape
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place)
    load_tokenizer("tiny", None, None, None).save_pretrained(place)
    return place


def plan_of(row: Row, directory: Path) -> dict[str, Any]:
    """Of a row of one sequence of 2,048 tokens, all layers recomputed."""
    words = [word for word in WORDS if row.stage == "sft" or not word.startswith("data=")]
    words += PROMPTS if row.stage == "ppo" else ["data=ultrafeedback"] if row.stage == "dpo" else []
    words = on_devices([*words, *row.words, f"model.name={directory}"], row.devices if row.devices > 1 else None)
    return make_plan(row.stage, words, None, Device.named(row.card))


def line(row: Row, plan: dict[str, Any]) -> str:
    """A line of the table, in GB of 10^9 bytes."""
    parts = [sum(plan["memory"].get(part, 0) for part in known) for known in COLUMNS.values()]
    known = {part for parts in COLUMNS.values() for part in parts}
    assert set(plan["memory"]) <= known, set(plan["memory"]) - known
    cells = [f"{size / 1e9:.2f}" if size else "" for size in (*parts, plan["total_bytes"])]
    return f"| {row.title} | {' | '.join(cells)} | {where(row, plan)} | {plan['tokens_per_second']:,.0f} |"


def where(row: Row, plan: dict[str, Any]) -> str:
    """The smallest cards of the table that hold it."""
    if row.devices > 1:
        return f"{row.devices} x {row.card}" if plan["fits"] else f"not {row.devices} x {row.card}"
    devices = (Device.named(card.name) for card in CARDS)
    holding = [each for each in devices if each.has_bfloat16 and each.capacity >= plan["total_bytes"]]
    card = min(holding, key=lambda each: each.capacity, default=Device("cpu", "none", 0)).card
    return card.name if card else "none"


def table(shape: str, rows: dict[Row, dict[str, Any]]) -> str:
    """One shape's."""
    head = ["run", *COLUMNS, "total", "smallest", "tokens/s"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(line(row, plan) for row, plan in rows.items())]
    return f"### Llama 3 {shape}\n\n" + "\n".join(lines)


def seen(report: dict[str, Any]) -> str:
    """What benchmarks/gpu_all.py has measured on a card, case by case."""
    cards = dict.fromkeys(each["device"] for each in report["cases"] if each.get("device", "CPU") != "CPU")
    cases = [each for each in report["cases"] if each.get("device") in cards or "failed" in each]
    versions = ", ".join(f"{name} {report['libraries'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    head = (
        "    make bench-gpu            # benchmarks/seen/gpu.json, from which `python scripts/gpu_page.py` makes this table\n\n"
        f"{', '.join(cards)}, {report['date']}, {versions}. Random weights; the words of each case are in\n"
        "`benchmarks/gpu_all.py`. *share*: of products at the rate that the card reached in the same process.\n"
    )
    table = ["| case | by | tokens/s | slowest to fastest | share | peak, GB |", "|---|---|---|---|---|---|", *map(_case, cases)]
    left = [f"Not begun for want of time: {', '.join(report['left_out'])}."] if report["left_out"] else []
    return "\n".join([head, *table, *(f"\n{each}" for each in left)])


def _case(found: dict[str, Any]) -> str:
    """One line; of what failed the reason."""
    name = f"| {found['case']} | {found['contender']} |"
    if "failed" in found:
        return f"{name} failed: {found['failed'].replace('|', '/')} |  |  |  |"
    if "longest_tokens" in found:
        return f"{name} a row of {found['longest_tokens']:,} tokens fits |  |  |  |"
    low, high = found.get("spread", (None, None))
    share, peak = found.get("share_of_matmul_rate"), found.get("peak_gb")
    cells = [
        f"{found['tokens_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}" if low else "", f"{share:.1%}" if share else "",
        f"{peak:.1f}" if peak else "",
    ]  # fmt: skip
    return f"{name} {' | '.join(cells)} |"


def template() -> str:
    """The page but for the tables of plans."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    return TEMPLATE.read_text(encoding="utf-8").replace("{seen}", seen(report))


def page(plans: dict[str, dict[Row, dict[str, Any]]]) -> str:
    """The whole page."""
    return template().replace("{tables}", "\n\n".join(table(*each) for each in plans.items()))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plans: dict[str, dict[Row, dict[str, Any]]] = {}
        for shape, rows in ROWS.items():
            directory = model_directory(shape, Path(folder))
            plans[shape] = {}
            for row in rows:
                plans[shape][row] = plan_of(row, directory)
                print(shape, line(row, plans[shape][row]), file=sys.stderr)
    PAGE.write_text(page(plans), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
