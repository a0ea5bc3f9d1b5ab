"""What the project wants of a card, beside what benchmarks/gpu_all.py has found on one: reached, missed, or not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """case, figure: of gpu_all.py's. wanted: at least; at_most: no more than that. over: the figure is divided by this one of
    another case. card: a part of the card's name on which it is a goal; '': on any with CUDA."""

    name: str
    case: str
    figure: str
    wanted: float
    at_most: bool = False
    over: tuple[str, str] | None = None
    card: str = ""

    @property
    def bound(self) -> str:
        """In words."""
        return f"{'at most' if self.at_most else 'at least'} {self.wanted:,g}"


REPORT = Path(__file__).with_name("seen") / "gpu.json"  # of make bench-gpu
TOKENS, LEAST = "tokens_per_second", "8b qlora, least memory"
GOALS = (
    # 12,473 tokens/s of NeMo AutoModel there are 402 TFLOP/s
    Goal("8B LoRA: share of the measured matmul rate", "8b lora", "share_of_matmul_rate", 0.55, card="H100"),
    Goal("8B QLoRA: of LoRA's tokens/s, 8k tokens a step", "8b qlora", TOKENS, 0.9, over=("8b lora", TOKENS), card="H100"),
    Goal("8B QLoRA: peak over the floor", LEAST, "peak_gb", 1.1, at_most=True, over=(LEAST, "floor_gb")),
    Goal("65B QLoRA, rank 64: GB", "65b qlora, 48 GB", "peak_gb", 48.0, at_most=True),
    # torchtune on an RTX 4090: 2,413
    Goal("8B QLoRA in 24 GB: tokens/s", "8b qlora, 24 GB", TOKENS, 2400.0),
    # Unsloth: 78,475
    Goal("8B QLoRA in 24 GB: longest context", "8b qlora, 24 GB, longest", "longest_tokens", 80_000.0),
)  # fmt: skip


PAGE = """
## On a GPU

    make bench-gpu        # benchmarks/gpu_all.py, into benchmarks/seen/gpu.json and .svg, goals judged; within 25 minutes

Of Llama's shapes of 1B, 8B and 65B and Qwen3's of 30B with experts, of random numbers made layer by layer: SFT (LoRA, QLoRA,
full), DPO, RM, PPO's update, rollouts; beside TRL, TRL with liger-kernel and FlashAttention, Unsloth and torchtune where they
are installed. `--cap 24` has a card say that it is out of memory where one of 24 GB would; `--longest 131072` looks for the
longest context that fits. The share of the measured matmul rate counts the products that are needed, nothing that is computed
again, and not those of attention.

Seen on one {cards}, {date}: `benchmarks/seen/gpu.json`, whose figures stand in
[docs/gpu.md](gpu.md#on-a-card). There was time for a part of it alone: transformers' `generate`, RM, 30B with experts, 1B with
LoRA and all peers are *not seen* in it. On a CPU all of it has run on toy shapes (`--toy`), and its arithmetic is tested.

| goal | wanted | on | seen |
|---|---|---|---|
{rows}

The 24 GB are 24 GB of an H100, whose products are several times as fast as those of a card with so little memory. 131,072 tokens
are the most that the longest context is looked for up to. It was 61,440 before the MLP of a recomputed layer went in tiles
(`models/kernels/tiles.py`); the peak over the floor was 1.51 in a run that had the making of the model in it. What is alive at
the worst moment, counted on shapes alone, is 1.05 times the floor too (`tests/models/kernels/test_peak.py`).

The floor is the weights (NF4 with double quantization 0.516 bytes a number), 6 bytes a trained number, each layer's input and
all that one layer keeps: 6.86 GB of 8B and 39.1 GB of 65B, rank 16, 2,048 tokens. Others' figures, as they give them: NeMo
AutoModel, LoRA of 8B on an H100, 12,473 tokens/s (402 TFLOP/s); torchtune, QLoRA of 8B on an RTX 4090, 2,413 tokens/s; Unsloth,
8B in 24 GB, 78,475 tokens of context.
"""


def page(report: dict[str, Any] | None = None) -> str:
    """The section of docs/benchmarks.md. report: gpu_all.py's; None: the one at REPORT."""
    seen: dict[str, Any] = report or json.loads(REPORT.read_text(encoding="utf-8"))
    found = {each["goal"]: f"{each['state']}: {each['says']}" for each in judged(seen["cases"])}
    rows = [f"| {goal.name} | {goal.bound} | {goal.card or 'any card'} | {found[goal.name]} |" for goal in GOALS]
    cards = dict.fromkeys(each["device"] for each in seen["cases"] if "device" in each)
    return PAGE.format(rows="\n".join(rows), cards=", ".join(cards), date=seen["date"])


def judged(cases: list[dict[str, Any]], goals: tuple[Goal, ...] = GOALS) -> list[dict[str, Any]]:
    """goal, wanted, found, share (of the goal, 1 where it is just reached), state, and in words what was found or why not."""
    return [_judged(goal, {each["case"]: each for each in cases if each["contender"] == "posttrain"}) for goal in goals]


def _judged(goal: Goal, ours: dict[str, dict[str, Any]]) -> dict[str, Any]:
    record = {"goal": goal.name, "case": goal.case, "wanted": goal.bound, "found": None, "share": None}
    if why := _unseen(goal, ours):
        return record | {"state": "not seen", "says": why}
    found = ours[goal.case][goal.figure]
    if goal.over:
        found /= ours[goal.over[0]][goal.over[1]]
    share = goal.wanted / found if goal.at_most else found / goal.wanted
    said = f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"
    state, says = "reached" if share >= 1 else "missed", f"{said}, wanted {goal.bound}"
    return record | {"found": found, "share": share, "state": state, "says": says}


def _unseen(goal: Goal, ours: dict[str, dict[str, Any]]) -> str:
    """'' where there is a figure of the right card."""
    for case, figure in filter(None, ((goal.case, goal.figure), goal.over)):
        found = ours.get(case)
        if found is None:
            return f"{case} was not measured"
        if "failed" in found:
            return f"{case} failed: {found['failed']}"
        if found.get("device") == "CPU" or goal.card not in found.get("device", ""):
            return f"measured on {found.get('device')}, wanted on {goal.card or 'a card'}"
        if found.get(figure) is None:
            return f"{case} says no {figure}"
    return ""
