"""The first line of a run: what is trained, how, and where."""

from __future__ import annotations

from typing import Any

from posttrain.config.metrics import rounded


def headline(cfg: Any, num_steps: int, lr: float | None, device: str, processes: int) -> str:
    """Stage, method, quantization, optimizer with its rate, steps and device. lr: what `optim.lr=auto` has found."""
    peft, quant, optim = cfg.peft, cfg.quant.method, cfg.optim
    method = "all weights" if peft.method == "none" else peft.method
    rank = getattr(peft, "r", None)
    method += f" (r={rank})" if rank else ""
    method += f" over {quant}" if quant != "none" else ""
    rate = lr if optim.lr == "auto" else optim.lr
    found = " (found)" if optim.lr == "auto" else ""
    shares = f", {processes} processes" if processes > 1 else ""
    schedule = f"{optim.name} at {rounded(rate)}{found}, {optim.schedule}" if rate is not None else optim.name
    return f"{cfg.stage}: {method}; {schedule}; {num_steps:,} steps; on {device}{shares}"
